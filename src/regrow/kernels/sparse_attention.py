r"""The attention half of a transformer layer as one operator: ``regrow::sparse_attention`` and its gradient.

Two block-sparse products with self-attention between them, sequence by sequence, so that queries, keys and values
exist in the caches only. The backward pass computes them again. float32 on a CPU runs the compiled kernels where a
head's width is a multiple of 16 and of the block size, everything else a composition of the separate operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu, reference
from regrow.kernels.attention import reference_attention, reference_attention_backward
from regrow.kernels.dropout import dropout_threshold
from regrow.kernels.ffn import check_blocks
from regrow.kernels.ops import check_contents
from regrow.kernels.register import register_operator

_INDEX1, _INDEX2 = (f"Tensor row_ptr{i}, Tensor col_idx{i}, Tensor slot{i}" for i in (1, 2))
_OPTIONS = "int heads, float scale, float p, SymInt seed"

torch.library.define(
    "regrow::sparse_attention",
    f"(Tensor x, Tensor offsets, Tensor values1, Tensor? bias1, {_INDEX1}, Tensor values2, Tensor? bias2, {_INDEX2},"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "regrow::sparse_attention_backward",
    "(Tensor g, Tensor x, Tensor lse, Tensor attended, Tensor offsets,"
    f" Tensor values1, Tensor? bias1, {_INDEX1}, Tensor values2, {_INDEX2}, {_OPTIONS},"
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
    x: Tensor,
    offsets: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    index1: Sequence[Tensor],
    values2: Tensor,
    bias2: Tensor | None,
    index2: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sparse_attention` in plain PyTorch: any dtype and device, and autograd goes through it."""
    attended, lse = reference_attention(reference.spmm(x, values1, bias1, index1), offsets, *options)
    return reference.spmm(attended, values2, bias2, index2), lse, attended


