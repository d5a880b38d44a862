"""Timing that survives a shared machine: candidates take turns, and medians are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import TypeVar

Task = Callable[[], object]
Name = TypeVar("Name")


def interleaved_medians(
    tasks: Mapping[Name, Task],
    *,
    rounds: int,
    warm_up: int = 2,
    untimed: int = 0,
    wait: Task = lambda: None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[Name, float]:
    """Median seconds of each task over ``rounds``; in every round each runs once, in turn.

    A machine whose speed drifts then slows all of them alike, and ratios of the medians hold. With ``untimed`` a task
    is called so often right before its call is timed: then the caches hold what is its own, and not the others'.
    ``wait`` is called before either look at the clock: until a device has done what it was told.

    Example:
        >>> calls = []
        >>> medians = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
        >>> "".join(calls), sorted(medians)
        ('abababab', ['a', 'b'])
    """
    seconds: dict[Name, list[float]] = {name: [] for name in tasks}
    for number in progress(range(warm_up + rounds)):
        for name, task in tasks.items():
            for _ in range(untimed):
                task()
            wait()
            started = time.perf_counter()
            task()
            wait()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(times) for name, times in seconds.items()}
