"""A layer of gathered blocks is one more sparse layer to everything that is not a kernel."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear

import regrow
from regrow import BlockSparseLinear, RegrowError, TopologyUpdater, UpdateSchedule
from regrow.methods import Gradient
from regrow.methods.scores import block_norm
from regrow.nn import GatheredLinear, densify, merged_linear, sparse_attention, sparse_ffn
from regrow.nn.flops import LayerSize, count_flops
from regrow.nn.layout import layout
from regrow.nn.options import Place, create
from regrow.nn.shape import BlockShape
from regrow.optim import AdamW
from regrow.optim.group_lasso import group_lasso_
from regrow.testing import check_layer
from regrow.training.loading import RegrowConfig
from regrow.training.skeleton import build_layers
from tolerances import GRADIENT_FACTOR, assert_as_good_as_dense


def make(in_features: int = 40, out_features: int = 64, density: float = 0.3, **options: object) -> GatheredLinear:
    layer = GatheredLinear(
        in_features, out_features, density=density, generator=torch.Generator().manual_seed(1), **options
    )
    if layer.bias is not None:
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    return layer


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 5), (0,)])
def test_forward_and_gradients_equal_dense(lead: tuple[int, ...], activation: str | None) -> None:
    torch.manual_seed(0)
    layer, x = make(activation=activation), torch.randn(*lead, 40, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    ours = y.detach(), *torch.autograd.grad(y, [x, layer.values], cotangent)
    rows, cols = layer.topology.coordinates()
    results = []
    for dtype in (torch.float32, torch.float64):
        xd, wd = x.detach().to(dtype).requires_grad_(), layer.to_dense().to(dtype).requires_grad_()
        yd = linear(xd, wd, layer.bias.detach().to(dtype))
        yd = yd if activation is None else gelu(yd)
        dx, dw = torch.autograd.grad(yd, [xd, wd], cotangent.to(dtype))
        results.append((yd.detach(), dx, dw.view(4, 16, 40)[rows, :, cols][..., None]))
    for i, (actual, dense, exact) in enumerate(zip(ours, *results, strict=True)):
        assert_as_good_as_dense(actual, dense, exact, GRADIENT_FACTOR if i else 2.0)


def test_as_many_weights_as_square_blocks_in_sixteen_times_the_units() -> None:
    gathered, square = make(256, 256, 0.25), BlockSparseLinear(256, 256, block_size=16, density=0.25)
    assert gathered.values.numel() == square.values.numel()
    assert gathered.topology.n_blocks == 16 * square.topology.n_blocks
    assert (gathered.topology.n_block_rows, gathered.topology.n_block_cols) == (16, 256)


def test_to_dense_load_dense_and_densify_are_each_others_inverse() -> None:
    layer, other = make(), make()
    other.values.data.zero_()
    other.load_dense_(layer.to_dense())
    assert torch.equal(other.values, layer.values)
    assert layer.to_dense().count_nonzero() == layer.values.numel()
    x = torch.randn(3, 40)
    torch.testing.assert_close(densify(nn.Sequential(layer))(x), layer(x))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RegrowError, match="block_size 16x1 does not divide out_features=24"):
        GatheredLinear(40, 24, density=0.5)
    for block in ((8, 1), (16, 2), (1, 16)):
        with pytest.raises(RegrowError, match="blocks must be square or 16x1"):
            BlockShape.of(block).grid(64, 64)
    with pytest.raises(RegrowError, match="block_size must be 16, got 4"):
        regrow.sparsify(nn.Linear(32, 32), density=0.5, block_size=4, layer="gathered")


def test_as_a_layer_option() -> None:
    report = check_layer("gathered")
    assert report.is_linear and report.weights == report.dense_weights // 4


def test_flops_follow_the_weights_that_exist() -> None:
    model = nn.Sequential(OrderedDict(a=make(40, 64, 0.3), b=make(64, 32, 0.5)))
    weights = [layer.values.numel() for layer in model]
    products = count_flops(model, batch_size=1, seq_length=10).products
    assert products.forward == 2 * 10 * sum(weights)
    assert create("gathered").weights(Place(40, 64, True, 16, 0.3)) == weights[0]
    assert LayerSize(40, 64, 16, 48, block_cols=1).block_shape.numbers == 16


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_of_all_positions_by_units_of_sixteen(norm: str) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(30, 40), torch.randn(30, 64)
    gradient = Gradient(x, g, (16, 1))
    dense = (g.T @ x).view(4, 16, 40).transpose(1, 2)  # [block row, column, 16]
    norms = torch.cat([rows for _, rows in gradient.norms(norm)])
    torch.testing.assert_close(norms, block_norm(dense.reshape(160, 16, 1), norm).view(4, 40))
    best = gradient.strongest(5, excluded=torch.tensor([], dtype=torch.int64), norm=norm)
    assert best.tolist() == norms.flatten().topk(5).indices.tolist()
    rows, cols = torch.tensor([0, 3]), torch.tensor([39, 7])
    torch.testing.assert_close(gradient.at(rows, cols)[..., 0], dense[rows, cols])
    of_rows, of_cols = gradient.strengths()
    torch.testing.assert_close(of_rows, g.abs().sum(0).view(4, 16).sum(1))
    torch.testing.assert_close(of_cols, x.abs().sum(0))
    of_rows, of_cols = gradient.sketches(torch.Generator())
    assert of_rows.shape == (4,) and of_cols.shape == (40,)


@pytest.mark.parametrize("method", ["dynsparse", "rigl", "set"])
def test_units_move_and_a_small_training_learns(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(32, 64, 0.3), nn.GELU(), make(64, 16, 0.3))
    optimizer = AdamW(model.parameters(), lr=0.01)
    updater = TopologyUpdater(model, optimizer, method=method, schedule=UpdateSchedule(total_steps=60, n_updates=6))
    x, target = torch.randn(128, 32), torch.randn(128, 16)
    before, losses = model[0].topology.keys(), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        updater.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(model[0].topology.keys(), before)
    model[0].topology.validate()


def test_group_lasso_counts_the_elements_of_a_unit() -> None:
    values = torch.full((2, 16, 1), 3.0)
    square = torch.full((2, 4, 4), 3.0)  # as many
    assert torch.allclose(
        group_lasso_(values, lr=0.1, strength=1.0).flatten(), group_lasso_(square, lr=0.1, strength=1.0).flatten()
    )


def test_merged_layers_are_one_product() -> None:
    layers, x = [make(40, out) for out in (16, 48, 32)], torch.randn(9, 40)
    assert torch.equal(merged_linear(layers, x), torch.cat([layer(x) for layer in layers], -1))
    with pytest.raises(RegrowError, match="equal in_features and block size"):
        merged_linear([make(48, 16), BlockSparseLinear(48, 16, block_size=16, density=1.0)], torch.randn(2, 48))


def test_fused_halves_call_the_layers() -> None:
    torch.manual_seed(0)
    first, second, x = make(32, 64), make(64, 32), torch.randn(10, 32)
    square = BlockSparseLinear(64, 32, block_size=16, density=0.5)
    for last in (second, square):
        torch.testing.assert_close(sparse_ffn(first, last, x), last(gelu(first(x))))
    inner, offsets = [make(32, 32) for _ in range(3)], torch.tensor([0, 4, 10], dtype=torch.int32)
    y = sparse_attention(*inner, make(32, 32), x, offsets, heads=2)
    dense = [densify(nn.Sequential(layer))[0] for layer in (*inner, make(32, 32))]
    parts = []
    for tokens in (x[:4], x[4:]):
        q, k, v = (layer(tokens).view(-1, 2, 16).transpose(0, 1) for layer in dense[:3])
        parts.append(dense[3](nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1, 32)))
    torch.testing.assert_close(y, torch.cat(parts), atol=1e-5, rtol=1e-4)


def test_a_layout_says_the_width_of_a_block_and_is_checked() -> None:
    entry = layout({"0": make(32, 32)})["layers"]["0"]
    assert entry == {"block_size": 16, "block_cols": 1, "n_blocks": 19}
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(32, 32))
    RegrowConfig(layers={"0": entry})
    build_layers(skeleton, {"0": entry}, {})
    assert type(skeleton[0]) is GatheredLinear and skeleton[0].values.shape == (19, 16, 1)
    for wrong in ({"block_cols": 2}, {"block_size": 8}, {"block_cols": -1}, {"n_blocks": 65}, {"block_cols": 16}):
        with torch.device("meta"):
            skeleton = nn.Sequential(nn.Linear(32, 32))
        with pytest.raises(RegrowError, match=r"config.json, layer '0'"):
            build_layers(skeleton, {"0": {**entry, **wrong}}, {})
    with pytest.raises(RegrowError, match="block_size and n_blocks"):
        RegrowConfig(layers={"0": {**entry, "block_rows": 16}})


def test_a_state_dictionary_of_another_number_of_blocks() -> None:
    layer, other = make(), make(density=0.5)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 40)
    assert torch.equal(layer(x), other(x))
