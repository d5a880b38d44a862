"""Conversion of whole models."""

import pytest
import torch
from torch import nn

from regrow import BlockSparseLinear, RegrowError, densify, sparsify


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10)))


def test_globs_choose_layers_and_seed_decides_the_pattern() -> None:
    model = sparsify(network(), density=0.25, block_size=16, include=["0", "2.*"], exclude="2.1", seed=3)
    assert [type(m) for m in (model[0], model[2][0], model[2][1])] == [BlockSparseLinear] * 2 + [nn.Linear]
    again = sparsify(network(), density=0.25, block_size=16, include=["0", "2.*"], exclude="2.1", seed=3)
    assert torch.equal(model[0].topology.keys(), again[0].topology.keys())
    assert torch.equal(model[0].values, again[0].values)
    other = sparsify(network(), density=0.25, block_size=16, include="0", seed=4)
    assert not torch.equal(model[0].topology.keys(), other[0].topology.keys())


def test_global_random_state_is_not_touched() -> None:
    model, state = network(), torch.get_rng_state()
    sparsify(model, density=0.5, block_size=16, include="0")
    assert torch.equal(torch.get_rng_state(), state)


def test_keep_copies_the_dense_values_and_bias() -> None:
    dense = network()
    weight, bias = dense[0].weight.detach().clone(), dense[0].bias.detach().clone()
    layer = sparsify(dense, density=0.5, block_size=8, include="0", init="keep")[0]
    mask = layer.to_dense() != 0
    assert torch.equal(layer.to_dense(), weight * mask)
    assert mask.float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(layer.bias, bias)


def test_densify_leaves_the_function_as_it_was() -> None:
    model, x = sparsify(network(), density=0.3, block_size=4, include="0"), torch.randn(5, 32)
    before = model(x)
    assert type(densify(model)[0]) is nn.Linear
    torch.testing.assert_close(model(x), before)


def test_a_lone_linear_is_returned_as_a_sparse_layer() -> None:
    layer = sparsify(nn.Linear(32, 32), density=0.5, block_size=16)
    assert isinstance(layer, BlockSparseLinear)
    assert type(densify(layer)) is nn.Linear


def test_mismatch_is_an_error_that_names_the_layer_or_a_warning() -> None:
    with pytest.raises(RegrowError, match=r"2\.1: block_size 16 does not divide out_features=10.*exclude='2\.1'"):
        sparsify(network(), density=0.5, block_size=16)
    with pytest.warns(UserWarning, match=r"left dense.*2\.1"):
        model = sparsify(network(), density=0.5, block_size=16, on_mismatch="skip")
    assert type(model[2][1]) is nn.Linear and isinstance(model[0], BlockSparseLinear)


def test_tied_weights_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
    model[1].weight = model[0].weight
    with pytest.raises(RegrowError, match="1: its weight is tied"):
        sparsify(model, density=0.5, block_size=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "nothing.*"}, r"no nn\.Linear matches"),
        ({"density": 0}, "density must lie in"),
        ({"distribution": "odd"}, "unknown distribution 'odd'; choose one of uniform"),
        ({"init": "odd"}, "init must be"),
        ({"on_mismatch": "odd"}, "on_mismatch must be"),
        ({"block_size": 3}, "block_size must be one of"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        sparsify(network(), **({"density": 0.5, "block_size": 16, "include": "0"} | arguments))


def test_a_meta_skeleton_becomes_real_and_was_never_dense() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(640_000, 640_000, bias=False))  # dense it would take 1.6 TB
    layer = sparsify(model, density=1e-6, block_size=16)[0]
    assert layer.values.device.type == "cpu" and layer.topology.n_blocks == 1600
