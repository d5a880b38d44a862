"""The options of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from regrow.bert.options import PRECISION_HELP, Precision, TrainingOptions
from regrow.bert.tasks.task import task_named
from regrow.errors import RegrowError
from regrow.methods import WeightTransform, available, method_class
from regrow.topology.distribution import check_density
from regrow.training import UpdateSchedule
from regrow.training.finite import OnNonfinite
from regrow.training.schedule import Decay

MAY_CHANGE = ("on_nonfinite",)
"""Options that a resumed run may be given anew."""


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class FinetuneConfig(TrainingOptions):
    """Everything that decides a fine-tuning run; the command line's flags are made from these fields."""

    model: str = _option("runs/pretrain", "what to start from: a run, or a folder with a saved model, sparse or dense")
    task: str = _option(
        "classification",
        "sst2, cola, mrpc, qqp, stsb, mnli, qnli, rte, wnli (GLUE), squad (v1.1), or classification or regression of "
        "columns that you name",
    )
    data: str | None = _option(
        None,
        "folder with train.* and dev.* files (.tsv, .csv, .jsonl; .json for squad; also packed), or a hub data set; "
        "by default the hub's, for tasks of GLUE",
    )
    train_data: str | None = _option(None, "file to train on, instead of the one in --data")
    dev_data: str | None = _option(None, "file to evaluate on, instead of the one in --data")
    text_columns: str = _option("", "one column of text or two with a comma between, for classification and regression")
    label_column: str | None = _option(None, "column of labels or scores, for classification and regression")
    output: str = _option("runs/finetune", "run directory; must be new or empty unless --resume")
    topology: Literal["fixed", "dynamic", "dense"] = _option(
        "fixed",
        "a sparse model's pattern: stays, keeps moving by --method, or is given up first (absent weights become 0)",
    )
    density: float | None = _option(
        None, "make a dense model so sparse, keeping the strongest blocks; a sparse one has its density"
    )
    block_size: int = _option(16, "edge of a block for --density: 1, 4, 8, 16, 32 or 64")
    sparsify: str = _option(
        "oneshot",
        "how a dense model becomes sparse: oneshot reaches --density before training, gradual from all blocks along a "
        "cubic over three quarters of it (gmp); or a method that transforms dense weights, as srste or maskllm, whose "
        "options are listed below",
    )
    method: str = _option("dynsparse", "how the pattern moves with --topology dynamic; its options are listed below")
    epochs: float = _option(3.0, "passes over the training examples")
    batch_size: int = _option(32, "examples in a step")
    learning_rate: float | None = _option(
        None, "peak learning rate; by default 3e-4 up to 256 hidden units, 1e-4 up to 512, else 3e-5"
    )
    warmup: float = _option(0.1, "share of the steps over which the learning rate rises; then it falls to 0")
    weight_decay: float = _option(0.01, "decoupled decay of weights; biases and norms never decay")
    max_grad_norm: float = _option(1.0, "clip the global gradient norm; 0 is off")
    on_nonfinite: OnNonfinite = _option(
        "stop", "where a gradient is not finite: stop with a checkpoint, or skip the step"
    )
    dropout: float | None = _option(None, "by default as the model says")
    fuse: str = _option("all", "fused operations: all, none, or some of attention,norm,ffn,qkv,unpad")
    precision: Precision = _option("float32", PRECISION_HELP)
    max_length: int | None = _option(
        None, "tokens of an example; by default 128, or 384 for squad, if the model has so many positions"
    )
    stride: int = _option(128, "context tokens from one window's start to the next's, for squad")
    query_length: int = _option(64, "longer questions lose their end, for squad")
    n_best: int = _option(20, "candidates for an answer, for squad")
    max_answer_length: int = _option(30, "tokens of an answer, for squad")
    n_updates: int | None = _option(None, "segments between topology updates; by default one in 50 steps, at most 160")
    drop_fraction: float = _option(0.1, "share of blocks the first update moves")
    decay: Decay = _option("cosine", "how that share falls to 0 over training")
    final_fraction: float = _option(0.0, "what that share falls to instead of 0")
    stop_updates: float = _option(1.0, "share of the training after which the pattern rests")
    eval_steps: int | None = _option(None, "evaluate every so many steps; by default after every epoch")
    save_steps: int = _option(500, "write a checkpoint every so many steps")
    keep_checkpoints: int = _option(1, "how many checkpoints to keep")
    logging_steps: int = _option(10, "write metrics every so many steps")
    report_to: str = _option(
        "none", "trackers that get every metric, by transformers' names: none, tensorboard, wandb, ...; comma-separated"
    )
    seed: int = _option(0, "of the new head, data order, dropout and updates")

    def check(self) -> None:
        """Raise :class:`RegrowError` for a value no run can use, before anything is read or written."""
        if not 0 < self.epochs < 1e6:
            raise RegrowError(f"epochs must be positive, got {self.epochs}")
        self._check_transform()
        if self.density is not None:
            check_density(self.density)
        elif self.sparsify == "gradual":
            raise RegrowError("sparsify='gradual' needs --density, which it is to reach")
        if self.sparsify == "gradual" and self.n_updates is not None and self.n_updates < 4:
            raise RegrowError(f"sparsify='gradual' needs at least 4 updates, got n_updates={self.n_updates}")
        if self.sparsify == "gradual" and self.topology != "fixed":
            raise RegrowError(f"sparsify='gradual' moves the pattern itself; drop --topology {self.topology}")
        if self.density is not None and self.topology == "dense":
            raise RegrowError("density makes the model sparse and topology='dense' gives it up again; drop one of both")
        self.check_training(100)
        if self.task != "squad":
            task_named(self.task, self.columns, self.label_column)
        elif self.text_columns or self.label_column:
            raise RegrowError("text_columns and label_column are for --task classification or regression, not squad")

    @property
    def transform(self) -> str | None:
        """The method that transforms the weights of a dense model, if ``sparsify`` names one."""
        return None if self.sparsify in ("oneshot", "gradual") else self.sparsify

    def _check_transform(self) -> None:
        if self.transform is None:
            if self.topology == "dynamic" and method_class(self.method).dense_layout:
                raise RegrowError(
                    f"method {self.method!r} trains dense weights, and topology='dynamic' moves blocks of a sparse "
                    "model; choose another method"
                )
            return
        known = [name for name in available() if issubclass(method_class(name), WeightTransform)]
        if self.transform not in known:
            raise RegrowError(f"sparsify must be oneshot, gradual or one of {', '.join(known)}, got {self.sparsify!r}")
        if self.topology != "fixed":
            raise RegrowError(f"sparsify={self.sparsify!r} is for dense weights; drop --topology {self.topology}")

    def schedule_over(self, steps: int) -> UpdateSchedule:
        """As in every training, but gradual pruning takes at least 20 steps down where there are so many."""
        if self.sparsify == "gradual" and self.n_updates is None:
            return replace(self, n_updates=min(steps, max(20, steps // 50))).schedule_over(steps)
        return super().schedule_over(steps)

    @property
    def columns(self) -> list[str]:
        """``text_columns`` as a list."""
        return [name.strip() for name in self.text_columns.split(",") if name.strip()]

    def source(self, split: Literal["train", "dev"]) -> str:
        """Where the examples of a split are."""
        given = self.train_data if split == "train" else self.dev_data
        hub = None if self.task == "squad" else task_named(self.task, self.columns, self.label_column).hub
        source = given or self.data or hub
        if source is None:
            raise RegrowError(f"task {self.task} needs --data, a folder with train and dev files, or --{split}_data")
        return source
