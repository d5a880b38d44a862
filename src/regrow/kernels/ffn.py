"""The feed-forward half of a transformer layer as one operator: ``regrow::ffn`` and its gradient.

Two block-sparse products with a GELU between them, tile of tokens by tile, so that nothing of the hidden width exists
outside a cache. The backward pass computes the hidden activations again instead of reading them. float32 on a CPU runs
the compiled kernels, everything else a composition of the reference operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu, reference
from regrow.kernels.ops import check_contents
from regrow.kernels.register import register_operator

_INDEX1, _INDEX2 = (f"Tensor row_ptr{i}, Tensor col_idx{i}, Tensor slot{i}" for i in (1, 2))

torch.library.define(
    "regrow::ffn",
    f"(Tensor x, Tensor values1, Tensor? bias1, {_INDEX1}, Tensor values2, Tensor? bias2, {_INDEX2}) -> Tensor",
)
torch.library.define(
    "regrow::ffn_backward",
    f"(Tensor g, Tensor x, Tensor values1, Tensor? bias1, {_INDEX1}, Tensor values2, {_INDEX2},"
    " bool need_x, bool need_values1, bool need_bias1, bool need_values2, bool need_bias2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_FFN, _FFN_BACKWARD = torch.ops.regrow.ffn.default, torch.ops.regrow.ffn_backward.default


def ffn(
    x: Tensor,
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
) -> Tensor:
    """Two sparse linear layers around the exact (erf) GELU: ``y = gelu(x W1^T + bias1) W2^T + bias2``.

    ``x`` and the weights are all that is kept for the backward pass, which computes ``gelu(x W1^T + bias1)`` again.
    Differentiable once.

    Args:
        x: ``[N, in]``, any strides.
        values1: ``[n_blocks1, b, b]``, the blocks of ``W1 [hidden, in]``, the dtype of ``x``.
        bias1: ``[hidden]`` or None.
        row_ptr1, col_idx1, slot1: of ``W1``, see :mod:`regrow.kernels`.
        values2: ``[n_blocks2, b, b]``, the blocks of ``W2 [out, hidden]``, the block size and dtype of ``values1``.
        bias2: ``[out]`` or None.
        row_ptr2, col_idx2, slot2: of ``W2``.

    Returns:
        ``y [N, out]``.

    Raises:
        RegrowError: shapes, dtypes, devices or block sizes disagree, or an index is out of range or order.

    Both weights 2 x 2, of one block:

    >>> index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [0], [0])]
    >>> w1, w2 = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]), torch.tensor([[[1.0, 0.0], [10.0, 100.0]]])
    >>> ffn(torch.tensor([[1.0, 1.0]]), w1, None, *index, w2, None, *index)
    tensor([[ 0.8413, -7.4521]])

    Reference: Hendrycks and Gimpel 2016, arXiv 1606.08415, for the GELU; Chen et al. 2016, arXiv 1604.06174, for
    computing activations again.
    """
    return _FFN(x, values1, bias1, row_ptr1, col_idx1, slot1, values2, bias2, row_ptr2, col_idx2, slot2)


# ---- checks ---------------------------------------------------------------------------------------


def check_blocks(name: str, values: Tensor, index: Sequence[Tensor]) -> None:
    if values.dim() != 3 or values.shape[1] != values.shape[2] or not values.shape[1]:
        raise RegrowError(f"{name} must be [n_blocks, b, b], not {list(values.shape)}")
    row_ptr, col_idx, slot = index
    which = name[-1]
    for other, tensor in ((f"row_ptr{which}", row_ptr), (f"col_idx{which}", col_idx), (f"slot{which}", slot)):
        if tensor.dtype is not torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise RegrowError(f"{other} must be a contiguous 1-D int32 tensor, not {tensor.dim()}-D {tensor.dtype}")
        if tensor.device != values.device:
            raise RegrowError(f"{other} is on {tensor.device}, {name} is on {values.device}")
        if tensor is not row_ptr and tensor.shape[0] != values.shape[0]:
            raise RegrowError(f"{other} has {tensor.shape[0]} entries for {values.shape[0]} blocks")
    if not row_ptr.shape[0]:
        raise RegrowError(f"row_ptr{which} is empty; it needs one entry more than there are block rows")


def _check(
    x: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    index1: Sequence[Tensor],
    values2: Tensor,
    bias2: Tensor | None,
    index2: Sequence[Tensor],
) -> tuple[int, int, int]:
    """The widths ``in, hidden, out``."""
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
    hidden, out = ((index[0].shape[0] - 1) * b for index in (index1, index2))
    for name, bias, width in (("bias1", bias1, hidden), ("bias2", bias2, out)):
        if bias is not None and bias.shape != (width,):
            raise RegrowError(f"{name} is {list(bias.shape)}; expected [{width}]")
    return x.shape[1], hidden, out


# ---- forward and gradient ---------------------------------------------------------------------------


def _compiled(
    x: Tensor, widths: tuple[int, int, int], b: int, index1: Sequence[Tensor], index2: Sequence[Tensor]
) -> bool:
    """Whether the compiled kernels do it; if not, the indices are checked here."""
    n_in, hidden, _out = widths
    if cpu.supports(x, b) and hidden:
        return True
    check_contents(index1, n_in // b, "1")
    check_contents(index2, hidden // b, "2")
    return False


def _sizes(x: Tensor, widths: tuple[int, int, int], values1: Tensor, values2: Tensor) -> tuple[int, ...]:
    b = values1.shape[1]
    return x.shape[0], *(width // b for width in widths), values1.shape[0], values2.shape[0], b


def _ffn(x: Tensor, values1: Tensor, bias1: Tensor | None, *rest: Any) -> Tensor:
    index1, (values2, bias2), index2 = rest[:3], rest[3:5], rest[5:]
    widths = _check(x, values1, bias1, index1, values2, bias2, index2)
    if not _compiled(x, widths, values1.shape[1], index1, index2):
        return reference.ffn(x, values1, bias1, index1, values2, bias2, index2)
    y = x.new_empty(x.shape[0], widths[-1])
    cpu.call("ffn", (x, values1, bias1, *index1, values2, bias2, *index2, y), *_sizes(x, widths, values1, values2))
    return y


def _ffn_backward(g: Tensor, x: Tensor, values1: Tensor, bias1: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    index1, values2, index2, needed = rest[:3], rest[3], rest[4:7], rest[7:]
    widths = _check(x, values1, bias1, index1, values2, None, index2)
    if g.shape != (x.shape[0], widths[-1]) or g.dtype is not x.dtype or g.device != x.device:
        wanted = f"{[x.shape[0], widths[-1]]} {x.dtype} on {x.device}"
        raise RegrowError(f"g is {list(g.shape)} {g.dtype} on {g.device}; expected {wanted}")
    grads = _empty_gradients(g, x, values1, values2, widths[1], needed)
    if not _compiled(x, widths, values1.shape[1], index1, index2):
        full = reference.ffn_backward(g, x, values1, bias1, index1, values2, index2)
        return tuple(grad if need else none for grad, none, need in zip(full, grads, needed, strict=True))
    written = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    arrays = (g, x, values1, bias1, *index1, values2, *index2, *written)
    cpu.call("ffn_backward", arrays, *_sizes(x, widths, values1, values2))
    return grads


def _empty_gradients(
    g: Tensor, x: Tensor, values1: Tensor, values2: Tensor, hidden: int, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    shapes = x.shape, values1.shape, (hidden,), values2.shape, (g.shape[1],)
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True))


def _ffn_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], (rest[7].shape[0] - 1) * rest[5].shape[1])


def _ffn_backward_fake(g: Tensor, x: Tensor, values1: Tensor, bias1: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    hidden = (rest[0].shape[0] - 1) * values1.shape[1]
    return _empty_gradients(g, x, values1, rest[3], hidden, rest[7:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values1, bias1, *index1, values2, _bias2 = inputs[:8]
    ctx.save_for_backward(x, values1, bias1, *index1, values2, *inputs[8:])


def _gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_values1, need_bias1, _, _, _, need_values2, need_bias2 = ctx.needs_input_grad[:8]
    needed = need_x, need_values1, need_bias1, need_values2, need_bias2
    grads = _FFN_BACKWARD(g, *ctx.saved_tensors, *needed)
    dx, dvalues1, dbias1, dvalues2, dbias2 = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return dx, dvalues1, dbias1, None, None, None, dvalues2, dbias2, None, None, None


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("ffn has no second derivative; use spmm(gelu(spmm(...)))")


register_operator("ffn", _ffn, _ffn_fake, _gradient, _setup)
register_operator("ffn_backward", _ffn_backward, _ffn_backward_fake, _no_second_gradient, lambda *context: None)
