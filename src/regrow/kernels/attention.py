r"""Self-attention over packed sequences as a torch operator: ``regrow::attention``, and its gradient.

float32 on a CPU runs the compiled kernels, everything else the reference, which is the ground truth of the tests.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu
from regrow.kernels.checks import check_offsets, check_offsets_contents, check_tensor
from regrow.kernels.dropout import dropout_factors, dropout_threshold, unsigned_seed
from regrow.kernels.register import register_operator

_OPTIONS = "int heads, float scale, float p, SymInt seed"
torch.library.define("regrow::attention", f"(Tensor qkv, Tensor offsets, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "regrow::attention_backward",
    f"(Tensor g, Tensor qkv, Tensor out, Tensor lse, Tensor offsets, {_OPTIONS}) -> Tensor",
)
_ATTENTION, _ATTENTION_BACKWARD = torch.ops.regrow.attention.default, torch.ops.regrow.attention_backward.default


def attention(
    qkv: Tensor, offsets: Tensor, heads: int, scale: float, p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Self-attention of every token to all tokens of its own sequence.

    For each sequence and head, with its queries, keys and values ``Q``, ``K``, ``V`` ``[length, d]``:

    .. math:: P = \mathrm{softmax}(scale \cdot Q K^T), \qquad out = \mathrm{dropout}(P) V

    The backward pass makes the scores anew from ``lse``, the logarithm of the softmax's denominator, so that nothing
    of their size is kept. Differentiable once, in ``qkv``.

    Args:
        qkv: ``[N, 3 * heads * d]``, any strides. Each row holds a token's query, key and value, and each of them the
            ``heads`` parts one after the other.
        offsets: int32 ``[B + 1]``, from 0 to ``N``: sequence ``s`` is the tokens ``offsets[s]`` to ``offsets[s + 1]``.
        heads: how many.
        scale: of the scores, usually ``1 / sqrt(d)``.
        p: share of probabilities that are dropped, in [0, 1).
        seed: of the mask. The probability of head ``h``, query token ``t`` (counted over all sequences) and key ``k``
            (counted within the sequence) is the element ``(h * N + t, k)`` of :mod:`regrow.kernels.dropout`'s mask.

    Returns:
        ``out [N, heads * d]``, and ``lse [heads, N]`` in float32 at least, which has no gradient.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, ``offsets`` does not rise from 0 to ``N``, or ``p`` is out of
            range.

    A sequence of one token, which can only look at itself, and one of two, with one head of width 1:

    >>> qkv = torch.tensor([[1.0, 1.0, 5.0], [0.0, 3.0, 1.0], [0.0, 7.0, 3.0]])
    >>> attention(qkv, torch.tensor([0, 1, 3], dtype=torch.int32), 1, 1.0)[0]
    tensor([[5.],
            [2.],
            [2.]])

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2; the backward pass: Dao et al. 2022, arXiv 2205.14135.
    """
    return _ATTENTION(qkv, offsets, heads, scale, p, seed)


# ---- reference ------------------------------------------------------------------------------------


