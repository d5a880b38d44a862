"""What several claims ask of the configurations."""

from __future__ import annotations

from collections.abc import Iterable

from regrow.study.analysis import Configuration


def sparse(best: Iterable[Configuration], *methods: str) -> list[Configuration]:
    """Sparse configurations, of these methods or of any."""
    return [c for c in best if not c.first.dense and (not methods or c.get("method") in methods)]


def by_flops(found: Iterable[Configuration]) -> list[Configuration]:
    """In ascending FLOPs."""
    return sorted(found, key=lambda c: (c.flops or 0.0, c.first.family))


def mean_loss(c: Configuration) -> float:
    """To rank by; without a loss, last."""
    return c.loss.mean if c.loss else float("inf")


def best_of_each(found: Iterable[Configuration]) -> list[Configuration]:
    """The lowest mean loss of each method, size and length of training: other settings were other questions."""
    lowest: dict[object, Configuration] = {}
    for c in sorted(found, key=mean_loss):
        lowest.setdefault((c.get("method"), c.get("size"), c.get("steps"), c.first.task), c)
    return list(lowest.values())


def same(a: Configuration, b: Configuration, *names: str) -> bool:
    """Whether two train the same task with the same values of these options."""
    return a.first.task == b.first.task and all(a.get(name) == b.get(name) for name in names)
