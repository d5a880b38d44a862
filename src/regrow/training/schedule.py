"""When a topology is updated, and how much of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from regrow.errors import RegrowError

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class UpdateSchedule:
    r"""``total_steps`` are cut into ``n_updates`` equal segments with one update between neighbours.

    So there are ``n_updates - 1`` updates and none after the last segment; ``n_updates`` is the paper's ``n``.
    At step ``t`` an update moves the fraction

    .. math:: pr(t) = pr \cdot \tfrac12 (1 + \cos(\pi t / T))

    of the blocks of every tensor (``decay="cosine"``; ``"linear"`` falls straight to 0, ``"constant"`` stays).

    Args:
        total_steps: optimizer steps ``T``.
        n_updates: number of segments, ``1 <= n_updates <= total_steps``.
        drop_fraction: ``pr``, in [0, 1].
        final_fraction: what the fraction falls to instead of 0; SMET uses .005.
        stop: share of the training after which the topology rests, and over which the fraction falls; RigL uses .75.

    Example:
        >>> schedule = UpdateSchedule(total_steps=100, n_updates=4, drop_fraction=0.5)
        >>> [(t, round(schedule.fraction(t), 3)) for t in range(1, 101) if schedule.is_update(t)]
        [(25, 0.427), (50, 0.25), (75, 0.073)]

    Reference: Dietrich et al. 2021, arXiv 2108.06277, section 2, Algorithm 1.
    """

    total_steps: int
    n_updates: int
    drop_fraction: float = 0.5
    decay: Decay = "cosine"
    final_fraction: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise RegrowError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 1 <= self.n_updates <= self.total_steps:
            raise RegrowError(f"n_updates must lie between 1 and total_steps={self.total_steps}, got {self.n_updates}")
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise RegrowError(f"drop_fraction must lie in [0, 1], got {self.drop_fraction}")
        if not 0.0 <= self.final_fraction <= self.drop_fraction:
            raise RegrowError(
                f"final_fraction must lie in [0, drop_fraction={self.drop_fraction}], got {self.final_fraction}"
            )
        if not 0.0 < self.stop <= 1.0:
            raise RegrowError(f"stop is a share of the training in (0, 1], got {self.stop}")
        if self.decay not in ("cosine", "linear", "constant"):
            raise RegrowError(f"decay must be 'cosine', 'linear' or 'constant', got {self.decay!r}")

    def is_update(self, step: int) -> bool:
        """Whether the topology changes after optimizer step ``step`` (the first step is 1)."""
        inside = 0 < step < self.total_steps and step <= self.stop * self.total_steps
        return inside and self._segment(step) > self._segment(step - 1)

    def fraction(self, step: int) -> float:
        """Share of blocks an update after ``step`` moves."""
        progress = min(max(step / (self.stop * self.total_steps), 0.0), 1.0)
        falls = {"cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "linear": 1.0 - progress, "constant": 1.0}
        return self.final_fraction + (self.drop_fraction - self.final_fraction) * falls[self.decay]

    def _segment(self, step: int) -> int:
        return step * self.n_updates // self.total_steps
