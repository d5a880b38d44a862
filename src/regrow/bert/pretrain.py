"""Pre-train a BERT whose encoder exists only as non-zero blocks: the main job of this library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from regrow.bert.corpus import corpus_fingerprint, read_documents
from regrow.bert.data import PretrainingSplits, prepare_splits
from regrow.bert.fused import Fusions
from regrow.bert.masking import WholeWordMasker
from regrow.bert.model import BertForPreTraining, build_model, dense_bytes, stored_bytes
from regrow.bert.options import PRECISION_HELP, Precision, TrainingOptions
from regrow.bert.progress import ProgressBar
from regrow.bert.repattern import repattern_
from regrow.bert.run import RunDirectory, writing
from regrow.bert.sizes import bert_config, size_named
from regrow.bert.stream import PairDataset
from regrow.bert.tokenizer import TOKENIZER_FORMAT, load_tokenizer, train_wordpiece
from regrow.bert.trainer import PretrainingTrainer
from regrow.cache import cache_root, written_aside
from regrow.errors import RegrowError
from regrow.methods import Method, WeightTransform
from regrow.nn import density_of, named_sparse_layers
from regrow.nn.linear import check_block_size
from regrow.nn.options import LayerOption, create
from regrow.nn.replace import DEFAULT
from regrow.optim import AdamW, parameter_groups, supar_init_factor
from regrow.optim.groups import LrScope
from regrow.optim.lr_rules import LrRule
from regrow.ranks import first_on_each_machine, join, rank, started_by_torchrun, world_size
from regrow.topology.distribution import Distribution, check_density
from regrow.training import UpdateSchedule, gradient_bytes
from regrow.training.checkpoint import ranks_of, seed_rank
from regrow.training.finite import OnNonfinite
from regrow.training.updater import check_shardable, check_trainable

_PREDICTED = 20 / 128
"""Most positions predicted, as a share of the length: BERT's 20 of 128."""


