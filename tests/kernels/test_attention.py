"""Attention against its formula in float64, and what the operator promises besides."""

import pytest
import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import attention
from regrow.kernels.attention import reference_attention, reference_attention_backward
from regrow.kernels.dropout import dropout_factors

from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense
from .problems import normal

# Lengths of the sequences: one token; none at all; none in between; tails of every kind; several blocks of queries.
LENGTHS = [[1], [0], [], [5, 0, 0, 3], [16, 17, 1, 33], [64, 65, 130], [300]]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def problem(lengths: list[int], heads: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """qkv, offsets and a cotangent."""
    n, hidden = sum(lengths), heads * dim
    return normal(n, 3 * hidden, seed=1, dtype=dtype), offsets_of(lengths), normal(n, hidden, seed=2, dtype=dtype)


def check(
    lengths: list[int], heads: int, dim: int, p: float = 0.0, strided: bool = False, scale: float | None = None
) -> None:
    """Values, log-sum-exp and gradient, against the formulas in float32 and autograd in float64.

    No autograd in float32: it would keep the probabilities, and be exacter than the float32 log-sum-exp allows.
    """
    qkv, offsets, g = problem(lengths, heads, dim)
    if strided:
        qkv, g = (torch.stack([t, t], dim=-1)[..., 0] for t in (qkv, g))
    options = heads, dim**-0.5 if scale is None else scale, p, 1234567890123456789

    def run(op, dtype: torch.dtype) -> list[Tensor]:
        x = qkv.to(dtype).requires_grad_()
        out, lse = op(x, offsets, *options)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, x, g.to(dtype))]

    dense = reference_attention(qkv, offsets, *options)
    dense = [*dense, reference_attention_backward(g, qkv, *dense, offsets, *options)]
    runs = run(attention, torch.float32), dense, run(reference_attention, torch.float64)
    for factor, parts in zip((VALUE_FACTOR, VALUE_FACTOR, GRADIENT_FACTOR), zip(*runs, strict=True), strict=True):
        assert_as_good_as_dense(*parts, factor)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dim", [1, 7, 32, 64, 80])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradient(lengths: list[int], dim: int, p: float, isa: str) -> None:
    if sum(lengths):
        check(lengths, 3, dim, p)
    else:
        qkv, offsets, g = problem(lengths, 3, dim)
        out, lse = attention(qkv.requires_grad_(), offsets, 3, 1.0, p)
        out.backward(g)
        assert out.shape == (0, 3 * dim) and lse.shape == (3, 0) and qkv.grad.shape == qkv.shape


def test_many_keys(isa: str) -> None:
    check([1100], 1, 16, 0.1)


def test_strided_operands() -> None:
    check([20, 11], 2, 8, 0.2, strided=True)


def test_scores_far_apart(isa: str) -> None:
    """Differences that leave the range of float32's exponential: a probability of zero, not an overflow."""
    check([40, 7], 2, 64, scale=20.0)


