r"""What a point is worth against a family of models: frontiers, equal-loss ratios, intervals over seeds.

A *point* is ``(cost, loss)``; cost is training FLOPs, or seconds. The questions are those of Dietrich et al. 2021
(arXiv 2108.06277): which points are on the frontier (Fig. 3), what share of the FLOPs a sparse model needs for the loss
of the interpolated dense family (section 4), and how much dearer a sparse FLOP may be before the clock takes the gain
away (appendix A.3). The numbers in the examples are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from regrow.entries import listed
from regrow.errors import RegrowError

Point = tuple[float, float]


def pareto_frontier(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats: none is at most as dear and at most as bad, and better in one; ascending cost.

    Equal points are kept once.

    Raises:
        RegrowError: a number is not finite.

    Example:
        >>> pareto_frontier([(1, 3.0), (2, 2.0), (2, 2.5), (3, 2.0), (4, 1.0)])
        [(1, 3.0), (2, 2.0), (4, 1.0)]
    """
    points = list(points)
    if not all(math.isfinite(number) for point in points for number in point):
        raise RegrowError("points must be finite numbers")
    frontier: list[Point] = []
    for cost, loss in sorted(points):
        if not frontier or loss < frontier[-1][1]:
            frontier.append((cost, loss))
    return frontier


def loss_at(cost: float, family: Iterable[Point]) -> float | None:
    r"""Loss of a family at a cost, linear in ``log(cost)`` between neighbours; ``None`` outside its range.

    Members that another member beats are left out first, so that the family is taken at its best.

    Raises:
        RegrowError: a cost is not positive.

    Example:
        >>> dense = [(2.617e9, 2.606), (10.07e9, 2.310), (20.13e9, 2.115)]  # Mini, Small, Medium
        >>> round(loss_at(8.33e9, dense), 2)  # the dense model as dear as Base at s = 0.9; the paper says 2.350
        2.35
        >>> loss_at(1e9, dense) is None
        True
    """
    frontier = _family(family)
    if not cost > 0:
        raise RegrowError(f"cost must be positive, got {cost}")
    if not frontier or not frontier[0][0] <= cost <= frontier[-1][0]:
        return None
    return float(np.interp(math.log(cost), [math.log(c) for c, _ in frontier], [loss for _, loss in frontier]))


def cost_at(loss: float, family: Iterable[Point]) -> float | None:
    """The inverse of :func:`loss_at`: what the family pays for a loss; ``None`` outside its range.

    Example:
        >>> round(cost_at(2.0, [(1.0, 3.0), (100.0, 1.0)]), 6)
        10.0
    """
    frontier = _family(family)
    if not frontier or not frontier[-1][1] <= loss <= frontier[0][1]:
        return None
    losses, costs = [-member[1] for member in frontier], [math.log(member[0]) for member in frontier]
    return math.exp(np.interp(-loss, losses, costs))


def reduction_at_equal_loss(point: Point, family: Iterable[Point]) -> float | None:
    """Cost of the point as a share of what the family pays for its loss; below 1 the point wins.

    With FLOPs as cost this is the paper's reduction in FLOPs, with seconds the same on the clock. ``None`` where
    the family has no such loss.

    Example:
        >>> dense = [(2.617e9, 2.606), (10.07e9, 2.310), (20.13e9, 2.115)]
        >>> round(reduction_at_equal_loss((8.33e9, 2.160), dense), 2)  # Base, s = 0.9, b = 1; the paper says 0.48
        0.49
        >>> round(reduction_at_equal_loss((8.33e9, 2.311), dense), 2)  # b = 16; the paper says 0.83
        0.83
    """
    cost = cost_at(point[1], family)
    return None if cost is None else point[0] / cost


def eps(sparse_seconds: float, sparse_flops: float, dense_seconds: float, dense_flops: float) -> float:
    """Seconds of a sparse FLOP over seconds of a dense one.

    Raises:
        RegrowError: a number is not positive.

    Example:
        >>> eps(3.0, 1e9, 10.0, 5e9)
        1.5
    """
    if not min(sparse_seconds, sparse_flops, dense_seconds, dense_flops) > 0:
        raise RegrowError("eps needs positive seconds and FLOPs")
    return (sparse_seconds / sparse_flops) / (dense_seconds / dense_flops)


def critical_eps(point: Point, family: Iterable[Point]) -> float | None:
    """``F_dense / F_sparse`` at equal loss: with an eps below it the point trains faster than the family.

    Example:
        >>> dense = [(2.617e9, 2.606), (10.07e9, 2.310), (20.13e9, 2.115)]
        >>> round(critical_eps((8.33e9, 2.311), dense), 1)  # b = 16 at Base: appendix A.3
        1.2
    """
    reduction = reduction_at_equal_loss(point, family)
    return None if reduction is None else 1 / reduction


