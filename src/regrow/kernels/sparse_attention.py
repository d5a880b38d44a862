r"""The attention half of a transformer layer as one operator: ``regrow::sparse_attention`` and its gradient.

Two block-sparse products with self-attention between them, sequence by sequence, so that queries, keys and values
exist in the caches only. The backward pass computes them again. float32 on a CPU runs the compiled kernels where a
head's width is a multiple of 16 and of the block size, everything else a composition of the separate operations.
"""

from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu, reference
from regrow.kernels.attention import reference_attention, reference_attention_backward
from regrow.kernels.checks import check_offsets, check_offsets_contents, check_tensor
from regrow.kernels.dropout import dropout_threshold, unsigned_seed
from regrow.kernels.pair import (
    INDEX1,
    INDEX2,
    check_pair,
    check_pair_contents,
    chosen,
    empty_gradients,
    pair_gradients,
    pair_of,
)
from regrow.kernels.reference import Weight
from regrow.kernels.register import register_operator

_OPTIONS = "int heads, float scale, float p, SymInt seed"

torch.library.define(
    "regrow::sparse_attention",
    f"(Tensor x, Tensor offsets, Tensor values1, Tensor? bias1, {INDEX1}, Tensor values2, Tensor? bias2, {INDEX2},"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "regrow::sparse_attention_backward",
    "(Tensor g, Tensor x, Tensor lse, Tensor attended, Tensor offsets,"
    f" Tensor values1, Tensor? bias1, {INDEX1}, Tensor values2, {INDEX2}, {_OPTIONS},"
    " bool need_x, bool need_values1, bool need_bias1, bool need_values2, bool need_bias2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_FORWARD = torch.ops.regrow.sparse_attention.default
_BACKWARD = torch.ops.regrow.sparse_attention_backward.default


def sparse_attention(
    x: Tensor,
    offsets: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    row_ptr1: Tensor,
    col_idx1: Tensor,
    slot1: Tensor,
    values2: Tensor,
    bias2: Tensor | None,
    row_ptr2: Tensor,
    col_idx2: Tensor,
    slot2: Tensor,
    heads: int,
    scale: float,
    p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Self-attention between two sparse linear layers: ``y = attention(x W1^T + bias1) W2^T + bias2``.

    :func:`regrow.kernels.attention` says what ``attention`` is and which probabilities a seed drops: they are the same
    here. ``x``, ``lse`` and ``attended`` are kept for the backward pass, which computes ``x W1^T + bias1`` again.
    Differentiable once.

    Args:
        x: ``[N, in]``, any strides.
        offsets: int32 ``[B + 1]``, from 0 to ``N``: sequence ``s`` is the tokens ``offsets[s]`` to ``offsets[s + 1]``.
        values1: ``[n_blocks1, b, b]``, the blocks of ``W1 [3 * heads * d, in]``, the dtype of ``x``: the rows for
            queries, for keys and for values, each by heads.
        bias1: ``[3 * heads * d]`` or None.
        row_ptr1, col_idx1, slot1: of ``W1``, see :mod:`regrow.kernels`.
        values2: ``[n_blocks2, b, b]``, the blocks of ``W2 [out, heads * d]``, the block size and dtype of ``values1``.
        bias2: ``[out]`` or None.
        row_ptr2, col_idx2, slot2: of ``W2``.
        heads: how many.
        scale: of the scores, usually ``1 / sqrt(d)``.
        p: share of probabilities that are dropped, in [0, 1).
        seed: of the mask.

    Returns:
        ``y [N, out]``; and without a gradient ``lse [heads, N]``, in float32 at least, and ``attended [N, heads * d]``,
        the output of attention.

    Raises:
        RegrowError: shapes, dtypes, devices or block sizes disagree, an index is out of range or order, ``offsets``
            does not rise from 0 to ``N``, or ``p`` is out of range.

    One head of width 1, and weights of single elements: queries and keys are zero, values are ``x``, so that each
    token gets ten times the mean of its sequence.

    >>> w1 = [torch.tensor(i, dtype=torch.int32) for i in ([0, 0, 0, 1], [0], [0])]
    >>> w2 = [torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [0], [0])]
    >>> one, x = torch.ones(1, 1, 1), torch.tensor([[5.0], [1.0], [3.0]])
    >>> offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> sparse_attention(x, offsets, one, None, *w1, 10 * one, None, *w2, 1, 1.0)[0]
    tensor([[50.],
            [20.],
            [20.]])

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2; the backward pass: Dao et al. 2022, arXiv 2205.14135,
    and Chen et al. 2016, arXiv 1604.06174, for computing activations again.
    """
    index1, index2 = (row_ptr1, col_idx1, slot1), (row_ptr2, col_idx2, slot2)
    return _FORWARD(x, offsets, values1, bias1, *index1, values2, bias2, *index2, heads, scale, p, seed)


def supports(x: Tensor, width: int, block_size: int) -> bool:
    """Whether the compiled kernels handle heads of this width."""
    return cpu.supports(x, block_size) and width % 16 == 0 and width % block_size == 0


# ---- reference ------------------------------------------------------------------------------------


def reference_sparse_attention(
    x: Tensor, offsets: Tensor, first: Weight, second: Weight, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sparse_attention` in plain PyTorch: any dtype and device, and autograd goes through it."""
    attended, lse = reference_attention(reference.spmm(x, *first), offsets, *options)
    return reference.spmm(attended, *second), lse, attended


def reference_sparse_attention_backward(
    g: Tensor,
    x: Tensor,
    lse: Tensor,
    attended: Tensor,
    offsets: Tensor,
    first: Weight,
    second: Weight,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`sparse_attention` in ``x, values1, bias1, values2, bias2``, in plain PyTorch."""
    da, dvalues2, dbias2 = reference.spmm_backward(g, attended, second)
    dqkv = reference_attention_backward(da, reference.spmm(x, *first), attended, lse, offsets, *options)
    return *reference.spmm_backward(dqkv, x, first), dvalues2, dbias2


# ---- checks ---------------------------------------------------------------------------------------


def _check(x: Tensor, offsets: Tensor, first: Weight, second: Weight, heads: int, p: float) -> tuple[int, int]:
    """The width of a head, and how many of 65536 probabilities are dropped."""
    check_pair(x, first, second)
    check_offsets(offsets, x.device)
    if heads < 1:
        raise RegrowError(f"heads is {heads}; it must be positive")
    rows, b = first.out_features, first.values.shape[1]
    if not rows or rows % (3 * heads) or rows // 3 % b:
        raise RegrowError(
            f"row_ptr1 is for {rows} rows; {heads} heads need a multiple of {3 * heads}, and blocks one of {3 * b}"
        )
    return rows // (3 * heads), dropout_threshold(p)


def _compiled(x: Tensor, offsets: Tensor, width: int, first: Weight, second: Weight) -> bool:
    """Whether the compiled kernels do it; if not, what they check is checked here."""
    if supports(x, width, first.values.shape[1]):
        return True
    check_offsets_contents(offsets, x.shape[0])
    check_pair_contents(x, first, first.out_features // 3, second)
    return False


# ---- operators ------------------------------------------------------------------------------------


def _forward(x: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weights, options = rest[:10], rest[10:]
    heads, scale, p, seed = options
    first, second = pair_of(weights)
    width, threshold = _check(x, offsets, first, second, heads, p)
    if not _compiled(x, offsets, width, first, second):
        return reference_sparse_attention(x, offsets, first, second, *options)
    results = _forward_fake(x, offsets, *rest)
    sizes = _sizes(x, offsets, heads, width, first, second)
    cpu.call("sparse_attention", (x, offsets, *weights, *results), *sizes, scale, unsigned_seed(seed), threshold)
    return results


def _backward(g: Tensor, x: Tensor, lse: Tensor, attended: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, options, needed = rest[:9], rest[9:13], rest[13:]
    heads, scale, p, seed = options
    first, second = pair_of(weights)
    width, threshold = _check(x, offsets, first, second, heads, p)
    n, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    check_tensor("g", g, (n, second.out_features), x.dtype, x.device)
    check_tensor("lse", lse, (heads, n), wide, x.device)
    check_tensor("attended", attended, (n, heads * width), x.dtype, x.device)
    saved, grads = (g, x, lse, attended, offsets), empty_gradients(g, x, first, second, needed)
    if not _compiled(x, offsets, width, first, second):
        return chosen(needed, reference_sparse_attention_backward(*saved, first, second, *options), grads)
    arrays, sizes = (*saved, *weights, *chosen(needed, grads)), _sizes(x, offsets, heads, width, first, second)
    cpu.call("sparse_attention_backward", arrays, *sizes, scale, unsigned_seed(seed), threshold)
    return grads


def _sizes(x: Tensor, offsets: Tensor, heads: int, width: int, first: Weight, second: Weight) -> tuple[int, ...]:
    n_blocks1, b, _ = first.values.shape
    sequences = x.shape[0], offsets.shape[0] - 1, heads, width
    return *sequences, x.shape[1] // b, second.out_features // b, n_blocks1, second.values.shape[0], b


def _forward_fake(x: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (first, second), heads, n = pair_of(rest[:10]), rest[10], x.shape[0]
    lse = x.new_empty(heads, n, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(n, second.out_features), lse, x.new_empty(n, first.out_features // 3)


def _backward_fake(
    g: Tensor, x: Tensor, lse: Tensor, attended: Tensor, offsets: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_gradients(g, x, *pair_of(rest[:9]), rest[13:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, offsets, *rest = inputs
    _y, lse, attended = output
    ctx.options = rest[10:]
    ctx.mark_non_differentiable(lse, attended)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lse, attended, offsets, *rest[:6], *rest[7:10])  # all but the second bias


def _gradient(ctx: Any, g: Tensor | None, *_others: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 16
    need_x, _, *needs = ctx.needs_input_grad
    dx, *of_weights = pair_gradients(_BACKWARD, (g, *ctx.saved_tensors, *ctx.options), need_x, needs)
    return dx, None, *of_weights, *[None] * 4


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("sparse_attention has no second derivative")


register_operator("sparse_attention", _forward, _forward_fake, _gradient, _setup)
register_operator("sparse_attention_backward", _backward, _backward_fake, _no_second_gradient, lambda *context: None)
