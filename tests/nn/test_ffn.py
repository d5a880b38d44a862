"""The fused feed-forward function equals its two layers, and steps aside where they must be called themselves."""

import pytest
import torch
from torch.nn.functional import gelu

from regrow import BlockSparseLinear, RegrowError, kernels
from regrow.nn import sparse_ffn


def layers(
    b: int = 4, b2: int | None = None, activation: str | None = None
) -> tuple[BlockSparseLinear, BlockSparseLinear]:
    generator = torch.Generator().manual_seed(b)
    first = BlockSparseLinear(64, 128, block_size=b, density=0.3, activation=activation, generator=generator)
    second = BlockSparseLinear(128, 192, block_size=b2 or b, density=0.3, generator=generator)
    for layer in (first, second):
        torch.nn.init.normal_(layer.bias, generator=generator)
    return first, second


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry at every call of the fused operation."""
    calls, real = [], kernels.ffn
    monkeypatch.setattr(kernels, "ffn", lambda *args: (calls.append(1), real(*args))[1])
    return calls


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 5), (0,), (4, 0)])
@pytest.mark.parametrize("b", [1, 4, 16, 64])
def test_equals_the_layers(b: int, lead: tuple[int, ...], activation: str | None, fused: list[int]) -> None:
    first, second = layers(b, activation=activation)
    x = torch.randn(*lead, 64, requires_grad=True)
    leaves = [x, first.values, first.bias, second.values, second.bias]
    hidden = first(x)
    expected = second(hidden if activation else gelu(hidden))
    y = sparse_ffn(first, second, x)
    assert len(fused) == 1
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, cotangent)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, cotangent), rtol=1e-4, atol=1e-5)


def test_layers_of_different_blocks_or_with_a_second_activation_are_called(fused: list[int]) -> None:
    x = torch.randn(5, 64)
    first, second = layers(4, 16)
    torch.testing.assert_close(sparse_ffn(first, second, x), second(gelu(first(x))), rtol=1e-4, atol=1e-5)
    first, second = layers(4, activation="gelu")
    second.activation = "gelu"
    assert torch.equal(sparse_ffn(first, second, x), second(first(x)))
    assert not fused


@pytest.mark.parametrize("which", [0, 1])
def test_hooks_see_what_goes_in_and_out(which: int, fused: list[int]) -> None:
    both, x, seen = layers(), torch.randn(5, 64), []
    handle = both[which].register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    y = sparse_ffn(*both, x)
    assert seen == [(5, both[which].out_features)]
    assert not fused
    handle.remove()
    torch.testing.assert_close(sparse_ffn(*both, x), y, rtol=1e-4, atol=1e-5)
    assert len(fused) == len(seen) == 1


def test_autocast_computes_in_the_dtype_of_the_values() -> None:
    both, x = layers(), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_ffn(*both, x.bfloat16())
    assert y.dtype is torch.float32
    assert torch.equal(y, sparse_ffn(*both, x.bfloat16().float()))


def test_widths_that_do_not_fit_are_refused() -> None:
    first, second = layers()
    with pytest.raises(RegrowError, match="x has 60"):
        sparse_ffn(first, second, torch.randn(5, 60))
    with pytest.raises(RegrowError, match="second has 64"):
        sparse_ffn(first, first, torch.randn(5, 64))
