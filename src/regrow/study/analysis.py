"""From runs to comparisons: seeds together, the best learning rate, pairs of the same seed, the dense family.

Two configurations are compared seed by seed where they share seeds: what the seeds have in common, above all the data
and its masks, is gone from the difference. Against the dense family, the dense runs of each seed are interpolated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regrow.study.pareto import Estimate, Point, estimate, loss_at, pareto_frontier, reduction_at_equal_loss
from regrow.study.runs import RATE_RULE, TRAINING_FIELDS, Key, Run


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but the seed."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Any of them, to ask for what they share."""
        return self.runs[0]

    @cached_property
    def losses(self) -> dict[int, float]:
        """Held-out MLM loss by seed; runs without one are left out."""
        return {run.seed: run.loss for run in self.runs if run.loss is not None}

    @cached_property
    def loss(self) -> Estimate | None:
        """Over seeds; ``None`` if no run has a loss."""
        return estimate(list(self.losses.values())) if self.losses else None

    @cached_property
    def flops(self) -> float | None:
        """Of one training."""
        return _mean(run.flops for run in self.runs)

    @cached_property
    def seconds(self) -> float | None:
        """Of one training, mean over seeds; ``None`` if they ran on machines that differ."""
        return _mean(run.seconds for run in self.runs) if self.machine is not None else None

    @cached_property
    def machine(self) -> str | None:
        """What all of them ran on; ``None`` if that differs."""
        machines = {run.machine for run in self.runs}
        return machines.pop() if len(machines) == 1 else None

    @cached_property
    def coverage(self) -> float | None:
        """Mean over seeds, at the end."""
        return _mean(run.coverage for run in self.runs)

    @cached_property
    def fresh_removed(self) -> float | None:
        """Mean over seeds."""
        return _mean(run.fresh_removed for run in self.runs)

    @property
    def sparsity(self) -> float:
        """1 - density, without the noise of the subtraction."""
        return round(1 - self.get("density"), 6)

    def get(self, name: str) -> Any:
        """A value of the shared configuration; what the run resolves itself comes resolved."""
        resolved = {"learning_rate", "n_updates", "method", "density", "block_size", "size", "dropout"}
        return getattr(self.first, name) if name in resolved else self.first.config.get(name)

    def key_without(self, *names: str) -> Key:
        """The configuration's key but for some names: what stays the same along an axis."""
        return tuple((name, value) for name, value in self.first.key if name not in names)

    def point(self, cost: str) -> Point | None:
        """``(cost, mean loss)`` with ``flops`` or ``seconds`` as cost."""
        value = getattr(self, cost)
        return None if value is None or not value > 0 or self.loss is None else (value, self.loss.mean)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def configurations(runs: Iterable[Run]) -> list[Configuration]:
    """Runs grouped over seeds, in the order they first appear.

    Example:
        >>> def run(seed, rate):
        ...     return Run({"id": f"{seed}{rate}", "config": {"dense": True, "seed": seed, "learning_rate": rate}})
        >>> [len(c.runs) for c in configurations([run(0, 1e-3), run(0, 2e-3), run(1, 1e-3)])]
        [2, 1]
    """
    groups: dict[Key, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.key].append(run)
    return [Configuration(tuple(group)) for group in groups.values()]


