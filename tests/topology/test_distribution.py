"""Densities by layer: the published rules, exact budgets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regrow import RegrowError, sparsify
from regrow.topology import layer_densities

BERT = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "up": (32, 8), "down": (8, 32)}


@pytest.mark.parametrize("name", ["er", "erk"])
def test_a_bert_layer_gets_four_thirds_and_five_sixths(name: str) -> None:
    densities = layer_densities(BERT, 0.3, name)
    for layer in ("q", "k", "v", "o"):
        assert densities[layer] == pytest.approx(4 / 3 * 0.3)
    for layer in ("up", "down"):
        assert densities[layer] == pytest.approx(5 / 6 * 0.3)


@given(
    st.dictionaries(st.text(min_size=1), st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1),
    st.floats(0.01, 1.0),
)
def test_the_budget_is_met_and_no_layer_is_more_than_full(shapes: dict, density: float) -> None:
    densities = layer_densities(shapes, density, "erk")
    total = sum(rows * cols for rows, cols in shapes.values())
    assert sum(densities[n] * rows * cols for n, (rows, cols) in shapes.items()) == pytest.approx(density * total)
    assert all(0 < d <= 1 + 1e-12 for d in densities.values())


def test_globs_name_densities_in_order() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    sparsify(model, density=0.1, block_size=8, distribution={"1": 0.5, "[12]": 0.25})
    assert [round(layer.density * 64) for layer in model] == [6, 32, 16]
    with pytest.raises(RegrowError, match="'9', which matches no sparse layer"):
        layer_densities(BERT, 0.1, {"9": 0.5})
    with pytest.raises(RegrowError, match=r"distribution\['q'\] must lie in"):
        layer_densities(BERT, 0.1, {"q": 0.0})