def _family(family: Iterable[Point]) -> list[Point]:
    frontier = pareto_frontier(family)
    if frontier and not frontier[0][0] > 0:
        raise RegrowError("the costs of a family must be positive")
    return frontier


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``half_width`` is that of its confidence interval, ``None`` for a single seed."""

    mean: float
    deviation: float | None
    half_width: float | None
    n: int

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval leaves out zero, else 0; also 0 for a single seed."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    r"""Mean, standard deviation (``n - 1``) and :math:`t_{n-1}\, \sigma / \sqrt{n}`, for values of as many seeds.

    Raises:
        RegrowError: no value.

    Example:
        >>> e = estimate([2.0, 2.1, 2.2])
        >>> round(e.mean, 3), round(e.deviation, 3), round(e.half_width, 3), e.n  # t is 4.303
        (2.1, 0.1, 0.248, 3)
    """
    if not values:
        raise RegrowError("a mean needs at least one value")
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), None, None, 1)
    deviation = stdev(values)
    return Estimate(fmean(values), deviation, t_quantile(confidence, n - 1) * deviation / math.sqrt(n), n)


def t_quantile(confidence: float, degrees: int) -> float:
    """The ``t`` with ``P(|T| <= t) = confidence`` for Student's T with whole degrees of freedom, by bisection.

    Raises:
        RegrowError: ``confidence`` not in (0, 1), or fewer than one degree.

    Example:
        >>> [round(t_quantile(0.95, degrees), 3) for degrees in (1, 2, 3, 10, 30)]
        [12.706, 4.303, 3.182, 2.228, 2.042]
    """
    if not 0 < confidence < 1 or degrees < 1:
        raise RegrowError(f"t needs a confidence in (0, 1) and degrees of at least 1, got {confidence}, {degrees}")
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(degrees)): bounded, whatever t is
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """``P(|T| <= sqrt(degrees) tan(angle))``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@dataclass(frozen=True)
class LearningRateFit:
    """``eta(s) = dense_lr * exp(a s^2 + b s)``; ``residual`` is the root mean square error of ``log eta``."""

    dense_lr: float
    a: float
    b: float
    residual: float
    n: int


PAPER_LR_FIT = (1.969, 0.2905)
"""``a`` and ``b`` of Eq. 3."""


@listed(
    "tool",
    "learning-rate-fit",
    paper="Dietrich et al., Towards Structured Dynamic Sparse Pre-Training of BERT",
    year=2021,
    link="https://arxiv.org/abs/2108.06277",
    always_sparse=True,
    command="regrow report RUNS --claims claims.md",
    does="Fit to tuned runs by how much a sparsity raises the best learning rate.",
)
def fit_learning_rate_rule(best: Iterable[Point], dense_lr: float | None = None) -> LearningRateFit:
    """Least squares of ``log eta`` on ``(1, s, s^2)`` for pairs ``(sparsity, best learning rate)`` (Eq. 3).

    Args:
        best: a pair per tuned model; pairs of different sizes must be divided by their own dense optimum first.
        dense_lr: holds ``eta(0)`` fast, as the paper does, instead of fitting it too.

    Raises:
        RegrowError: too few different sparsities (two above zero, or three without ``dense_lr``), or a rate that is not
            positive.

    Example:
        >>> rates = [(s, 2e-4 * math.exp(1.969 * s**2 + 0.2905 * s)) for s in (0.0, 0.5, 0.75, 0.9)]
        >>> fit = fit_learning_rate_rule(rates)
        >>> round(fit.a, 3), round(fit.b, 4), round(fit.dense_lr, 6)
        (1.969, 0.2905, 0.0002)
    """
    best = list(best)
    if any(not rate > 0 for _, rate in best) or (dense_lr is not None and not dense_lr > 0):
        raise RegrowError("learning rates must be positive")
    s, log_rate = np.array([p[0] for p in best]), np.log([p[1] for p in best])
    needed = 3 if dense_lr is None else 2
    found = len({p[0] for p in best if dense_lr is None or p[0] > 0})
    if found < needed:
        raise RegrowError(f"the fit needs best learning rates at {needed} sparsities, got {found}")
    terms = [s**2, s] if dense_lr is not None else [s**2, s, np.ones_like(s)]
    matrix, offset = np.stack(terms, axis=1), 0.0 if dense_lr is None else math.log(dense_lr)
    solution = np.linalg.lstsq(matrix, log_rate - offset, rcond=None)[0]
    residual = float(np.sqrt(np.mean((matrix @ solution + offset - log_rate) ** 2)))
    fitted = dense_lr if dense_lr is not None else math.exp(solution[2])
    return LearningRateFit(fitted, float(solution[0]), float(solution[1]), residual, len(best))
