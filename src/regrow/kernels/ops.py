"""The three operations as torch operators: ``regrow::spmm``, ``regrow::spmm_t`` and ``regrow::sddmm``.

Each has a fake (shape-only) implementation and a gradient made of the other two, so double backward works and
nothing dense appears. float32 on a CPU runs the compiled kernels, everything else the reference.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu, reference

_INDEX = "Tensor row_ptr, Tensor col_idx, Tensor slot, Tensor col_ptr, Tensor row_idx_t, Tensor slot_t"
_NAMES = ("row_ptr", "col_idx", "slot", "col_ptr", "row_idx_t", "slot_t")

torch.library.define("regrow::spmm", f"(Tensor x, Tensor values, Tensor? bias, {_INDEX}) -> Tensor")
torch.library.define("regrow::spmm_t", f"(Tensor g, Tensor values, {_INDEX}) -> Tensor")
torch.library.define(
    "regrow::sddmm", f"(Tensor g, Tensor x, {_INDEX}, SymInt block_size, bool with_sum) -> (Tensor, Tensor)"
)


def spmm(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    slot: Tensor,
    col_ptr: Tensor,
    row_idx_t: Tensor,
    slot_t: Tensor,
) -> Tensor:
    """Sparse linear layer: ``y = x W^T + bias``.

    Args:
        x: ``[N, in]``, any strides.
        values: ``[n_blocks, b, b]``, the dtype of ``x``.
        bias: ``[out]`` or None.
        row_ptr, col_idx, slot, col_ptr, row_idx_t, slot_t: see :mod:`regrow.kernels`.

    Returns:
        ``y [N, out]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or an index is out of range.

    A 4 x 2 weight of blocks of 2, with one block, in block row 1:

    >>> index = [[0, 0, 1], [0], [0], [0, 1], [1], [0]]
    >>> index = [torch.tensor(i, dtype=torch.int32) for i in index]
    >>> spmm(torch.tensor([[1.0, 10.0]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), None, *index)
    tensor([[ 0.,  0., 21., 43.]])
    """
    return torch.ops.regrow.spmm(x, values, bias, row_ptr, col_idx, slot, col_ptr, row_idx_t, slot_t)


def spmm_t(
    g: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    slot: Tensor,
    col_ptr: Tensor,
    row_idx_t: Tensor,
    slot_t: Tensor,
) -> Tensor:
    """Gradient of :func:`spmm` in ``x``: ``dx = g W``.

    Args:
        g: ``[N, out]``, any strides.
        values: ``[n_blocks, b, b]``, the dtype of ``g``.
        row_ptr, col_idx, slot, col_ptr, row_idx_t, slot_t: see :mod:`regrow.kernels`.

    Returns:
        ``dx [N, in]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or an index is out of range.

    >>> index = [[0, 0, 1], [0], [0], [0, 1], [1], [0]]
    >>> index = [torch.tensor(i, dtype=torch.int32) for i in index]
    >>> spmm_t(torch.tensor([[5.0, 6.0, 1.0, 10.0]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), *index)
    tensor([[31., 42.]])
    """
    return torch.ops.regrow.spmm_t(g, values, row_ptr, col_idx, slot, col_ptr, row_idx_t, slot_t)


def sddmm(
    g: Tensor,
    x: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    slot: Tensor,
    col_ptr: Tensor,
    row_idx_t: Tensor,
    slot_t: Tensor,
    block_size: int,
) -> Tensor:
    """Gradient of :func:`spmm` in ``values``: ``g^T x`` at the blocks only.

    ``dvalues[slot[p]] = g[:, r*b:(r+1)*b]^T x[:, c*b:(c+1)*b]`` for position ``p`` at block ``(r, c)``.

    Args:
        g: ``[N, out]``, any strides.
        x: ``[N, in]``, the dtype of ``g``, any strides.
        row_ptr, col_idx, slot, col_ptr, row_idx_t, slot_t: see :mod:`regrow.kernels`.
        block_size: ``b``.

    Returns:
        ``dvalues [n_blocks, b, b]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or an index is out of range.

    >>> index = [[0, 0, 1], [0], [0], [0, 1], [1], [0]]
    >>> index = [torch.tensor(i, dtype=torch.int32) for i in index]
    >>> sddmm(torch.tensor([[5.0, 6.0, 1.0, 2.0]]), torch.tensor([[10.0, 100.0]]), *index, 2)
    tensor([[[ 10., 100.],
             [ 20., 200.]]])
    """
    return torch.ops.regrow.sddmm(g, x, row_ptr, col_idx, slot, col_ptr, row_idx_t, slot_t, block_size, False)[0]


# ---- checks ---------------------------------------------------------------------------------------


def _check(named: dict[str, Tensor | None], index: Sequence[Tensor]) -> None:
    """One dtype and device for the data, int32 1-D contiguous arrays for the indices."""
    present = {name: tensor for name, tensor in named.items() if tensor is not None}
    first, lead = next(iter(present.items()))
    if not lead.is_floating_point():
        raise RegrowError(f"{first} is {lead.dtype}; it must be floating point")
    for name, tensor in present.items():
        if (tensor.dtype, tensor.device) != (lead.dtype, lead.device):
            raise RegrowError(
                f"{name} is {tensor.dtype} on {tensor.device}, {first} is {lead.dtype} on {lead.device}; "
                "they must agree"
            )
    for name, tensor in zip(_NAMES, index, strict=True):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise RegrowError(f"{name} must be a contiguous 1-D int32 tensor, not {tensor.dim()}-D {tensor.dtype}")
        if tensor.device != lead.device:
            raise RegrowError(f"{name} is on {tensor.device}, {first} is on {lead.device}")
        if name in ("row_ptr", "col_ptr") and not tensor.shape[0]:
            raise RegrowError(f"{name} is empty; it needs one entry more than there are block rows or columns")


def _check_blocks(values: Tensor, index: Sequence[Tensor]) -> None:
    if values.dim() != 3 or values.shape[1] != values.shape[2]:
        raise RegrowError(f"values must be [n_blocks, b, b], not {list(values.shape)}")
    for name in ("col_idx", "slot", "row_idx_t", "slot_t"):
        size = index[_NAMES.index(name)].shape[0]
        if size != values.shape[0]:
            raise RegrowError(f"{name} has {size} entries for {values.shape[0]} blocks")


def _check_matrix(name: str, tensor: Tensor, ptr: Tensor, b: int) -> None:
    width = (ptr.shape[0] - 1) * b
    if tensor.dim() != 2 or tensor.shape[1] != width:
        raise RegrowError(f"{name} is {list(tensor.shape)}; these indices and blocks of {b} need [N, {width}]")


def _check_contents(index: Sequence[Tensor], limit: int, names: Sequence[str]) -> None:
    """What the compiled kernels check themselves, for the reference on a CPU (elsewhere it would wait)."""
    ptr, idx, slot = index
    if ptr.device.type != "cpu":
        return
    n = idx.numel()
    if int(ptr[0]) != 0 or int(ptr[-1]) != n or bool((ptr.diff() < 0).any()):
        raise RegrowError(f"{names[0]} must rise from 0 to the number of blocks, {n}")
    for name, tensor, top in ((names[1], idx, limit), (names[2], slot, n)):
        if n and not 0 <= int(tensor.min()) <= int(tensor.max()) < top:
            raise RegrowError(f"{name} holds an index outside [0, {top})")


# ---- forward --------------------------------------------------------------------------------------


def _spmm(x: Tensor, values: Tensor, bias: Tensor | None, *index: Tensor) -> Tensor:
    _check({"x": x, "values": values, "bias": bias}, index)
    _check_blocks(values, index)
    b = values.shape[1]
    _check_matrix("x", x, index[3], b)
    out = (index[0].numel() - 1) * b
    if bias is not None and bias.shape != (out,):
        raise RegrowError(f"bias is {list(bias.shape)}; expected [{out}]")
    if cpu.supports(x.dtype, x.device, b):
        return cpu.spmm(x, values, bias, index[:3], transposed=False)
    _check_contents(index[:3], index[3].numel() - 1, _NAMES[:3])
    return reference.spmm(x, values, bias, index[:3])


def _spmm_t(g: Tensor, values: Tensor, *index: Tensor) -> Tensor:
    _check({"g": g, "values": values}, index)
    _check_blocks(values, index)
    b = values.shape[1]
    _check_matrix("g", g, index[0], b)
    if cpu.supports(g.dtype, g.device, b):
        return cpu.spmm(g, values, None, index[3:], transposed=True)
    _check_contents(index[3:], index[0].numel() - 1, _NAMES[3:])
    return reference.spmm_t(g, values, index[3:])


def _sddmm(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *index, b, with_sum = rest
    _check({"g": g, "x": x}, index)
    if b < 1:
        raise RegrowError(f"block_size is {b}; it must be positive")
    _check_matrix("g", g, index[0], b)
    _check_matrix("x", x, index[3], b)
    if g.shape[0] != x.shape[0]:
        raise RegrowError(f"g has {g.shape[0]} rows and x has {x.shape[0]}; they must agree")
    if len({index[i].numel() for i in (1, 2, 4, 5)}) != 1:
        raise RegrowError("col_idx, slot, row_idx_t and slot_t must have one entry per block")
    if cpu.supports(g.dtype, g.device, b):
        return cpu.sddmm(g, x, index[:3], b, with_sum)
    _check_contents(index[:3], index[3].numel() - 1, _NAMES[:3])
    return reference.sddmm(g, x, index[:3], b), g.sum(0) if with_sum else g.new_empty(0)


def _spmm_fake(x: Tensor, values: Tensor, bias: Tensor | None, *index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], (index[0].shape[0] - 1) * values.shape[1])


def _spmm_t_fake(g: Tensor, values: Tensor, *index: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], (index[3].shape[0] - 1) * values.shape[1])


def _sddmm_fake(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *index, b, with_sum = rest
    return g.new_empty(index[2].shape[0], b, b), g.new_empty(g.shape[1] if with_sum else 0)


# ---- gradients ------------------------------------------------------------------------------------
# With S = the blocks that exist: y = x W^T, dx = g W, dW = S(g^T x) are linear in each argument, and the
# gradient of each is made of the other two. `None`s are for the six index arrays.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))


def _spmm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _bias, *index = inputs
    ctx.save_for_backward(x, values, *index)


def _spmm_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, values, *index = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    dx = torch.ops.regrow.spmm_t(g, values, *index) if need_x else None
    dvalues = dbias = None
    if need_values:  # its pass over g yields the bias's gradient too
        dvalues, dbias = torch.ops.regrow.sddmm(g, x, *index, values.shape[1], need_bias)
    elif need_bias:
        dbias = g.sum(0)
    return dx, dvalues, dbias if need_bias else None, *[None] * 6


def _spmm_t_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    g, values, *index = ctx.saved_tensors
    need_g, need_values = ctx.needs_input_grad[:2]
    dg = torch.ops.regrow.spmm(h, values, None, *index) if need_g else None
    dvalues = torch.ops.regrow.sddmm(g, h, *index, values.shape[1], False)[0] if need_values else None
    return dg, dvalues, *[None] * 6


def _sddmm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.with_sum = inputs[-1]
    _save(ctx, inputs, output[0])


def _sddmm_backward(ctx: Any, h: Tensor, h_sum: Tensor) -> tuple[Tensor | None, ...]:
    g, x, *index = ctx.saved_tensors
    need_g, need_x = ctx.needs_input_grad[:2]
    # A sum over tokens hands its gradient to every token: as a bias does.
    dg = torch.ops.regrow.spmm(x, h, h_sum if ctx.with_sum else None, *index) if need_g else None
    dx = torch.ops.regrow.spmm_t(g, h, *index) if need_x else None
    return dg, dx, *[None] * 8


for _name, _forward, _fake, _backward, _setup in (
    ("regrow::spmm", _spmm, _spmm_fake, _spmm_backward, _spmm_setup),
    ("regrow::spmm_t", _spmm_t, _spmm_t_fake, _spmm_t_backward, _save),
    ("regrow::sddmm", _sddmm, _sddmm_fake, _sddmm_backward, _sddmm_setup),
):
    torch.library.impl(_name, "CompositeExplicitAutograd")(_forward)
    torch.library.register_fake(_name)(_fake)
    torch.library.register_autograd(_name, _backward, setup_context=_setup)