def reference_attention(
    qkv: Tensor, offsets: Tensor, heads: int, scale: float, p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`attention` in plain PyTorch, a sequence at a time: any dtype and device, and autograd goes through it."""
    n, dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    outs, lses = [qkv.new_empty(0, heads * dim)], [_wide(qkv.new_empty(heads, 0))]
    for first, last in _sequences(offsets):
        q, k, v = _split(qkv[first:last], heads)
        scores = scale * q @ k.mT
        probabilities = torch.softmax(scores, -1) * _factors(n, first, last, heads, p, seed, scores)
        outs.append((probabilities @ v).transpose(0, 1).reshape(last - first, heads * dim).to(qkv.dtype))
        lses.append(torch.logsumexp(scores, -1))
    return torch.cat(outs), torch.cat(lses, 1)


def reference_attention_backward(
    g: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    heads: int,
    scale: float,
    p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The gradient of :func:`attention` in plain PyTorch, by its formula rather than by autograd.

    With ``f`` the factors of dropout and ``D = rowsum(g * out)``: ``dV = (P * f)^T g``, ``dS = P * (f * g V^T - D)``,
    ``dQ = scale dS K``, ``dK = scale dS^T Q``.
    """
    n, grads = qkv.shape[0], [qkv.new_empty(0, qkv.shape[1])]
    for first, last in _sequences(offsets):
        q, k, v = _split(qkv[first:last], heads)
        (gs,), (os,) = _split(g[first:last], heads, 1), _split(out[first:last], heads, 1)
        probabilities = torch.exp(scale * q @ k.mT - lse[:, first:last, None])
        factors = _factors(n, first, last, heads, p, seed, probabilities)
        dv = (probabilities * factors).mT @ gs
        ds = probabilities * (factors * (gs @ v.mT) - (gs * os).sum(-1, keepdim=True)) * scale
        parts = torch.stack([ds @ k, ds.mT @ q, dv])  # [3, heads, length, d]
        grads.append(parts.permute(2, 0, 1, 3).reshape(last - first, qkv.shape[1]).to(qkv.dtype))
    return torch.cat(grads)


def _sequences(offsets: Tensor) -> Iterator[tuple[int, int]]:
    return ((first, last) for first, last in pairwise(offsets.tolist()) if first < last)


def _wide(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _split(x: Tensor, heads: int, parts: int = 3) -> Tensor:
    """``[length, parts * heads * d]`` -> ``[parts, heads, length, d]``."""
    dim = x.shape[1] // (parts * heads)
    return _wide(x).reshape(x.shape[0], parts, heads, dim).permute(1, 2, 0, 3)


def _factors(n: int, first: int, last: int, heads: int, p: float, seed: int, like: Tensor) -> Tensor | float:
    """Dropout's factors for one sequence: ``[heads, length, length]``."""
    if not p:
        return 1.0
    length = last - first
    rows = (
        dropout_factors(seed, length, length, p, like.dtype, like.device, first_row=head * n + first)
        for head in range(heads)
    )
    return torch.stack(list(rows))


# ---- operators ------------------------------------------------------------------------------------


def _check(qkv: Tensor, offsets: Tensor, heads: int, p: float) -> tuple[int, int]:
    """The width of a head, and how many of 65536 probabilities are dropped."""
    if not qkv.is_floating_point():
        raise RegrowError(f"qkv is {qkv.dtype}; it must be floating point")
    if heads < 1:
        raise RegrowError(f"heads is {heads}; it must be positive")
    if qkv.dim() != 2 or not qkv.shape[1] or qkv.shape[1] % (3 * heads):
        raise RegrowError(f"qkv is {list(qkv.shape)}; {heads} heads need [N, a multiple of {3 * heads}]")
    check_offsets(offsets, qkv.device)
    return qkv.shape[1] // (3 * heads), dropout_threshold(p)


def _check_backward(g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> None:
    n, hidden = qkv.shape[0], qkv.shape[1] // 3
    wide = torch.promote_types(qkv.dtype, torch.float32)
    check_tensor("g", g, (n, hidden), qkv.dtype, qkv.device)
    check_tensor("out", out, (n, hidden), qkv.dtype, qkv.device)
    check_tensor("lse", lse, (heads, n), wide, qkv.device)


def _native(qkv: Tensor) -> bool:
    return qkv.is_cpu and qkv.dtype is torch.float32


def _attention(qkv: Tensor, offsets: Tensor, heads: int, scale: float, p: float, seed: int) -> tuple[Tensor, Tensor]:
    dim, threshold = _check(qkv, offsets, heads, p)
    n = qkv.shape[0]
    if not _native(qkv):
        check_offsets_contents(offsets, n)
        return reference_attention(qkv, offsets, heads, scale, p, seed)
    out, lse = qkv.new_empty(n, heads * dim), qkv.new_empty(heads, n)
    sizes = n, offsets.shape[0] - 1, heads, dim, scale, unsigned_seed(seed), threshold
    cpu.call("attention", (qkv, offsets, out, lse), *sizes)
    return out, lse


def _attention_backward(
    g: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    heads: int,
    scale: float,
    p: float,
    seed: int,
) -> Tensor:
    dim, threshold = _check(qkv, offsets, heads, p)
    _check_backward(g, qkv, out, lse, heads)
    n = qkv.shape[0]
    if not _native(qkv):
        check_offsets_contents(offsets, n)
        return reference_attention_backward(g, qkv, out, lse, offsets, heads, scale, p, seed)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    sizes = n, offsets.shape[0] - 1, heads, dim, scale, unsigned_seed(seed), threshold
    cpu.call("attention_backward", (g, qkv, out, lse, offsets, dqkv), *sizes)
    return dqkv


def _attention_fake(qkv: Tensor, offsets: Tensor, heads: int, *options: Any) -> tuple[Tensor, Tensor]:
    n, width = qkv.shape
    return qkv.new_empty(n, width // 3), _wide(qkv.new_empty(heads, n))


def _attention_backward_fake(g: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, offsets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, offsets)


def _gradient(ctx: Any, g: Tensor | None, _g_lse: None) -> tuple[Tensor | None, ...]:
    dqkv = None if g is None else _ATTENTION_BACKWARD(g, *ctx.saved_tensors, *ctx.options)
    return dqkv, *[None] * 5


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("attention has no second derivative")


register_operator("attention", _attention, _attention_fake, _gradient, _setup)
register_operator(
    "attention_backward",
    _attention_backward,
    _attention_backward_fake,
    _no_second_gradient,
    lambda *context: None,
)
