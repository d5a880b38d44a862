r"""The law of the loss with a model's mean number of parameters: fitted to runs, with intervals.

.. math:: L(\bar N, D) = E + A\,\bar N^{-\alpha} + B\,D^{-\beta}

``N`` is the mean over training of the encoder's active linear parameters, ``D`` the number of training tokens. With the
mean instead of the final number one law holds for sparse and dense pre-training: Jin et al. 2025, arXiv 2501.12486. Fit
and starting points follow Hoffmann et al. 2022, arXiv 2203.15556, section 3.3: a Huber loss of the difference of
logarithms, minimised by L-BFGS from many starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product

import numpy as np
from numpy.typing import NDArray

from regrow.errors import RegrowError

Array = NDArray[np.float64]

SAME = 1.05
"""Numbers within this factor of each other count as one: runs of several seeds differ in a few tokens."""
LEAST_VALUES, LEAST_PAIRS = 3, 6
"""Different ``N`` and ``D``, and pairs of them: five parameters, and a point to be wrong about."""
_MOST_ALIKE = 0.99  # correlation of log N and log D beyond which their two terms cannot be told apart
_TRIES = 100  # draws of a resample on which the law can be fitted


@dataclass(frozen=True)
class Law:
    """Its five parameters; losses in nats.

    Example:
        >>> law = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # Hoffmann et al. 2022
        >>> round(float(law(70e9, 1.4e12)), 2)
        1.94
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: float | Array, tokens: float | Array) -> Array:
        """The loss the law gives to models of so many mean parameters, trained on so many tokens."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta


@dataclass(frozen=True)
class LawFit:
    """What :func:`fit_law` found.

    Args:
        law: the best parameters.
        intervals: of each parameter by name, percentiles over resamples; empty without any.
        residual: root mean square of ``log L`` minus the law's.
        n: points.
        resamples: how many fits the intervals are made of.
    """

    law: Law
    intervals: Mapping[str, tuple[float, float]]
    residual: float
    n: int
    resamples: int


def fit_law(
    parameters: Sequence[float] | Array,
    tokens: Sequence[float] | Array,
    losses: Sequence[float] | Array,
    *,
    delta: float = 1e-3,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    watch: Callable[[range], Iterable[int]] = iter,
) -> LawFit:
    r"""Fit the law to points ``(N, D, L)``.

    Minimises :math:`\sum_i \text{Huber}_\delta(\log L(N_i, D_i) - \log L_i)`. The intervals are those of a bootstrap:
    the points are drawn anew with replacement and the law is fitted to each draw.

    Args:
        parameters: ``N`` of each point. tokens: ``D``. losses: ``L``, in nats. All positive.
        delta: from where on the Huber loss is linear, so that single runs that went wrong do not decide.
        resamples: of the bootstrap; 0 is none.
        confidence: of the intervals, in (0, 1).
        seed: of the resamples.
        watch: wraps the range of resamples; ``tqdm`` shows how far they have come.

    Raises:
        RegrowError: a number is not positive, there are too few different points, or ``N`` and ``D`` grow together
            throughout, so that their terms cannot be told apart.

    Example:
        >>> law = Law(E=2.0, A=40.0, alpha=0.3, B=300.0, beta=0.35)
        >>> n, d = (a.flatten() for a in np.meshgrid([1e5, 1e6, 1e7], [1e6, 1e7, 1e8]))
        >>> fit = fit_law(n, d, law(n, d), resamples=0)
        >>> [round(value, 2) for value in astuple(fit.law)]
        [2.0, 40.0, 0.3, 300.0, 0.35]
    """
    n, d, loss = (np.asarray(values, dtype=float) for values in (parameters, tokens, losses))
    if not 0 < confidence < 1 or not delta > 0:
        raise RegrowError(f"confidence must lie in (0, 1) and delta be positive, got {confidence} and {delta}")
    check_points(n, d, loss)
    # Counted from their geometric means, log N and log D hardly correlate with what they are multiplied by.
    x, y = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    target = np.log(loss)
    best = min((_minimised(start, x, y, target, delta) for start in _starts(loss)), key=lambda found: found[1])[0]
    law = _law(best, n, d)
    drawn = []
    generator = np.random.default_rng(seed)
    for _ in watch(range(resamples)):
        index = _resample(n, d, loss, generator)
        if index is not None:
            drawn.append(_law(_minimised(best, x[index], y[index], target[index], delta)[0], n, d))
    residual = float(np.sqrt(np.mean((target - np.log(law(n, d))) ** 2)))
    return LawFit(law, _intervals(drawn, confidence), residual, len(loss), len(drawn))


def distinct(values: Array) -> int:
    """How many different numbers there are, neighbours within :data:`SAME` of each other taken for one.

    Example:
        >>> distinct(np.array([100.0, 101.0, 200.0]))
        2
    """
    return len(np.unique(_levels(values)))


def check_points(parameters: Array, tokens: Array, losses: Array) -> None:
    """Raise :class:`RegrowError` unless the law can be fitted to such points."""
    if not (parameters.shape == tokens.shape == losses.shape and losses.ndim == 1):
        raise RegrowError("parameters, tokens and losses must be lists of one length")
    for name, values in (("parameters", parameters), ("tokens", tokens), ("losses", losses)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise RegrowError(f"{name} must be positive numbers")
    if wrong := _unfit(parameters, tokens):
        raise RegrowError(wrong)


def _unfit(n: Array, d: Array) -> str | None:
    """Why the law cannot be fitted to such points, if so."""
    sizes, lengths = _levels(n), _levels(d)
    pairs = len(set(zip(sizes.tolist(), lengths.tolist(), strict=True)))
    have = (len(np.unique(sizes)), len(np.unique(lengths)), pairs)
    if any(has < least for has, least in zip(have, (LEAST_VALUES, LEAST_VALUES, LEAST_PAIRS), strict=True)):
        return (
            f"the law has five parameters and needs at least {LEAST_VALUES} different numbers of mean parameters, "
            f"{LEAST_VALUES} of tokens and {LEAST_PAIRS} pairs of them; these {len(n)} runs have {have[0]}, {have[1]} "
            f"and {have[2]} (within {SAME - 1:.0%} counts as one): add runs of other sizes or densities, and of other "
            "numbers of steps"
        )
    alike = abs(float(np.corrcoef(np.log(n), np.log(d))[0, 1]))
    if alike > _MOST_ALIKE:
        return (
            f"mean parameters and tokens of these runs grow together (correlation of their logarithms {alike:.3f}), so "
            "the two terms of the law cannot be told apart: add runs of one size and several numbers of steps"
        )
    return None


def _levels(values: Array) -> NDArray[np.int64]:
    """For each number which of the different ones it is."""
    order = np.argsort(values)
    steps = np.diff(np.log(values[order]), prepend=np.log(values[order[:1]])) > np.log(SAME)
    levels = np.empty(len(values), dtype=np.int64)
    levels[order] = np.cumsum(steps)
    return levels


def _starts(loss: Array) -> Iterator[Array]:
    """Points from which to minimise: how the lowest loss is shared out among the three terms, and both exponents.

    Hoffmann et al. take 4,500 of them because theirs are absolute; these already have the right order of magnitude.
    """
    for floor, of_size, alpha, beta in product((0.2, 0.5, 0.9), (0.2, 0.5, 0.8), (0.1, 0.4, 1.0), (0.1, 0.4, 1.0)):
        rest = loss.mean() - floor * loss.min()
        yield np.array([np.log(floor * loss.min()), np.log(of_size * rest), alpha, np.log((1 - of_size) * rest), beta])


def _minimised(start: Array, x: Array, y: Array, target: Array, delta: float) -> tuple[Array, float]:
    from scipy.optimize import minimize

    found = minimize(
        _objective,
        start,
        (x, y, target, delta),
        "L-BFGS-B",
        jac=True,
        bounds=[(None, None), (None, None), (0, None), (None, None), (0, None)],  # more is never worse
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-8},
    )
    return found.x, float(found.fun)


def _objective(theta: Array, x: Array, y: Array, target: Array, delta: float) -> tuple[float, Array]:
    """Mean Huber loss in units of ``delta ** 2``, and its gradient.

    ``theta`` is (log E, log A', alpha, log B', beta), where A' and B' go with ``x`` and ``y`` instead of log N and
    log D.
    """
    e, a, alpha, b, beta = theta
    terms = np.stack([np.full_like(x, e), a - alpha * x, b - beta * y])
    top = terms.max(0)
    parts = np.exp(terms - top)
    whole = parts.sum(0)
    residual = (top + np.log(whole) - target) / delta
    huber = np.where(np.abs(residual) <= 1, residual**2 / 2, np.abs(residual) - 0.5)
    slope = np.clip(residual, -1, 1) / delta / len(x) * parts / whole
    gradient = np.array([slope[0].sum(), slope[1].sum(), -(slope[1] * x).sum(), slope[2].sum(), -(slope[2] * y).sum()])
    return float(huber.mean()), gradient


def _law(theta: Array, n: Array, d: Array) -> Law:
    """The law of parameters that count from the geometric means of ``n`` and ``d``."""
    e, a, alpha, b, beta = (float(value) for value in theta)
    with np.errstate(over="ignore"):  # an exponent that the points do not hold makes a factor of any size
        factor_a = float(np.exp(a + alpha * np.log(n).mean()))
        factor_b = float(np.exp(b + beta * np.log(d).mean()))
    return Law(float(np.exp(e)), factor_a, alpha, factor_b, beta)


def _resample(n: Array, d: Array, loss: Array, generator: np.random.Generator) -> NDArray[np.int64] | None:
    """A draw with replacement to which the law can be fitted."""
    for _ in range(_TRIES):
        index = generator.integers(len(loss), size=len(loss))
        if _unfit(n[index], d[index]) is None:
            return index
    return None


def _intervals(drawn: Sequence[Law], confidence: float) -> dict[str, tuple[float, float]]:
    if not drawn:
        return {}
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(np.array([astuple(law) for law in drawn]), ends, axis=0)
    return {f.name: (float(a), float(b)) for f, a, b in zip(fields(Law), low, high, strict=True)}