@dataclass(frozen=True)
class Tuned:
    """The best of some learning rates; ``at_edge`` says that a better one may lie outside those tried."""

    best: Configuration
    tried: tuple[float, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of at least two."""
        return len(self.tried) > 1 and self.best.get("learning_rate") in (min(self.tried), max(self.tried))


def best_learning_rates(found: Sequence[Configuration]) -> list[Tuned]:
    """For configurations that differ only in learning rate, the one of the lowest mean loss; those without loss go.

    A rate that is tried with fewer seeds than another does not win by luck of the draw: among the rates, those with
    the most seeds are looked at first.
    """
    groups: dict[Key, list[Configuration]] = defaultdict(list)
    for configuration in found:
        if configuration.loss is not None:
            groups[configuration.key_without("learning_rate", *RATE_RULE)].append(configuration)
    tuned = []
    for group in groups.values():
        most = max(len(c.losses) for c in group)
        best = min((c for c in group if len(c.losses) == most), key=lambda c: c.loss.mean if c.loss else 0.0)
        rates = {c.first.learning_rate for c in group}
        tuned.append(Tuned(best, tuple(sorted(rate for rate in rates if rate is not None))))
    return tuned


def difference(a: Configuration, b: Configuration) -> Estimate | None:
    """Loss of ``a`` minus that of ``b``: paired by seed where they share one, else of means, without an interval."""
    shared = [seed for seed in a.losses if seed in b.losses]
    if shared:
        return estimate([a.losses[seed] - b.losses[seed] for seed in shared])
    if a.loss is None or b.loss is None:
        return None
    return Estimate(a.loss.mean - b.loss.mean, None, None, 0)


class DenseFamily:
    """Dense models of all sizes that trained on the same task for as long as a configuration.

    Args:
        tuned: the best configurations at hand, sparse ones too.
        like: the configuration to compare with.
    """

    def __init__(self, tuned: Iterable[Configuration], like: Configuration) -> None:
        self.like = like
        self.members = [c for c in tuned if c.first.dense and _setting(c) == _setting(like)]

    def points(self, cost: str, seed: int | None = None) -> list[Point]:
        """A point per member, of the mean loss or that of one seed; seconds only of the same machine."""
        found = []
        for member in self.members:
            point = member.point(cost)
            if point is None or (cost == "seconds" and member.machine != self.like.machine):
                continue
            if seed is None:
                found.append(point)
            elif seed in member.losses:
                found.append((point[0], member.losses[seed]))
        return found

    def difference(self, cost: str = "flops") -> Estimate | None:
        """Loss minus that of the interpolated family at equal cost; ``None`` outside its range."""
        value = getattr(self.like, cost)
        if value is None or not value > 0:
            return None
        per_seed = []
        for seed, loss in self.like.losses.items():
            dense = loss_at(value, self.points(cost, seed))
            if dense is not None:
                per_seed.append(loss - dense)
        if per_seed:
            return estimate(per_seed)
        dense = loss_at(value, self.points(cost))
        return None if dense is None or self.like.loss is None else Estimate(self.like.loss.mean - dense, None, None, 0)

    def loss(self, cost: str = "flops") -> float | None:
        """Of the interpolated family at equal cost."""
        value = getattr(self.like, cost)
        return None if value is None or not value > 0 else loss_at(value, self.points(cost))

    def reduction(self, cost: str = "flops") -> float | None:
        """Share of the family's cost at equal loss."""
        point = self.like.point(cost)
        return None if point is None else reduction_at_equal_loss(point, self.points(cost))

    def eps(self) -> float | None:
        """Seconds per FLOP over those of the dense member of the same size, on the same machine."""
        for member in self.members:
            same = member.get("size") == self.like.get("size") and member.machine == self.like.machine
            values = (self.like.seconds, self.like.flops, member.seconds, member.flops)
            if same and all(value is not None and value > 0 for value in values):
                seconds, flops, dense_seconds, dense_flops = (value or 0.0 for value in values)
                return (seconds / flops) / (dense_seconds / dense_flops)
        return None


def _setting(configuration: Configuration) -> Key:
    names = ("steps", "batch_size")
    return configuration.first.task + tuple((name, str(configuration.get(name))) for name in names)


def frontier_members(found: Sequence[Configuration], cost: str) -> list[Configuration]:
    """Configurations on the Pareto frontier, ascending cost."""
    by_point = {point: c for c in reversed(found) if (point := c.point(cost)) is not None}
    return [by_point[point] for point in pareto_frontier(by_point)]


def along(
    found: Iterable[Configuration],
    *names: str,
    keep: Callable[[Configuration], bool] = lambda _: True,
    methods: bool = False,
) -> list[list[Configuration]]:
    """Groups of at least two configurations that differ in nothing but ``names`` and the learning rate.

    With ``methods`` they may also differ in method and its options.
    """
    groups: Mapping[Key, list[Configuration]] = defaultdict(list)
    rate = ("learning_rate", *RATE_RULE)
    for configuration in found:
        if keep(configuration):
            key = configuration.key_without(*names, *rate)
            if methods:
                key = tuple((name, value) for name, value in key if name in TRAINING_FIELDS - {"method"})
            groups[key].append(configuration)
    return [group for group in groups.values() if len(group) > 1]


def spearman(pairs: Sequence[Point]) -> float | None:
    """Rank correlation of pairs, ties at their mean rank; ``None`` for fewer than three, or a constant side.

    Example:
        >>> spearman([(1, 9), (2, 4), (3, 1)])
        -1.0
    """
    if len(pairs) < 3:
        return None
    x, y = (_ranks([pair[i] for pair in pairs]) for i in (0, 1))
    middle = (len(pairs) - 1) / 2
    spread = (sum((rank - middle) ** 2 for rank in x) * sum((rank - middle) ** 2 for rank in y)) ** 0.5
    return sum((a - middle) * (b - middle) for a, b in zip(x, y, strict=True)) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    return [rank + (sum(other == value for other in values) - 1) / 2 for rank, value in zip(below, values, strict=True)]