def reference_sparse_attention_backward(
    g: Tensor,
    x: Tensor,
    lse: Tensor,
    attended: Tensor,
    offsets: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    index1: Sequence[Tensor],
    values2: Tensor,
    index2: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`sparse_attention` in ``x, values1, bias1, values2, bias2``, in plain PyTorch."""
    b = values1.shape[1]
    da = reference.spmm_t(g, values2, index2, attended.shape[1])
    qkv = reference.spmm(x, values1, bias1, index1)
    dqkv = reference_attention_backward(da, qkv, attended, lse, offsets, *options)
    dx, dvalues1 = reference.spmm_t(dqkv, values1, index1, x.shape[1]), reference.sddmm(dqkv, x, index1, b)
    return dx, dvalues1, dqkv.sum(0), reference.sddmm(g, attended, index2, b), g.sum(0)


# ---- checks ---------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    offsets: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    index1: Sequence[Tensor],
    values2: Tensor,
    bias2: Tensor | None,
    index2: Sequence[Tensor],
    heads: int,
    p: float,
) -> tuple[int, int, int]:
    """The width of a head, ``out``, and how many of 65536 probabilities are dropped."""
    if not x.is_floating_point():
        raise RegrowError(f"x is {x.dtype}; it must be floating point")
    for name, tensor in (("values1", values1), ("bias1", bias1), ("values2", values2), ("bias2", bias2)):
        if tensor is not None and (tensor.dtype is not x.dtype or tensor.device != x.device):
            raise RegrowError(f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
    check_blocks("values1", values1, index1)
    check_blocks("values2", values2, index2)
    b = values1.shape[1]
    if values2.shape[1] != b:
        raise RegrowError(f"values1 has blocks of {b} and values2 blocks of {values2.shape[1]}; they must agree")
    if x.dim() != 2 or x.shape[1] % b:
        raise RegrowError(f"x is {list(x.shape)}; blocks of {b} need [N, a multiple of {b}]")
    if offsets.dtype is not torch.int32 or offsets.dim() != 1 or not offsets.shape[0]:
        raise RegrowError(f"offsets must be a 1-D int32 tensor of one entry at least, not {offsets.dim()}-D")
    if offsets.device != x.device:
        raise RegrowError(f"offsets is on {offsets.device}, x is on {x.device}")
    if heads < 1:
        raise RegrowError(f"heads is {heads}; it must be positive")
    width, out = ((index[0].shape[0] - 1) * b for index in (index1, index2))
    if not width or width % (3 * heads) or width // 3 % b:
        raise RegrowError(
            f"row_ptr1 is for {width} rows; {heads} heads need a multiple of {3 * heads}, and blocks one of {3 * b}"
        )
    for name, bias, size in (("bias1", bias1, width), ("bias2", bias2, out)):
        if bias is not None and bias.shape != (size,):
            raise RegrowError(f"{name} is {list(bias.shape)}; expected [{size}]")
    return width // (3 * heads), out, dropout_threshold(p)


def _compiled(x: Tensor, offsets: Tensor, width: int, hidden: int, b: int, *indices: Sequence[Tensor]) -> bool:
    """Whether the compiled kernels do it; if not, what they check is checked here."""
    if supports(x, width, b):
        return True
    if int(offsets[0]) != 0 or int(offsets[-1]) != x.shape[0] or bool((offsets.diff() < 0).any()):
        raise RegrowError(f"offsets must rise from 0 to the number of tokens, {x.shape[0]}")
    check_contents(indices[0], x.shape[1] // b, "1")
    check_contents(indices[1], hidden // b, "2")
    return False


# ---- operators ------------------------------------------------------------------------------------


def _lse(x: Tensor, heads: int) -> Tensor:
    return x.new_empty(heads, x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _forward(
    x: Tensor, offsets: Tensor, values1: Tensor, bias1: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    index1, (values2, bias2), index2, options = rest[:3], rest[3:5], rest[5:8], rest[8:]
    heads, scale, p, seed = options
    width, out, threshold = _check(x, offsets, values1, bias1, index1, values2, bias2, index2, heads, p)
    n, hidden, b = x.shape[0], heads * width, values1.shape[1]
    if not _compiled(x, offsets, width, hidden, b, index1, index2):
        return reference_sparse_attention(x, offsets, values1, bias1, index1, values2, bias2, index2, *options)
    y, lse, attended = x.new_empty(n, out), _lse(x, heads), x.new_empty(n, hidden)
    arrays = x, offsets, values1, bias1, *index1, values2, bias2, *index2, y, lse, attended
    cpu.call(
        "sparse_attention", arrays, *_sizes(x, offsets, heads, width, out, values1, values2, scale, seed, threshold)
    )
    return y, lse, attended


def _backward(
    g: Tensor,
    x: Tensor,
    lse: Tensor,
    attended: Tensor,
    offsets: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    index1, values2, index2, options, needed = rest[:3], rest[3], rest[4:7], rest[7:11], rest[11:]
    heads, scale, p, seed = options
    width, out, threshold = _check(x, offsets, values1, bias1, index1, values2, None, index2, heads, p)
    hidden, b = heads * width, values1.shape[1]
    _check_saved(g, x, lse, attended, heads, hidden, out)
    grads = _empty_gradients(g, x, values1, values2, 3 * hidden, needed)
    if not _compiled(x, offsets, width, hidden, b, index1, index2):
        saved = g, x, lse, attended, offsets
        full = reference_sparse_attention_backward(*saved, values1, bias1, index1, values2, index2, *options)
        return tuple(grad if need else none for grad, none, need in zip(full, grads, needed, strict=True))
    written = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    arrays = g, x, lse, attended, offsets, values1, bias1, *index1, values2, *index2, *written
    sizes = _sizes(x, offsets, heads, width, out, values1, values2, scale, seed, threshold)
    cpu.call("sparse_attention_backward", arrays, *sizes)
    return grads


def _check_saved(g: Tensor, x: Tensor, lse: Tensor, attended: Tensor, heads: int, hidden: int, out: int) -> None:
    n, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    for name, tensor, shape, dtype in (
        ("g", g, (n, out), x.dtype),
        ("lse", lse, (heads, n), wide),
        ("attended", attended, (n, hidden), x.dtype),
    ):
        if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != x.device:
            raise RegrowError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; "
                f"expected {list(shape)} {dtype} on {x.device}"
            )


def _sizes(
    x: Tensor,
    offsets: Tensor,
    heads: int,
    width: int,
    out: int,
    values1: Tensor,
    values2: Tensor,
    scale: float,
    seed: int,
    threshold: int,
) -> tuple[Any, ...]:
    b, counts = values1.shape[1], (values1.shape[0], values2.shape[0])
    sequences = x.shape[0], offsets.shape[0] - 1, heads, width
    return *sequences, x.shape[1] // b, out // b, *counts, b, scale, seed & 0xFFFFFFFFFFFFFFFF, threshold


def _empty_gradients(
    g: Tensor, x: Tensor, values1: Tensor, values2: Tensor, width: int, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    shapes = x.shape, values1.shape, (width,), values2.shape, (g.shape[1],)
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True))


def _forward_fake(x: Tensor, offsets: Tensor, values1: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, rows1, rows2, heads = values1.shape[1], rest[1].shape[0] - 1, rest[6].shape[0] - 1, rest[9]
    return x.new_empty(x.shape[0], rows2 * b), _lse(x, heads), x.new_empty(x.shape[0], rows1 // 3 * b)


def _backward_fake(
    g: Tensor, x: Tensor, lse: Tensor, attended: Tensor, offsets: Tensor, values1: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _empty_gradients(g, x, values1, rest[4], 3 * attended.shape[1], rest[12:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, offsets, values1, bias1, *index1, values2, _bias2 = inputs[:9]
    _y, lse, attended = output
    ctx.options = inputs[12:]
    ctx.mark_non_differentiable(lse, attended)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lse, attended, offsets, values1, bias1, *index1, values2, *inputs[9:12])


def _gradient(ctx: Any, g: Tensor | None, *_others: None) -> tuple[Tensor | None, ...]:
    need_x, _, need_values1, need_bias1, _, _, _, need_values2, need_bias2 = ctx.needs_input_grad[:9]
    needed = need_x, need_values1, need_bias1, need_values2, need_bias2
    if g is None:
        return (None,) * 16
    grads = _BACKWARD(g, *ctx.saved_tensors, *ctx.options, *needed)
    dx, dvalues1, dbias1, dvalues2, dbias2 = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return dx, None, dvalues1, dbias1, None, None, None, dvalues2, dbias2, *[None] * 7


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("sparse_attention has no second derivative")


register_operator("sparse_attention", _forward, _forward_fake, _gradient, _setup)
register_operator("sparse_attention_backward", _backward, _backward_fake, _no_second_gradient, lambda *context: None)
