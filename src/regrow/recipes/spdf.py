"""SPDF, sparse pre-training and dense fine-tuning. Its fine-tuning is dense, so not always sparse."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from regrow.bert.finetune import finetune
from regrow.bert.finetune_config import FinetuneConfig
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.run import RunDirectory
from regrow.bert.tasks.load import check_data
from regrow.errors import RegrowError
from regrow.methods import Method, create
from regrow.nn.options import LayerOption
from regrow.recipes.base import (
    RecipeFolder,
    clear_unbegun,
    loss_of,
    option,
    pretraining,
    recipe,
    say,
    stopped,
    train_stage,
)

PREFIX = "finetune_"
"""Before the names of the fine-tuning's options: most of them are names of the pre-training's too."""
_DECIDED = {
    "model",
    "output",
    "topology",
    "density",
    "block_size",
    "sparsify",
    "method",
    "fuse",
    "on_nonfinite",
    "report_to",
    "n_updates",
    "drop_fraction",
    "decay",
    "final_fraction",
    "stop_updates",
}
"""Options of a fine-tuning that the recipe decides, or that it takes from the pre-training."""
_SHARED = ("on_nonfinite", "report_to")


@dataclass(frozen=True)
class _Pretraining(PretrainConfig):
    output: str = option("runs/spdf", "folder for both trainings; must be new or empty unless --resume")
    density: float = option(0.25, "share of encoder blocks that the pre-training has; the paper's are 0.5 and 0.25")
    method: str = option("static", "how the pattern moves in pre-training; in the paper it stays")

    @property
    def finetuning(self) -> FinetuneConfig:
        """The options of the fine-tuning."""
        path = Path(self.output)
        given = {of.name: getattr(self, PREFIX + of.name) for of in fields(FinetuneConfig) if of.name not in _DECIDED}
        shared: dict[str, Any] = {name: getattr(self, name) for name in _SHARED}
        fuse = ",".join(name for name in self.fuse.split(",") if name != "loss") or "none"
        places: dict[str, Any] = {
            "model": str(path / "pretrain"),
            "output": str(path / "finetune"),
            "topology": "dense",
        }
        return FinetuneConfig(**given, **shared, **places, fuse=fuse)

    def check(self) -> None:
        """Raise :class:`RegrowError` for a value that one of the trainings cannot use."""
        super().check()
        if self.dense:
            raise RegrowError("spdf pre-trains a sparse model; leave --dense out")
        try:
            self.finetuning.check()
        except RegrowError as error:
            raise RegrowError(f"{error} (options of the fine-tuning begin with --{PREFIX})") from None


def _finetune_fields() -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(FinetuneConfig)
    found = []
    for of in fields(FinetuneConfig):
        if of.name not in _DECIDED:
            default = "sst2" if of.name == "task" else of.default
            meaning = of.metadata["help"].replace("--", f"--{PREFIX}")
            found.append((PREFIX + of.name, hints[of.name], option(default, meaning)))
    return found


SpdfConfig: Any = dataclasses.make_dataclass(
    "SpdfConfig", _finetune_fields(), bases=(_Pretraining,), frozen=True, namespace={"__module__": __name__}
)
"""Options of a pre-training, and those of a fine-tuning with ``finetune_`` before each name."""


@dataclass(frozen=True)
class SpdfResult:
    """What the two trainings came to; ``loss`` is the held-out MLM loss in nats, before fine-tuning."""

    path: Path
    density: float | None = None
    loss: float | None = None
    metric: str | None = None
    score: float | None = None
    where: str | None = None

    @property
    def finished(self) -> bool:
        """Whether both are done."""
        return self.where is None

    def __str__(self) -> str:
        lines = []
        if self.density is not None:
            loss = "-" if self.loss is None else f"{self.loss:.4f}"
            lines.append(f"pre-trained at density {self.density:.4g}: held-out MLM loss {loss}")
        if self.score is not None:
            lines.append(f"fine-tuned dense: held-out {self.metric} {self.score:.4f}")
        if self.where is not None:
            lines.append(stopped("spdf", self.path, self.where))
        else:
            lines.append(f"models: {self.path}/pretrain, sparse, and {self.path}/finetune, dense")
        return "\n".join(lines)


@recipe(
    "spdf",
    SpdfConfig,
    paper="Thangarasa et al., SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models",
    year=2023,
    link="https://arxiv.org/abs/2303.10464",
    always_sparse=False,
    example="--data corpus.txt --density 0.25 --steps 1000 --finetune-task sst2 --finetune-data glue/SST-2 "
    "--output runs/spdf",
    passed_on=PREFIX,
)
def spdf(config: Any, method: Method, layer: LayerOption, *, resume: bool = False) -> SpdfResult:
    """Pre-train sparse, then give absent weights their place at zero and fine-tune all of them on a task.

    Sparsity saves where the work is, in pre-training; the fine-tuned model is dense. Densifying changes nothing that
    the model computes: an absent weight is a zero. Options of the fine-tuning are those of ``regrow finetune`` with
    ``--finetune-`` before their names.

    Args:
        config: a ``SpdfConfig``.
        method: of the pre-training; ``static`` in the paper.
        layer: what stands in the place of linear layers.
        resume: go on in ``config.output``; a finished training is not repeated.

    Raises:
        RegrowError: an argument or a file cannot be used. Nothing that exists is overwritten.
    """
    config.check()
    if method.dense_layout:
        raise RegrowError(
            f"spdf pre-trains a sparse model, and method {method.name!r} trains a dense one; choose another"
        )
    if not resume:
        check_data(config.finetuning)  # rather now than after the pre-training
    folder = RecipeFolder(config.output)
    folder.begin(config, method, layer, resume=resume)
    pretrained = folder.result("pretrain", ("density", "loss"))
    if pretrained is None:
        result = train_stage(pretraining(config, output=str(folder.path / "pretrain")), method, layer)
        if not result.finished:
            return SpdfResult(folder.path, where="pre-training")
        pretrained = {"density": result.density, "loss": loss_of(result)}
        folder.record("pretrain", pretrained)
    finetuned = folder.result("finetune", ("metric", "score"))
    if finetuned is None:
        of_task = config.finetuning
        say(f"fine-tuning on {of_task.task}, dense")
        run = RunDirectory(of_task.output)
        clear_unbegun(run)
        tuned = finetune(of_task, create("static"), resume=run.begun)
        if not tuned.finished:
            return SpdfResult(folder.path, **pretrained, where="fine-tuning")
        finetuned = {"metric": tuned.main_metric, "score": (tuned.metrics or {}).get(tuned.main_metric)}
        folder.record("finetune", finetuned)
    return SpdfResult(folder.path, **pretrained, **finetuned)
