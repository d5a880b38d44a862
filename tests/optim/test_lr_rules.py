"""What the learning-rate rules promise."""

from statistics import fmean

import pytest
import torch
from torch import nn

from regrow import BlockSparseLinear, RegrowError
from regrow.nn import sparsify
from regrow.optim import AdamW, parameter_groups, sparse_learning_rate, supar_init_factor

WIDTH, DENSITIES = 256, (1.0, 0.5, 0.25, 0.1)


def activation_after_training(density: float, rule: str, seed: int) -> float:
    """Mean |last hidden activation| of a random regression after ten steps."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        BlockSparseLinear(WIDTH, WIDTH, block_size=1, density=density, bias=False, generator=generator)
        for _ in range(3)
    ]
    for layer in layers:
        layer.values.data *= 3.0 * (supar_init_factor(density) if rule == "supar" else 1.0)
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    head = torch.randn(WIDTH, generator=generator) / WIDTH
    optimizer = AdamW(parameter_groups(model, 0.0, lr=1e-3, lr_rule=rule, lr_scope="sparse"))
    x, y = torch.randn(64, WIDTH, generator=generator), torch.randn(64, generator=generator)
    hidden = model(x)
    for _ in range(10):
        optimizer.zero_grad()
        hidden = model(x)
        (hidden @ head - y).square().mean().backward()
        optimizer.step()
    return hidden.abs().mean().item()


def test_supar_keeps_activations_flat_over_density_and_the_dense_rate_does_not() -> None:
    means = {
        rule: [fmean(activation_after_training(density, rule, seed) for seed in range(5)) for density in DENSITIES]
        for rule in ("supar", "none")
    }
    assert max(means["supar"]) / min(means["supar"]) < 1.3, means
    assert max(means["none"]) / min(means["none"]) > 10, means


@pytest.mark.parametrize("scope", ["sparse", "all"])
def test_scope_says_whose_learning_rate_rises(scope: str) -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    sparsify(model, density=0.5, block_size=16, distribution={"1": 0.25, "2": 0.75})
    groups = parameter_groups(model, 0.1, lr=1e-3, lr_rule="inverse", lr_scope=scope)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    table, first, second, norm = model[0].weight, model[1].values, model[2].values, model[3].weight
    expected = (1e-3, 4e-3, 1e-3 / 0.75) if scope == "sparse" else (2e-3, 2e-3, 2e-3)
    assert [rates[id(p)] for p in (table, first, second)] == pytest.approx(expected)
    assert rates[id(norm)] == rates[id(table)] and (decay[id(norm)], decay[id(first)]) == (0.0, 0.1)


def test_bad_rules_are_refused() -> None:
    with pytest.raises(RegrowError, match="unknown learning-rate rule 'eq9'; choose one of eq3"):
        sparse_learning_rate(1e-3, 0.1, "eq9")
    with pytest.raises(RegrowError, match="density must be positive"):
        sparse_learning_rate(1e-3, 0.0)
    with pytest.raises(RegrowError, match="lr_scope must be 'sparse' or 'all'"):
        parameter_groups(nn.Linear(2, 2), 0.0, lr_scope="some")
