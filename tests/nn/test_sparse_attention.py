"""The fused half of a layer equals its parts, and steps aside where they must be called themselves."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from regrow import BlockSparseLinear, RegrowError, kernels
from regrow.nn import attention, sparse_attention


def layers(b: int = 4, b_query: int | None = None, b_output: int | None = None) -> list[BlockSparseLinear]:
    generator = torch.Generator().manual_seed(b)
    sizes = (64, 128, b_query or b), (64, 128, b), (64, 128, b), (128, 192, b_output or b)
    made = [BlockSparseLinear(i, o, block_size=s, density=0.3, generator=generator) for i, o, s in sizes]
    for layer in made:
        torch.nn.init.normal_(layer.bias, generator=generator)
    return made


def problem(lengths: tuple[int, ...] = (7, 12, 0, 30) * 4) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(1)).requires_grad_(), offsets


def composed(parts: list[BlockSparseLinear], x: Tensor, offsets: Tensor, heads: int = 2, **options: float) -> Tensor:
    return parts[3](attention(torch.cat([layer(x) for layer in parts[:3]], -1), offsets, heads, **options))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """A thread wants several sequences."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry at every call of the fused operation."""
    calls, real = [], kernels.sparse_attention
    monkeypatch.setattr(kernels, "sparse_attention", lambda *args: (calls.append(1), real(*args))[1])
    return calls


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("b", [1, 4, 16, 64])
def test_equals_its_parts(b: int, scale: float | None, p: float, fused: list[int]) -> None:
    parts, (x, offsets) = layers(b), problem()
    leaves = [x, *(t for layer in parts for t in (layer.values, layer.bias))]
    torch.manual_seed(3)
    expected = composed(parts, x, offsets, p=p, scale=scale)
    torch.manual_seed(3)
    y = sparse_attention(*parts, x, offsets, 2, p=p, scale=scale)
    assert len(fused) == (b > 1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, cotangent)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, cotangent), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("b", [1, 4, 16, 64])
def test_without_a_gradient(b: int, fused: list[int]) -> None:
    parts, (x, offsets) = layers(b), problem()
    with torch.no_grad():
        torch.testing.assert_close(
            sparse_attention(*parts, x, offsets, 2), composed(parts, x, offsets), rtol=1e-4, atol=1e-4
        )
    assert len(fused) == 1


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    state = torch.get_rng_state()
    sparse_attention(*layers(), *problem(), 2)
    sparse_attention(*layers(), *problem(), 2, p=0.1, training=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", ["b_query", "b_output"])
def test_parts_of_different_blocks_are_called(which: str, fused: list[int]) -> None:
    parts, (x, offsets) = layers(**{which: 16}), problem()
    torch.testing.assert_close(sparse_attention(*parts, x, offsets, 2), composed(parts, x, offsets))
    assert not fused


def test_parts_are_called_for_few_or_long_sequences_and_narrow_heads(fused: list[int]) -> None:
    parts = layers()
    for lengths, heads in (((50,) * 7, 2), ((900,) * 8, 2), ((7, 12, 0, 30) * 4, 16)):
        x, offsets = problem(lengths)
        torch.testing.assert_close(sparse_attention(*parts, x, offsets, heads), composed(parts, x, offsets, heads))
    assert not fused


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_goes_in_and_out(which: int, register: str, fused: list[int]) -> None:
    parts, (x, offsets), seen = layers(), problem(), []
    handle = getattr(parts[which], register)(lambda *_: seen.append(1))
    y = sparse_attention(*parts, x, offsets, 2)
    assert len(seen) == 1
    assert not fused
    handle.remove()
    torch.testing.assert_close(sparse_attention(*parts, x, offsets, 2), y, rtol=1e-4, atol=1e-4)
    assert len(fused) == len(seen) == 1


def test_an_activation_is_applied(fused: list[int]) -> None:
    x, offsets = problem()
    for which in range(4):
        parts = layers()
        parts[which].activation = "gelu"
        torch.testing.assert_close(sparse_attention(*parts, x, offsets, 2), composed(parts, x, offsets))
    assert not fused


def test_autocast_computes_in_the_dtype_of_the_values(fused: list[int]) -> None:
    parts, (x, offsets) = layers(), problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_attention(*parts, x.bfloat16(), offsets, 2)
    assert y.dtype is torch.float32
    assert torch.equal(y, sparse_attention(*parts, x.bfloat16().float(), offsets, 2))
    assert len(fused) == 2


def test_bad_arguments_are_named() -> None:
    parts, (x, offsets) = layers(), problem()
    for heads in (0, 3):
        with pytest.raises(RegrowError, match=f"heads is {heads}"):
            sparse_attention(*parts, x, offsets, heads)
    with pytest.raises(RegrowError, match="p is 1"):
        sparse_attention(*parts, x, offsets, 2, p=1.0, training=False)
    with pytest.raises(RegrowError, match="x has 60"):
        sparse_attention(*parts, x[:, :60], offsets, 2)
    with pytest.raises(RegrowError, match="output has 64"):
        sparse_attention(*parts[:3], parts[0], x, offsets, 2)
    with pytest.raises(RegrowError, match="value has 192"):
        sparse_attention(*parts[:2], parts[3], parts[3], x, offsets, 2)
