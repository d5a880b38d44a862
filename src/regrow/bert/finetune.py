"""Fine-tune a pre-trained encoder on a task: sparse stays sparse, keeps moving, or is densified first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from regrow.bert.finetune_config import FinetuneConfig
from regrow.bert.finetuning import FinetuningTrainer
from regrow.bert.fused import Fusions, fuse
from regrow.bert.model import ENCODER, dense_bytes, stored_bytes
from regrow.bert.progress import ProgressBar
from regrow.bert.run import RunDirectory, writing
from regrow.bert.saved import load_saved
from regrow.bert.tasks.load import load_problem
from regrow.bert.tasks.problem import Problem, Stream
from regrow.errors import RegrowError
from regrow.methods import Method, WeightTransform, create
from regrow.nn import densify, density_of, named_sparse_layers, sparsify, transform_linears
from regrow.optim import AdamW, parameter_groups
from regrow.ranks import started_by_torchrun
from regrow.training.updater import check_trainable

_RATES = ((256, 3e-4), (512, 1e-4), (float("inf"), 3e-5))
"""Learning rate up to a hidden size: within BERT's published ranges for models of that size."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to; metrics are those of the held-out examples, None if it was interrupted before."""

    path: Path
    finished: bool
    step: int
    steps: int
    seconds: float
    main_metric: str
    metrics: dict[str, float] | None
    density: float
    stored_bytes: int
    dense_bytes: int


def finetune(
    config: FinetuneConfig, method: Method, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> FinetuneResult:
    """Run a fine-tuning to its end, or until it is interrupted.

    Args:
        config: see the fields of :class:`FinetuneConfig`.
        method: how the pattern moves with ``topology="dynamic"``, as ``regrow.methods.create(config.method)`` makes it;
            or where ``config.sparsify`` names a method, that one.
        resume: continue the run in ``config.output`` from its newest checkpoint, or from the start if it has none yet.
        callbacks: more of transformers' callbacks.

    Raises:
        RegrowError: an argument, the model, the data or a checkpoint cannot be used. An existing run is never
            overwritten, and nothing is written before all of them have been read.
    """
    config.check()
    config.check_machine()
    if started_by_torchrun():
        raise RegrowError("fine-tuning runs in one process; start it without torchrun")
    run = RunDirectory(config.output)
    checkpoint = run.last_checkpoint() if resume else None
    if not resume:
        run.check_free()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    problem, tokenizer = load_problem(config)
    if problem.train is None:
        raise RegrowError("there is nothing to train on")
    steps = max(1, round(config.epochs * len(problem.train) / config.batch_size))
    model = _model(config, problem, method)
    moving = _moving(config, method)
    optimizer = _optimizer(config, model)
    if moving is not None:  # refuse now what the first update would
        check_trainable(dict(named_sparse_layers(model)), optimizer, moving, config.schedule_over(steps))
    if not resume:
        run.create(asdict(config) | asdict(method))  # type: ignore[call-overload]
    if checkpoint is None:
        with writing(f"the run directory {run.path}", "choose another --output"):
            tokenizer.save_pretrained(run.path)
    sparse = [layer for _, layer in named_sparse_layers(model)]
    topology = None if moving is None else config.topology_over(steps, moving)
    trainer = FinetuningTrainer(
        model,
        config.arguments(
            run.checkpoints, steps=steps, eval_steps=config.eval_steps or -(-len(problem.train) // config.batch_size)
        ),
        data_collator=problem.collate,
        train_dataset=Stream(problem.train, steps * config.batch_size, config.seed),
        eval_dataset=problem.train,  # never read: the problem evaluates itself, but the Trainer wants one
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=callbacks,
        run=run,
        topology=topology,
        progress=ProgressBar(density_of(sparse) if sparse and moving is None else None),
        problem=problem,
    )
    trainer.on_nonfinite = config.on_nonfinite
    finished = trainer.train_on(checkpoint)
    kept = None
    if config.transform is not None and topology is not None and topology.updater is not None:
        kept = topology.updater.coverage
    sparse = [layer for _, layer in named_sparse_layers(model)]
    found, seconds = last_evaluation(run, trainer.state.global_step)
    return FinetuneResult(
        path=run.path,
        finished=finished,
        step=trainer.state.global_step,
        steps=steps,
        seconds=seconds,
        main_metric=problem.main_metric,
        metrics=found,
        density=kept if kept is not None else density_of(sparse) if sparse else 1.0,
        stored_bytes=stored_bytes(model),
        dense_bytes=dense_bytes(model),
    )


def last_evaluation(run: RunDirectory, step: int) -> tuple[dict[str, float] | None, float]:
    """Held-out metrics at ``step`` from the run's log, and the seconds of training until then."""
    for line in reversed(run.read_metrics()):
        found = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        if found and line["step"] == step:
            return found, line["seconds"]
    return None, 0.0


def _model(config: FinetuneConfig, problem: Problem, method: Method) -> Any:
    set_seed(config.seed)
    changes = dict(problem.changes)
    if config.dropout is not None:
        changes |= {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    model: Any = load_saved(config.model, problem.model_class, **changes).train()
    sparse = any(True for _ in named_sparse_layers(model))
    if sparse and config.density is not None:
        raise RegrowError(f"{config.model} is sparse already; --density is for dense models")
    if sparse and config.transform is not None:
        raise RegrowError(f"{config.model} is sparse already; --sparsify {config.sparsify} is for dense models")
    if not sparse and config.topology != "fixed" and config.density is None:
        raise RegrowError(
            f"{config.model} is dense, and topology={config.topology!r} is for sparse models; give --density"
        )
    if sparse and config.topology == "dense":
        densify(model)
    if config.transform is not None:
        _transform(model, config, method)
    elif config.density is not None:
        start = config.density if config.sparsify == "oneshot" else 1.0
        sparsify(model, density=start, block_size=config.block_size, include=f"*{ENCODER}", init="magnitude")
    return fuse(model, Fusions.named(config.fuse))


def _transform(model: Any, config: FinetuneConfig, method: Method) -> None:
    """Have the encoder's layers multiply by what the method makes of their weights."""
    if not isinstance(method, WeightTransform) or method.name != config.transform:
        raise RegrowError(f"sparsify={config.sparsify!r} needs that method, not {method.name!r}")
    if method.pattern is not None and config.density is not None:
        n, m = method.pattern
        raise RegrowError(f"sparsify={config.sparsify!r} keeps {n} of every {m} weights; drop --density")
    encoder = f"*{ENCODER}"
    if method.frozen:
        for part in (model.base_model.embeddings, model.base_model.encoder):
            part.requires_grad_(False)
    transform_linears(
        model, method, density=config.density, block_size=config.block_size, include=encoder, seed=config.seed
    )


def _moving(config: FinetuneConfig, method: Method) -> Method | None:
    """The method by which the pattern moves, if it does."""
    if config.transform is not None:
        return method
    if config.density is not None and config.sparsify == "gradual":
        return create("gmp", final_density=config.density)
    return method if config.topology == "dynamic" else None


def _optimizer(config: FinetuneConfig, model: Any) -> torch.optim.Optimizer:
    hidden = model.config.hidden_size
    rate = config.learning_rate or next(rate for most, rate in _RATES if hidden <= most)
    return AdamW(parameter_groups(model, config.weight_decay), lr=rate, betas=(0.9, 0.999), eps=1e-6)