MAY_CHANGE = ("on_nonfinite", "parallel", "workers")
"""Options that a resumed run may be given anew."""


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class PretrainConfig(TrainingOptions):
    """Everything that decides a pre-training run; the command line's flags are made from these fields."""

    data: str = _option(
        "wikipedia-summaries",
        "corpus: 'wikipedia-summaries' (comes with regrow[corpus]), a file or folder of .txt[.xz|.gz|.bz2] (blank line "
        "between documents), .jsonl or .parquet, or a hub data-set name",
    )
    output: str = _option("runs/pretrain", "run directory; must be new or empty unless --resume")
    size: str = _option("tiny", "tiny, mini, small, medium, base, large, or LAYERS/HIDDEN/HEADS as 2/192/3")
    density: float = _option(
        0.1, "share of encoder blocks that exist, in (0, 1]; 0.1 is 90%% sparse; n:m methods have their own"
    )
    distribution: str = _option(
        "uniform", "how density varies over layers: uniform, er, erk, or GLOB=DENSITY,... of layer names"
    )
    block_size: int = _option(16, "edge of a block: 1, 4, 8, 16, 32 or 64")
    method: str = _option("dynsparse", "how the pattern moves; its own options are listed below")
    layer: str = _option(
        DEFAULT,
        "what stands in the place of a linear layer, of those that regrow methods lists; its options are below",
    )
    dense: bool = _option(False, "train the ordinary dense model instead: the baseline to compare with")
    steps: int = _option(1000, "optimizer steps")
    batch_size: int = _option(
        32, "sequences in a step, of all processes together: each takes an equal share, so their number must divide it"
    )
    max_length: int = _option(128, "tokens of a sequence")
    learning_rate: float | None = _option(
        None, "peak learning rate of every parameter; by default the size's dense optimum, raised by --lr-rule"
    )
    lr_scale: float = _option(1.0, "times that dense optimum; batches smaller than the paper's 512 want less than 1")
    lr_rule: LrRule = _option("eq3", "how a density raises it: eq3 (the paper's), inverse (1/density), supar, none")
    lr_scope: LrScope = _option("sparse", "which parameters that rule is for: the sparse ones, or all as in the paper")
    base_width: int | None = _option(None, "hidden size the dense optimum was tuned at, for supar; by default this one")
    warmup: float = _option(0.05, "share of the steps over which the learning rate rises; then it falls to 0")
    weight_decay: float = _option(0.01, "decoupled decay of weights; biases and norms never decay")
    block_steps: bool = _option(True, "Adam's bias correction counts each block's steps from its allocation")
    block_warmup: int | None = _option(
        None, "steps over which a re-allocated block warms up; by default the method's own (smet: 100), else 0"
    )
    max_grad_norm: float = _option(1.0, "clip the global gradient norm; 0 is off")
    on_nonfinite: OnNonfinite = _option(
        "stop", "where a gradient is not finite: stop with a checkpoint, or skip the step"
    )
    dropout: float | None = _option(None, "by default 0.1 for sizes above small, else 0, as in the paper")
    fuse: str = _option("all", "fused operations: all, none, or some of attention,norm,ffn,qkv,unpad,loss")
    precision: Precision = _option("float32", PRECISION_HELP)
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp",
        "what each of several processes holds: the whole model (ddp), or a share of its weights, gradients and "
        "optimizer state (fsdp), for less memory and more traffic",
    )
    gradient_checkpointing: bool = _option(
        False, "keep only each layer's input and compute the rest again: less memory for about a third more time"
    )
    n_updates: int | None = _option(
        None, "segments between topology updates (the paper's n); by default one in 50 steps, at most 160"
    )
    drop_fraction: float = _option(0.5, "share of blocks the first update moves (the paper's pr)")
    decay: Literal["cosine", "linear", "constant"] = _option("cosine", "how that share falls to 0 over training")
    final_fraction: float = _option(0.0, "what that share falls to instead of 0")
    stop_updates: float = _option(1.0, "share of the training after which the pattern rests")
    tokenizer: str | None = _option(None, "vocab.txt, tokenizer.json or a directory; by default trained on the corpus")
    vocab_size: int = _option(30522, "size of a tokenizer trained on the corpus")
    text_field: str = _option("text", "name of the text column in .jsonl, .parquet and hub data")
    short_documents: Literal["skip", "error"] = _option("skip", "documents of fewer than two sentences")
    max_documents: int | None = _option(None, "read only the first so many documents")
    workers: int = _option(0, "processes that prepare batches; 0 prepares them between steps")
    heldout_fraction: float = _option(0.02, "share of documents held out for evaluation")
    eval_sequences: int = _option(512, "evaluate on at most so many held-out sequences")
    eval_steps: int | None = _option(None, "evaluate every so many steps; by default at the start and the end")
    save_steps: int = _option(500, "write a checkpoint every so many steps")
    keep_checkpoints: int = _option(2, "how many checkpoints to keep")
    logging_steps: int = _option(10, "write metrics every so many steps")
    report_to: str = _option(
        "none", "trackers that get every metric, by transformers' names: none, tensorboard, wandb, ...; comma-separated"
    )
    seed: int = _option(0, "of weights, pattern, data order and masks")
    pattern_seed: int | None = _option(
        None,
        "of the pattern at the start alone: all patterns of one --seed then take their values from the same weights",
    )

    @property
    def schedule(self) -> UpdateSchedule:
        """When the topology moves, and how much of it."""
        return self.schedule_over(self.steps)

    @property
    def densities(self) -> Distribution:
        """``distribution`` as :func:`regrow.sparsify` takes it."""
        if "=" not in self.distribution:
            return self.distribution
        try:
            pairs = (part.rsplit("=", 1) for part in self.distribution.split(","))
            return {glob.strip(): float(density) for glob, density in pairs}
        except ValueError:
            raise RegrowError(
                f"distribution must be uniform, er, erk or GLOB=DENSITY,..., got {self.distribution!r}"
            ) from None

    @property
    def width_ratio(self) -> float:
        """Hidden size over the one the dense optimum was tuned at."""
        return 1.0 if self.base_width is None else size_named(self.size).hidden / self.base_width

    def groups(self, model: BertForPreTraining) -> list[dict[str, Any]]:
        """Parameter groups with their peak learning rates: all the given one, or by rule from the dense optimum."""
        given = self.learning_rate is not None
        return parameter_groups(
            model,
            self.weight_decay,
            lr=self.learning_rate if given else self.lr_scale * size_named(self.size).dense_lr,
            lr_rule="none" if given else self.lr_rule,
            lr_scope=self.lr_scope,
            width_ratio=self.width_ratio,
        )

    def check(self) -> None:
        """Raise :class:`RegrowError` for a value no run can use, before anything is read or written."""
        size = size_named(self.size)
        check_density(self.density)
        if not self.dense:
            check_block_size(size.hidden, 4 * size.hidden, self.block_size)
        for name in ("steps", "eval_sequences"):
            if getattr(self, name) < 1:
                raise RegrowError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise RegrowError(f"workers must be at least 0, got {self.workers}")
        for name in ("lr_scale", "base_width"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RegrowError(f"{name} must be positive, got {value}")
        self.check_training(self.steps)
        _ = self.densities


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to; losses in nats on the held-out set, ``None`` if it was interrupted before they were known."""

    path: Path
    finished: bool
    step: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    density: float
    coverage: float | None
    stored_bytes: int
    dense_bytes: int


def pretrain(
    config: PretrainConfig,
    method: Method,
    *,
    layer: LayerOption | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> PretrainResult:
    """Run a pre-training to its end, or until it is interrupted.

    Args:
        config: see the fields of :class:`PretrainConfig`.
        method: the sparse-training method, as ``regrow.methods.create(config.method)`` makes it.
        layer: what stands in the place of linear layers; by default ``config.layer`` with its default options.
        resume: continue the run in ``config.output`` from its newest checkpoint, or from the start if it has none yet.
        callbacks: more of transformers' callbacks; they see the model after an update.

    Started by ``torchrun``, its processes share every batch and end with the same result; see docs/scaling.md.

    Raises:
        RegrowError: an argument, the corpus, the vocabulary or a checkpoint cannot be used, or the processes cannot
            share a batch evenly. An existing run is never overwritten.
    """
    config.check()
    config.check_machine()
    layer = _layer(config, method, layer)
    _join(config)
    run = RunDirectory(config.output)
    checkpoint = run.last_checkpoint() if resume else None
    if not resume:
        run.check_free()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with first_on_each_machine():
        tokenizer = _tokenizer(config) if checkpoint is None else load_tokenizer(run.path)
        train, heldout = _data(config, tokenizer)
    model = _model(config, method, layer, len(tokenizer))
    dense_layout = config.dense or method.dense_layout
    optimizer = _optimizer(config, method, model)
    if not config.dense:  # refuse now what the first update would
        check_trainable(dict(named_sparse_layers(model)), optimizer, method, config.schedule)
        if config.parallel == "fsdp":
            check_shardable(method)
    if not resume:
        run.create(asdict(config) | asdict(method) | asdict(layer))  # type: ignore[call-overload]
    if checkpoint is None and rank() == 0:
        with writing(f"the run directory {run.path}", "choose another --output"):
            tokenizer.save_pretrained(run.path)
        if resume:
            tqdm.write(f"{run.path} has no checkpoint yet: it begins anew")
    topology = None if config.dense else config.topology_over(config.steps, method)
    trainer = PretrainingTrainer(
        model,
        _arguments(config, run),
        data_collator=train.collate,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=callbacks,
        run=run,
        topology=topology,
        progress=ProgressBar(None if dense_layout else config.density),
    )
    trainer.on_nonfinite = config.on_nonfinite
    if config.parallel == "fsdp":
        trainer.shard_units = list(model.bert.encoder.layer)
    if rank() > 0:
        seed_rank(config.seed)
    _tell_ranks(config, model, None if checkpoint is None else ranks_of(checkpoint))
    finished = trainer.train_on(checkpoint)
    coverage = topology.updater.coverage if topology and topology.updater else None
    before, after = _evaluations(run, trainer.state.global_step)
    return PretrainResult(
        path=run.path,
        finished=finished,
        step=trainer.state.global_step,
        before=before,
        after=after,
        density=_density(config, method, model, coverage),
        coverage=None if isinstance(method, WeightTransform) else coverage,
        stored_bytes=stored_bytes(model),
        dense_bytes=dense_bytes(model),
    )


def _density(config: PretrainConfig, method: Method, model: BertForPreTraining, coverage: float | None) -> float:
    """Share of the encoder's weights that are stored; or of those that are not zero, where a method transforms them."""
    if isinstance(method, WeightTransform) and coverage is not None:
        return coverage
    if config.dense or method.dense_layout:
        return 1.0
    return density_of(layer for _, layer in named_sparse_layers(model))


def _join(config: PretrainConfig) -> None:
    """Meet the other processes that torchrun started, if it did."""
    if started_by_torchrun():
        if not torch.distributed.is_initialized():
            join("nccl" if torch.cuda.is_available() else "gloo")
        PartialState(cpu=not torch.cuda.is_available())
    if config.batch_size % world_size():
        raise RegrowError(
            f"batch_size={config.batch_size} sequences in a step cannot be shared evenly by {world_size()} processes; "
            f"make it a multiple of {world_size()}"
        )
    if config.parallel == "fsdp" and world_size() == 1:
        raise RegrowError("parallel='fsdp' shares parameters out over processes; start several with torchrun")


def _tell_ranks(config: PretrainConfig, model: BertForPreTraining, before: int | None) -> None:
    """Say what the processes exchange, and what it means that there are more or fewer of them than before."""
    ranks = world_size()
    if rank() > 0:
        return
    if ranks > 1:
        sent, dense = gradient_bytes(model)
        of_encoder, of_dense_encoder = gradient_bytes(model.bert.encoder)
        tqdm.write(
            f"{ranks} processes of {config.batch_size // ranks} sequences; gradient bytes per step: {sent:,} "
            f"({sent / dense:.3f} of dense; the encoder's {of_encoder:,}, {of_encoder / of_dense_encoder:.3f} of dense)"
            + ("; the encoder's weights travel twice besides" if config.parallel == "fsdp" else "")
        )
    if before not in (None, ranks):
        tqdm.write(
            f"the checkpoint is of {before} processes, and now there are {ranks}: batches, masked words and topology "
            "updates stay what they were; dropout draws other masks and sums round otherwise, so the end is not "
            "bitwise that of an uninterrupted run"
        )


def prepare(config: PretrainConfig) -> None:
    """Make the tokenizer and the sentence pairs of a run, unless they are in the cache already."""
    _data(config, _tokenizer(config))


def _tokenizer(config: PretrainConfig) -> PreTrainedTokenizerBase:
    """The given one, or one trained on the corpus and kept for the next run."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    recipe = [
        TOKENIZER_FORMAT,
        corpus_fingerprint(config.data),
        config.text_field,
        config.max_documents,
        config.vocab_size,
    ]
    key = hashlib.blake2b(json.dumps(recipe).encode(), digest_size=12).hexdigest()
    cached = cache_root() / f"tokenizer-{key}"
    if not cached.exists():
        documents = islice(read_documents(config.data, text_field=config.text_field), config.max_documents)
        texts = tqdm((text for document in documents for text in document), "training the tokenizer", unit=" texts")
        tokenizer = train_wordpiece(texts, config.vocab_size)
        with written_aside(cached) as aside:
            tokenizer.save_pretrained(aside / cached.name)
    return load_tokenizer(cached)


def splits_of(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainingSplits:
    """Sentence pairs of the corpus to train on, and those held out: prepared, or from the cache."""
    return prepare_splits(
        config.data,
        tokenizer,
        max_length=config.max_length,
        heldout_fraction=config.heldout_fraction,
        short_documents=config.short_documents,
        max_documents=config.max_documents,
        text_field=config.text_field,
        masker=WholeWordMasker(tokenizer, max_predictions=max(1, round(config.max_length * _PREDICTED))),
    )


def _data(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PairDataset, PairDataset]:
    splits = splits_of(config, tokenizer)
    stream = splits.train.stream(config.steps * config.batch_size, seed=config.seed)
    return stream, splits.heldout.first(config.eval_sequences)


def _layer(config: PretrainConfig, method: Method, layer: LayerOption | None) -> LayerOption:
    layer = create(config.layer) if layer is None else layer
    if layer.name != config.layer:
        raise RegrowError(f"layer is {layer.name!r}, but the configuration says {config.layer!r}; make them agree")
    if layer.name != DEFAULT and method.dense_layout and not config.dense:
        raise RegrowError(f"method {method.name!r} masks dense layers, which layer={layer.name!r} are not; choose one")
    if config.parallel == "fsdp" and not layer.shardable:
        raise RegrowError(f"layer={layer.name!r} with these options cannot be shared out; train it with --parallel ddp")
    return layer


def _model(config: PretrainConfig, method: Method, layer: LayerOption, vocab_size: int) -> BertForPreTraining:
    set_seed(config.seed)
    bert = bert_config(config.size, vocab_size=vocab_size, max_length=config.max_length, dropout=config.dropout)
    density = None if config.dense else config.density
    model = build_model(
        bert,
        density=density,
        block_size=config.block_size,
        distribution=config.densities,
        fusions=Fusions.named(config.fuse),
        masked=method.dense_layout and not isinstance(method, WeightTransform),
        transform=method if isinstance(method, WeightTransform) else None,
        layer=layer,
        seed=config.seed,
    )
    if config.pattern_seed is not None:
        repattern_(model, pattern_seed=config.pattern_seed, weight_seed=config.seed)
    if config.lr_rule == "supar":
        for _, sparse in named_sparse_layers(model):
            sparse.values.data *= supar_init_factor(sparse.density, config.width_ratio)
    return model


def _optimizer(config: PretrainConfig, method: Method, model: BertForPreTraining) -> AdamW:
    options: dict[str, Any] = {"block_steps": config.block_steps} | method.optimizer_options()
    if config.block_warmup is not None:
        options["regrow_warmup"] = config.block_warmup
    return AdamW(config.groups(model), betas=(0.9, 0.999), eps=1e-6, **options)


def _arguments(config: PretrainConfig, run: RunDirectory) -> TrainingArguments:
    checkpointing: dict[str, Any] = {}
    if config.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return config.arguments(
        run.checkpoints,
        steps=config.steps,
        eval_steps=config.eval_steps or config.steps,
        ddp_find_unused_parameters=False,  # there are none
        dataloader_num_workers=config.workers,
        dataloader_prefetch_factor=4 if config.workers else None,
        **checkpointing,
    )


def _evaluations(run: RunDirectory, step: int) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Held-out metrics of step 0 and of ``step``, from the run's own log."""
    found = {entry["step"]: entry for entry in run.read_metrics() if "eval_mlm_loss" in entry}
    return found.get(0), found.get(step) if step > 0 else None