def test_what_is_no_number_stays_in_its_sequence(isa: str) -> None:
    qkv, offsets, g = problem([20, 33], 2, 16)
    qkv[3, 40] = torch.nan
    qkv[5, 3] = torch.inf
    out, lse = attention(qkv, offsets, 2, 0.25)
    expected, expected_lse = reference_attention(qkv, offsets, 2, 0.25)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    dqkv = torch.ops.regrow.attention_backward(g, qkv, out, lse, offsets, 2, 0.25, 0.0, 0)
    assert dqkv[:20].isnan().any() and not dqkv[20:].isnan().any()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_is_the_formula(p: float) -> None:
    """Written down once more, a query at a time; and its gradient by finite differences."""
    qkv, offsets, _ = problem([3, 0, 4], 2, 2, torch.float64)
    out, lse = reference_attention(qkv, offsets, 2, 0.7, p, 5)
    mask = dropout_factors(5, 14, 4, p, torch.float64)
    for head in range(2):
        q, k, v = (qkv[:, part * 4 + head * 2 :][:, :2] for part in range(3))
        for t in range(7):
            keys = slice(0, 3) if t < 3 else slice(3, 7)
            scores = 0.7 * k[keys] @ q[t]
            weights = scores.exp() / scores.exp().sum() * mask[head * 7 + t, : len(scores)]
            torch.testing.assert_close(out[t, head * 2 :][:2], weights @ v[keys])
            torch.testing.assert_close(lse[head, t], scores.exp().sum().log())
    assert torch.autograd.gradcheck(lambda x: reference_attention(x, offsets, 2, 0.7, p, 5)[0], qkv.requires_grad_())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p: float) -> None:
    """The operator's own gradient, in float64 by the reference's formula."""
    qkv, offsets, _ = problem([3, 1, 4], 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: attention(x, offsets, 2, 0.7, p, 5)[0], qkv.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(p: float, dtype: torch.dtype) -> None:
    qkv, offsets, g = problem([5, 9], 2, 8, dtype)
    options = 2, 0.5, p, -3
    torch.library.opcheck(torch.ops.regrow.attention.default, (qkv.clone().requires_grad_(), offsets, *options))
    saved = attention(qkv, offsets, *options)
    torch.library.opcheck(torch.ops.regrow.attention_backward.default, (g, qkv, *saved, offsets, *options))


def test_low_precision_goes_to_the_reference() -> None:
    qkv, offsets, g = problem([5, 9], 2, 8)
    low = qkv.bfloat16().requires_grad_()
    out, lse = attention(low, offsets, 2, 0.5)
    assert out.dtype is torch.bfloat16 and lse.dtype is torch.float32
    [grad] = torch.autograd.grad(out, low, g.bfloat16())
    saved = attention(low.detach().float(), offsets, 2, 0.5)
    torch.testing.assert_close(out, saved[0].bfloat16())
    exact = reference_attention_backward(
        g.bfloat16().double(), low.double(), *map(Tensor.double, saved), offsets, 2, 0.5
    )
    torch.testing.assert_close(grad.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_same_bits_for_any_number_of_threads(p: float, isa: str) -> None:
    qkv, offsets, g = problem([50, 0, 3, 128, 70], 3, 16)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out, lse = attention(qkv, offsets, 3, 0.25, p, 9)
        dqkv = torch.ops.regrow.attention_backward(g, qkv, out, lse, offsets, 3, 0.25, p, 9)
        results.append((out, lse, dqkv))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivative_is_refused() -> None:
    qkv, offsets, _ = problem([4], 1, 4)
    out, _ = attention(qkv.requires_grad_(), offsets, 1, 1.0)
    [grad] = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RegrowError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("content", [[1, 5], [0, 4], [0, 6], [0, 3, 2, 5], [0, -1, 5], [0, 2147483647, 5], [0]])
def test_bad_offsets_are_named(content: list[int], dtype: torch.dtype) -> None:
    qkv, _, g = problem([5], 2, 4, dtype)
    offsets = torch.tensor(content, dtype=torch.int32)
    with pytest.raises(RegrowError, match="offsets"):
        attention(qkv, offsets, 2, 1.0)
    with pytest.raises(RegrowError, match="offsets"):
        torch.ops.regrow.attention_backward(g, qkv, g, g.new_empty(2, 5), offsets, 2, 1.0, 0.0, 0)


def test_bad_arguments_are_named() -> None:
    qkv, offsets, g = problem([5], 2, 4)
    with pytest.raises(RegrowError, match=r"qkv is torch\.int64"):
        attention(qkv.long(), offsets, 2, 1.0)
    for bad in (qkv[:, 1:], qkv[0], qkv[:, :0]):
        with pytest.raises(RegrowError, match="qkv is"):
            attention(bad, offsets, 2, 1.0)
    with pytest.raises(RegrowError, match="heads is 0"):
        attention(qkv, offsets, 0, 1.0)
    for bad in (offsets.long(), offsets[None]):
        with pytest.raises(RegrowError, match="offsets must be"):
            attention(qkv, bad, 2, 1.0)
    with pytest.raises(RegrowError, match="offsets is empty"):
        attention(qkv, offsets[:0], 2, 1.0)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(RegrowError, match="p is"):
            attention(qkv, offsets, 2, 1.0, p)
    out, lse = attention(qkv, offsets, 2, 1.0)
    backward, options = torch.ops.regrow.attention_backward, (offsets, 2, 1.0, 0.0, 0)
    with pytest.raises(RegrowError, match="g is"):
        backward(g[1:], qkv, out, lse, *options)
    with pytest.raises(RegrowError, match="out is"):
        backward(g, qkv, out.double(), lse, *options)
    with pytest.raises(RegrowError, match="lse is"):
        backward(g, qkv, out, lse[1:], *options)
