"""From run records to the points of the law: mean parameters, tokens, loss."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from regrow.bert.flops import bert_skeleton
from regrow.bert.output import new_output
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.sizes import bert_config, size_named
from regrow.entries import listed
from regrow.errors import RegrowError
from regrow.methods import Method
from regrow.nn import named_sparse_layers
from regrow.study.analysis import best_learning_rates, configurations
from regrow.study.law import Law, LawFit, distinct, fit_law
from regrow.study.runs import Run, number
from regrow.study.spec import RunSpec
from regrow.training import mean_density

_COLUMNS = ("id", "method", "size", "mean_density", "mean_parameters", "tokens", "loss", "law")


@dataclass(frozen=True)
class LawPoint:
    """A run as the law sees it.

    Args:
        run: its record.
        density: share of the encoder's linear weights that exist, mean over the steps.
        parameters: that many weights, ``N``.
        tokens: ``D``, real ones trained on.
        loss: held-out masked-word loss, in nats.
    """

    run: Run
    density: float
    parameters: float
    tokens: float
    loss: float


def average_density(config: PretrainConfig, method: Method) -> float | None:
    """Share of the encoder's linear weights that exist, mean over the steps of a run; ``None`` if nobody can know.

    Exact at the start of the run, where layers have whole blocks (in the first example 2 of 16, and 6 of 64), and along
    the method's own plan from there: :func:`regrow.training.mean_density`.

    Example:
        >>> from regrow.methods import create
        >>> round(average_density(PretrainConfig(size="2/64", density=0.1, block_size=16), create("static")), 4)
        0.1042
        >>> gmp = create("gmp", final_density=0.25, begin=0.0, end=0.1)
        >>> average_density(PretrainConfig(size="tiny", density=1.0, steps=100, n_updates=10), gmp)
        0.325
    """
    if config.dense:
        return 1.0
    start = _density_at_start(config.size, config.density, config.block_size, config.distribution)
    return mean_density(method, config.schedule, start)


@cache  # a study asks for many runs of few shapes
def _density_at_start(size: str, density: float, block_size: int, distribution: str) -> float:
    """With layers of whole blocks."""
    shape = bert_config(size, vocab_size=1, max_length=1)
    densities = PretrainConfig(distribution=distribution).densities
    model = bert_skeleton(shape, density=density, block_size=block_size, distribution=densities)
    weights = sum(layer.topology.n_blocks * block_size**2 for _, layer in named_sparse_layers(model))
    return weights / size_named(size).encoder_weights


def law_points(runs: Iterable[Run]) -> tuple[list[LawPoint], list[str]]:
    """The points of runs, and a line for each kind of run that gives none.

    Of runs that differ in nothing but the learning rate (and the seed) those of the best rate are taken, all seeds.

    Raises:
        RegrowError: runs that were not trained and evaluated on the same text, whose losses cannot be compared.
    """
    runs = list(runs)
    usable = [run for run in runs if run.loss is not None and run.loss > 0]
    reasons = Counter({"no loss: the run diverged": len(runs) - len(usable)})
    _check_one_task(usable)
    tuned = [run for best in best_learning_rates(configurations(usable)) for run in best.best.runs]
    reasons["another learning rate was better"] = len(usable) - len(tuned)
    points = []
    for run in tuned:
        tokens, loss = number(run.record, "tokens"), run.loss
        try:
            spec = _spec(run)
            density = average_density(spec.config, spec.method)
        except RegrowError as error:
            reasons[f"a configuration this regrow does not know ({error})"] += 1
            continue
        if density is None:
            reasons[f"method {run.method!r} does not say how dense it is on the mean"] += 1
        elif not tokens or tokens < 0 or loss is None:
            reasons["no number of tokens"] += 1
        else:
            weights = size_named(spec.config.size).encoder_weights
            points.append(LawPoint(run, density, density * weights, tokens, loss))
    return points, [f"{count} of {len(runs)} runs, {reason}" for reason, count in reasons.items() if count]


def _spec(run: Run) -> RunSpec:
    return RunSpec({name: value for name, value in run.config.items() if name != "output"})


def _check_one_task(runs: Sequence[Run]) -> None:
    for run in runs:
        first, other = dict(runs[0].task), dict(run.task)
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise RegrowError(
                    f"runs {runs[0].id} and {run.id} differ in {name} ({first.get(name)} and {other.get(name)}), so "
                    "their losses cannot be compared; give records of one task"
                )


@listed(
    "tool",
    "scaling-law",
    paper="Jin et al., The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling "
    "Laws",
    year=2025,
    link="https://arxiv.org/abs/2501.12486",
    always_sparse=True,
    command="regrow study fit STUDY",
    does="The loss of many runs as a law of the tokens and of the encoder weights that there were on average.",
)
def fit_points(points: Sequence[LawPoint], **options: Any) -> LawFit:
    """:func:`regrow.study.law.fit_law` of points; ``options`` are its."""
    columns = ([getattr(point, name) for point in points] for name in ("parameters", "tokens", "loss"))
    return fit_law(*columns, **options)


def describe_fit(fit: LawFit, points: Sequence[LawPoint]) -> str:
    """The parameters with their intervals, and what they were fitted to."""
    import numpy as np

    n, d = (np.array([getattr(point, name) for point in points]) for name in ("parameters", "tokens"))
    lines = [
        f"L = E + A / N^alpha + B / D^beta, from {fit.n} runs",
        f"N: {distinct(n)} different numbers of mean active encoder weights, {n.min():.4g} to {n.max():.4g}",
        f"D: {distinct(d)} different numbers of tokens, {d.min():.4g} to {d.max():.4g}",
    ]
    for f, value in zip(fields(Law), astuple(fit.law), strict=True):
        interval = fit.intervals.get(f.name)
        shown = "" if interval is None else f"  [{interval[0]:.4g}, {interval[1]:.4g}]"
        lines.append(f"{f.name:6} {value:10.4g}{shown}")
    if fit.intervals:
        lines.append(f"in brackets: 95 % of {fit.resamples} fits to runs drawn anew")
    lines.append(f"root mean square of log L minus the law's: {fit.residual:.4g}")
    return "\n".join(lines)


def write_points(points: Sequence[LawPoint], law: Law, output: str | Path) -> None:
    """Write the points as a CSV file, with the loss that the law gives to each.

    Raises:
        RegrowError: the file exists, or cannot be written.
    """
    with new_output(output) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        for p in points:
            given = float(law(p.parameters, p.tokens))
            shown = (p.run.method, p.run.size, p.density, p.parameters, p.tokens, p.loss, given)
            table.writerow([p.run.id, *(f"{x:.6g}" if isinstance(x, float) else x for x in shown)])
