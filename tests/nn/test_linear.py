"""The layer equals the dense one it stands for, for every block size and shape of input."""

import pytest
import torch
from torch.nn.functional import gelu, linear

from regrow import BlockSparseLinear, RegrowError, TopologyUpdater, UpdateSchedule
from regrow.nn import densify
from tolerances import GRADIENT_FACTOR, assert_as_good_as_dense


def make(b: int, bias: bool = True, density: float = 0.4) -> BlockSparseLinear:
    generator = torch.Generator().manual_seed(b)
    layer = BlockSparseLinear(6 * b, 3 * b, block_size=b, density=density, bias=bias, generator=generator)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, generator=generator)
    return layer


@pytest.mark.parametrize("b", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 5), (0,), (4, 0)])
def test_forward_and_gradients_equal_dense(b: int, bias: bool, lead: tuple[int, ...]) -> None:
    torch.manual_seed(b)
    layer = make(b, bias)
    x = torch.randn(*lead, 6 * b, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    (grad_x, grad_values) = torch.autograd.grad(y, [x, layer.values], cotangent)

    weight = layer.to_dense()
    results = []
    for dtype in (torch.float32, torch.float64):
        xd, wd = x.detach().to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        bd = None if layer.bias is None else layer.bias.detach().to(dtype)
        yd = linear(xd, wd, bd)
        results.append((yd.detach(), *torch.autograd.grad(yd, [xd, wd], cotangent.to(dtype))))
    (y32, gx32, gw32), (y64, gx64, gw64) = results
    assert_as_good_as_dense(y.detach(), y32, y64)
    assert_as_good_as_dense(grad_x, gx32, gx64, GRADIENT_FACTOR)

    def blocks(grad: torch.Tensor) -> torch.Tensor:
        rows, cols = layer.topology.coordinates()
        return grad.view(3, b, 6, b)[rows, :, cols]

    assert_as_good_as_dense(grad_values, blocks(gw32), blocks(gw64), GRADIENT_FACTOR)


@pytest.mark.parametrize("b", [1, 4, 16])
def test_activation_is_torchs_gelu_of_the_layer(b: int) -> None:
    torch.manual_seed(b)
    layer, x = make(b), torch.randn(2, 9, 6 * b, requires_grad=True)
    leaves = [x, layer.values, layer.bias]
    cotangent = torch.randn(2, 9, 3 * b)
    plain = gelu(layer(x))
    expected = torch.autograd.grad(plain, leaves, cotangent)
    layer.activation = "gelu"
    fused = layer(x)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(fused, leaves, cotangent), expected)
    assert "activation=gelu" in repr(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), fused)


def test_activation_compiles() -> None:
    torch._dynamo.reset()
    layer, x = make(16), torch.randn(8, 96)
    layer.activation = "gelu"
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    found = layer.values.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, layer.values.grad)


def test_a_layer_with_an_activation_is_no_nn_linear() -> None:
    layer = make(16)
    layer.activation = "gelu"
    with pytest.raises(RegrowError, match="has an activation"):
        densify(layer)


def test_unknown_activation_is_named() -> None:
    with pytest.raises(RegrowError, match="activation must be None or \"gelu\", got 'relu'"):
        BlockSparseLinear(16, 16, block_size=4, density=0.5, activation="relu")


def test_input_may_be_strided() -> None:
    layer = make(4)
    x = torch.randn(24, 5).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_to_dense_puts_slot_k_where_the_topology_says() -> None:
    layer = make(4)
    dense, (rows, cols) = layer.to_dense(), layer.topology.coordinates()
    for k, (r, c) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
        assert torch.equal(dense[4 * r : 4 * r + 4, 4 * c : 4 * c + 4], layer.values[k])
    assert int((dense != 0).sum()) == layer.values.numel()


def test_load_dense_is_the_inverse_of_to_dense() -> None:
    layer = make(8)
    weight, before = layer.to_dense(), layer.values.detach().clone()
    torch.nn.init.zeros_(layer.values)
    layer.load_dense_(weight)
    assert torch.equal(layer.values, before)


def test_initial_values_are_truncated_at_two_deviations() -> None:
    values = BlockSparseLinear(512, 512, block_size=16, density=0.5).values
    assert values.abs().max() <= 0.04
    assert values.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)  # std of a normal truncated at 2 std


def test_state_dict_round_trip() -> None:
    source, target = make(16), make(16)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 16, "density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ({"block_size": 16, "density": 1.5}, r"density must lie in \(0, 1\]"),
        ({"block_size": 16, "density": float("nan")}, "density must lie"),
        ({"block_size": 5, "density": 0.5}, "block_size must be one of"),
        ({"block_size": 64, "density": 0.5}, "block_size 64 does not divide in_features=96"),
    ],
)
def test_bad_arguments_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        BlockSparseLinear(96, 64, **arguments)


def test_wrong_input_width_is_named() -> None:
    with pytest.raises(RegrowError, match="expects inputs of 96 features"):
        make(16)(torch.zeros(2, 95))


def test_autocast_computes_in_the_dtype_of_the_values() -> None:
    layer, x = make(16), torch.randn(3, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.float32
        assert layer(x).dtype == torch.float32
    with pytest.raises(RegrowError, match=r"x is torch\.bfloat16"):
        layer(x.bfloat16())


def test_compiles_whole_and_survives_updates_without_recompiling() -> None:
    torch._dynamo.reset()
    layer = make(16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(layer.parameters())
    updater = TopologyUpdater(
        layer, optimizer, schedule=UpdateSchedule(6, n_updates=6, drop_fraction=1.0, decay="constant")
    )
    torch._dynamo.utils.counters.clear()
    for _ in range(6):
        x = torch.randn(8, 96)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    assert updater.last_update_step == 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
