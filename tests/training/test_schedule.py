"""The schedule is the paper's: n segments, n - 1 updates, none after the last."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow import RegrowError, UpdateSchedule


@given(st.integers(1, 300), st.data())
def test_n_segments_have_n_minus_1_updates_between_them(total: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, total))
    schedule = UpdateSchedule(total, n, 0.5)
    steps = [t for t in range(total + 2) if schedule.is_update(t)]
    assert len(steps) == n - 1
    bounds = [0, *steps, total]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert max(lengths) - min(lengths) <= 1


def test_fraction_decays() -> None:
    cosine = UpdateSchedule(100, 10, 0.5)
    assert cosine.fraction(0) == 0.5
    assert cosine.fraction(50) == pytest.approx(0.25)
    assert cosine.fraction(25) == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)))
    assert cosine.fraction(100) == pytest.approx(0)
    assert UpdateSchedule(100, 10, 0.5, "linear").fraction(75) == pytest.approx(0.125)
    assert UpdateSchedule(100, 10, 0.5, "constant").fraction(99) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"n_updates": 0}, "n_updates must lie between 1 and total_steps=100"),
        ({"n_updates": 101}, "n_updates must lie"),
        ({"drop_fraction": 1.1}, "drop_fraction must lie"),
        ({"decay": "odd"}, "decay must be"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        UpdateSchedule(**({"total_steps": 100, "n_updates": 10} | arguments))
