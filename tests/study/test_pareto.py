"""Hand-computed numbers, the paper's own, and what must hold for any points."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.errors import RegrowError
from regrow.study.pareto import (
    PAPER_LR_FIT,
    Estimate,
    cost_at,
    critical_eps,
    eps,
    estimate,
    fit_learning_rate_rule,
    loss_at,
    pareto_frontier,
    reduction_at_equal_loss,
    t_quantile,
)

DENSE = [(2.617e9, 2.606), (10.07e9, 2.310), (20.13e9, 2.115)]  # the paper's Mini, Small, Medium

points = st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 10)), max_size=30)


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(points)
def test_the_frontier_is_undominated_and_complete(found: list[tuple[float, float]]) -> None:
    frontier = pareto_frontier(found)
    assert not any(beats(other, member) for member in frontier for other in found)
    assert set(frontier) == {p for p in found if not any(beats(other, p) for other in found)}
    assert frontier == sorted(set(frontier)) == pareto_frontier(frontier) == pareto_frontier(reversed(found))


def told_apart(found: list[tuple[float, float]]) -> bool:
    """A frontier of at least two costs, which differ by more than rounding does."""
    costs = [cost for cost, _ in pareto_frontier(found)]
    return len(costs) > 1 and all(b > a * (1 + 1e-6) for a, b in pairwise(costs))


@given(points.filter(told_apart), st.floats(0, 1), st.floats(0.1, 10))
def test_cost_and_loss_are_inverse_and_know_no_units(
    family: list[tuple[float, float]], part: float, unit: float
) -> None:
    frontier = pareto_frontier(family)
    (low, _), (high, _) = frontier[0], frontier[-1]
    cost = min(max(low * (high / low) ** part, low), high)
    loss = loss_at(cost, family)
    assert loss is not None and frontier[-1][1] <= loss <= frontier[0][1]
    scaled = [(c * unit, value) for c, value in family]
    assert loss_at(min(max(cost * unit, low * unit), high * unit), scaled) == pytest.approx(loss, rel=1e-6, abs=1e-6)
    # a loss in the middle: two losses that are nearly equal have costs that are not
    middle = (frontier[0][1] + frontier[-1][1]) / 2
    paid = cost_at(middle, family)
    assert paid is not None and loss_at(min(max(paid, low), high), family) == pytest.approx(middle, rel=1e-6)
    assert reduction_at_equal_loss((paid / 2, middle), family) == pytest.approx(0.5)
    assert reduction_at_equal_loss((paid * unit / 2, middle), scaled) == pytest.approx(0.5)


def test_the_papers_base_models_against_its_dense_family() -> None:
    # published: 0.48 (about 0.5) at b = 1, 0.83 at b = 16; critical eps 2.0 and 1.2; dense of equal FLOPs 2.350
    assert reduction_at_equal_loss((8.33e9, 2.160), DENSE) == pytest.approx(0.485, abs=0.005)
    assert reduction_at_equal_loss((8.33e9, 2.311), DENSE) == pytest.approx(0.83, abs=0.005)
    assert critical_eps((8.33e9, 2.160), DENSE) == pytest.approx(2.0, abs=0.1)
    assert critical_eps((8.33e9, 2.311), DENSE) == pytest.approx(1.2, abs=0.05)
    assert loss_at(8.33e9, DENSE) == pytest.approx(2.350, abs=0.003)


def test_interpolation_by_hand() -> None:
    family = [(1.0, 3.0), (100.0, 1.0), (50.0, 5.0)]  # the last is beaten, so it is not the family's
    assert loss_at(10.0, family) == pytest.approx(2.0)
    assert cost_at(2.0, family) == pytest.approx(10.0)
    assert (loss_at(1.0, family), loss_at(100.0, family)) == (3.0, 1.0)
    assert loss_at(0.99, family) is loss_at(101.0, family) is cost_at(3.01, family) is cost_at(0.99, family) is None
    assert loss_at(1.0, []) is cost_at(1.0, []) is reduction_at_equal_loss((1.0, 1.0), []) is None


def test_eps_below_its_critical_value_wins_on_the_clock() -> None:
    sparse_flops, dense_flops, dense_seconds = 1e9, 2e9, 4.0
    for sparse_seconds, wins in ((3.9, True), (4.1, False)):
        assert (eps(sparse_seconds, sparse_flops, dense_seconds, dense_flops) < dense_flops / sparse_flops) is wins


def test_estimates() -> None:
    assert estimate([2.0]) == Estimate(2.0, None, None, 1)
    found = estimate([1.0, 3.0])  # t is 12.706 with one degree of freedom, sigma sqrt 2, divided by sqrt 2
    assert (found.mean, found.deviation) == (2.0, pytest.approx(math.sqrt(2)))
    assert found.half_width == pytest.approx(12.7062, abs=1e-4)
    assert [estimate(v).sign for v in ([1.0], [1.0, 3.0], [1.0, 1.01], [-1.0, -1.01], [-1.0, 1.0])] == [0, 0, 1, -1, 0]


def test_t_quantiles_of_the_tables() -> None:
    for confidence, degrees, wanted in [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 4, 2.7764), (0.95, 5, 2.5706), (0.95, 9, 2.2622),
        (0.99, 3, 5.8409), (0.99, 10, 3.1693), (0.9, 7, 1.8946), (0.95, 1000, 1.9623), (0.5, 6, 0.7176),
    ]:  # fmt: skip
        assert t_quantile(confidence, degrees) == pytest.approx(wanted, abs=2e-4)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(1e-5, 1e-2), st.booleans())
def test_the_fit_finds_the_rule_that_made_the_rates(a: float, b: float, dense: float, held: bool) -> None:
    rates = [(s, dense * math.exp(a * s**2 + b * s)) for s in (0.0, 0.25, 0.5, 0.75, 0.9)]
    fit = fit_learning_rate_rule(rates, dense_lr=dense if held else None)
    assert (fit.a, fit.b) == (pytest.approx(a, abs=1e-6), pytest.approx(b, abs=1e-6))
    assert fit.dense_lr == pytest.approx(dense) and fit.residual < 1e-9 and fit.n == 5


def test_the_fit_is_that_of_the_librarys_own_rule() -> None:
    from regrow.optim import sparse_learning_rate

    fit = fit_learning_rate_rule([(s, sparse_learning_rate(1.0, 1 - s)) for s in (0.5, 0.9)], dense_lr=1.0)
    assert (fit.a, fit.b) == pytest.approx(PAPER_LR_FIT)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: pareto_frontier([(1.0, math.nan)]), "finite"),
        (lambda: loss_at(0.0, DENSE), "cost must be positive"),
        (lambda: loss_at(1.0, [(0.0, 1.0)]), "costs of a family"),
        (lambda: eps(1.0, 0.0, 1.0, 1.0), "positive seconds"),
        (lambda: estimate([]), "at least one"),
        (lambda: t_quantile(1.0, 3), "confidence"),
        (lambda: t_quantile(0.9, 0), "degrees"),
        (lambda: fit_learning_rate_rule([(0.0, 1.0), (0.5, 2.0)]), "3 sparsities, got 2"),
        (lambda: fit_learning_rate_rule([(0.0, 1.0), (0.5, 2.0)], dense_lr=1.0), "2 sparsities, got 1"),
        (lambda: fit_learning_rate_rule([(0.5, -1.0)]), "positive"),
    ],
)
def test_bad_input_is_named(call, word: str) -> None:
    with pytest.raises(RegrowError, match=word):
        call()
