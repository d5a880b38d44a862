"""Layers on a GPU, or without one in Triton's interpreter: autocast, and which operations stand in for which."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from regrow import BlockSparseLinear, sparsify
from regrow.kernels import gpu
from regrow.nn.ffn import sparse_ffn
from regrow.nn.merged import merged_linear
from regrow.nn.options import available
from tolerances import GRADIENT_FACTOR, assert_as_good_as_dense


def make(inputs: int, outputs: int, b: int, device: torch.device) -> BlockSparseLinear:
    generator = torch.Generator().manual_seed(b)
    layer = BlockSparseLinear(inputs, outputs, block_size=b, density=0.3, generator=generator)
    nn.init.normal_(layer.bias, generator=generator)
    return layer.to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("b", [1, 4, 16])
def test_autocast_multiplies_in_16_bits_and_keeps_values_in_32(
    b: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    layer, x = make(6 * b, 4 * b, b, device), torch.randn(50, 6 * b, device=device)
    weight, cotangent = layer.to_dense(), torch.randn(50, 4 * b, device=device)

    def run(forward, of: torch.dtype, *leaves: Tensor) -> list[Tensor]:
        leaves = tuple(leaf.detach().to(of).requires_grad_() for leaf in leaves)
        y = forward(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]

    def ours(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    y, dx, dvalues, dbias = run(ours, torch.float32, x, layer.values, layer.bias)
    assert y.dtype is dtype and dx.dtype is dvalues.dtype is dbias.dtype is torch.float32
    dense, exact = (run(nn.functional.linear, of, x, weight, layer.bias) for of in (dtype, torch.float64))
    rows, cols = layer.topology.coordinates()
    blocks = [r[2].view(4, b, 6, b)[rows, :, cols] for r in (dense, exact)]
    assert_as_good_as_dense(y, dense[0], exact[0])
    for grad, theirs, truth in ((dx, dense[1], exact[1]), (dvalues, *blocks), (dbias, dense[3], exact[3])):
        assert_as_good_as_dense(grad.to(dtype), theirs, truth, GRADIENT_FACTOR)


@pytest.mark.parametrize("hook", [False, True])
def test_the_feed_forward_half_is_two_products_there(hook: bool, device: torch.device) -> None:
    first, second = make(64, 128, 16, device), make(128, 64, 16, device)
    x, seen = torch.randn(2, 9, 64, device=device), []
    if hook:
        first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(sparse_ffn(first, second, x), second(gelu(first(x))))
    assert len(seen) == 2 * hook
    with torch.autocast(device.type, torch.bfloat16):
        assert sparse_ffn(first, second, x).dtype is torch.bfloat16


def test_merged_layers_under_autocast(device: torch.device) -> None:
    layers, x = [make(64, n, 16, device) for n in (32, 64)], torch.randn(7, 64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = merged_linear(layers, x)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y, torch.cat([layer(x) for layer in layers], -1))


@pytest.mark.parametrize("option", sorted(available()))
def test_every_layer_option_trains_under_autocast(option: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    sparsify(model, density=0.5, block_size=16, layer=option)
    model.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        model(torch.randn(5, 64, device=device)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.float32 and parameter.grad.isfinite().all(), name


def test_a_cpu_without_kernels_for_16_bits_keeps_32() -> None:
    layer = make(32, 32, 16, torch.device("cpu"))
    assert not gpu.handles(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 32)).dtype is torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_recorded_step_is_right_after_a_topology_update() -> None:
    device = torch.device("cuda")
    layer, x = make(96, 64, 16, device), torch.randn(50, 96, device=device)

    def step() -> Tensor:
        layer.values.grad = None
        y = layer(x)
        y.square().sum().backward()
        return y

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    recorded = layer.values.grad
    rows, cols = layer.topology.coordinates()
    layer.topology.set_coordinates(rows, (cols + 1) % layer.topology.n_block_cols)
    graph.replay()
    torch.testing.assert_close(y, nn.functional.linear(x, layer.to_dense(), layer.bias))
    by_graph = recorded.clone()
    step()
    torch.testing.assert_close(by_graph, layer.values.grad)
