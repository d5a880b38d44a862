"""Random search over patterns: how much does it matter which blocks exist, if they stay? Always sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from regrow.bert.pretrain import PretrainConfig
from regrow.errors import RegrowError
from regrow.methods import Method
from regrow.nn.options import LayerOption
from regrow.recipes.base import RecipeFolder, in_columns, option, recipe, stopped
from regrow.study.pareto import estimate
from regrow.study.record import RunRecord
from regrow.study.runner import run_study
from regrow.study.spec import Study


@dataclass(frozen=True)
class RandomSearchConfig(PretrainConfig):
    """Options of a random search, beside those of its pre-trainings."""

    output: str = option("runs/random-search", "folder for all trainings; must be new or empty unless --resume")
    method: str = option("static", "static: a pattern stays as it was drawn")
    topologies: int = option(8, "how many random patterns to train; --pattern-seed is that of the first, by default 0")
    jobs: int = option(1, "trainings at a time")
    threads: int | None = option(None, "of each; by default the cores shared out")
    keep_models: bool = option(False, "keep the trained models; otherwise only their records")

    def check(self) -> None:
        super().check()
        if self.dense or self.method != "static":
            raise RegrowError("random-search trains patterns that stay: leave --method and --dense out")
        if self.topologies < 2:
            raise RegrowError(f"topologies must be at least 2, or there is no spread, got {self.topologies}")
        for name in ("jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RegrowError(f"{name} must be at least 1, got {value}")

    def study_of(self, layer: LayerOption) -> Study:
        """The trainings: one for each pattern."""
        first = self.pattern_seed or 0
        options = {of.name: getattr(self, of.name) for of in fields(PretrainConfig) if of.name != "output"}
        options |= asdict(layer)  # type: ignore[call-overload]
        seeds = list(range(first, first + self.topologies))
        return Study("random-search", defaults=options, experiments=[{"pattern_seed": seeds}])


@dataclass(frozen=True)
class RandomSearchResult:
    """Held-out MLM losses in nats, by the seed of the pattern, of all trainings that have ended."""

    path: Path
    losses: Sequence[tuple[int, float | None]]
    finished: bool

    @property
    def spread(self) -> dict[str, float]:
        """``mean``, ``std`` (with ``n - 1``), ``min`` and ``max`` of the losses that are numbers; empty if none is."""
        known = [loss for _, loss in self.losses if loss is not None]
        if not known:
            return {}
        found = estimate(known)
        return {"mean": found.mean, "std": found.deviation or 0.0, "min": min(known), "max": max(known)}

    def __str__(self) -> str:
        rows = [[str(seed), "-" if loss is None else f"{loss:.4f}"] for seed, loss in self.losses]
        rows += [[name, f"{value:.4f}"] for name, value in self.spread.items()]
        text = in_columns(["pattern seed", "held-out MLM loss"], rows)
        if not self.finished:
            return f"{text}\n{stopped('random-search', self.path, f'a training, {len(self.losses)} are finished')}"
        return f"{text}\nrecords: {self.path}/records, for regrow report"


@recipe(
    "random-search",
    RandomSearchConfig,
    paper="Evci et al., Rigging the Lottery (its static baseline, many times)",
    year=2020,
    link="https://arxiv.org/abs/1911.11134",
    always_sparse=True,
    example="--data corpus.txt --density 0.1 --steps 1000 --topologies 8 --output runs/random-search",
)
def random_search(
    config: RandomSearchConfig, method: Method, layer: LayerOption, *, resume: bool = False
) -> RandomSearchResult:
    """Train many random patterns that stay, and say how far their losses lie apart: what a rule for growth must beat.

    Only the pattern differs. ``--seed`` decides everything else and is the same for all: the initial value at each
    position of a weight, whether a pattern has that position or not, all dense parameters, the order of the data, the
    masked words and dropout. A rule whose loss lies within the spread has not shown that its choice of blocks matters.
    To compare, train it with the same ``--seed`` and ``--pattern-seed``: it then begins from the same model.

    Args:
        config: see the fields of :class:`RandomSearchConfig`.
        method: ``static``.
        layer: what stands in the place of linear layers.
        resume: go on in ``config.output``; finished trainings are not repeated.

    Raises:
        RegrowError: an argument or a file cannot be used, or a training failed. Nothing that exists is overwritten.
    """
    config.check()
    folder = RecipeFolder(config.output)
    study = config.study_of(layer)
    runs = study.runs()
    folder.begin(config, method, layer, resume=resume)
    done = run_study(study, folder.path, workers=config.jobs, threads=config.threads, keep_models=config.keep_models)
    if failed := done.count("failed"):
        raise RegrowError(f"{failed} of {len(runs)} trainings failed, see above; put it right and go on with --resume")
    losses = []
    for run in runs:
        record = folder.path / "records" / f"{run.id}.json"
        if record.exists():
            losses.append((_seed(run.full), RunRecord.load(record).final.get("eval_mlm_loss")))
    return RandomSearchResult(folder.path, losses, done.complete)


def _seed(options: dict[str, Any]) -> int:
    return int(options["pattern_seed"])
