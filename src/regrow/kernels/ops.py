"""The operations as torch operators: ``regrow::spmm``, ``regrow::spmm_t`` and ``regrow::sddmm``.

Each has a fake (shape-only) implementation and a gradient made of the other two, so double backward works and
nothing dense appears. ``regrow::spmm_gelu`` fuses an activation and has one gradient, an operator of its own. float32
on a CPU runs the compiled kernels, float32 and 16 bits on a GPU the Triton kernels, everything else the reference.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu, gpu, reference
from regrow.kernels.checks import check_bias, check_blocks, check_contents, check_data, check_in, check_index, check_out
from regrow.kernels.register import register_operator

_INDEX = "Tensor row_ptr, Tensor col_idx, Tensor slot"

torch.library.define("regrow::spmm", f"(Tensor x, Tensor values, Tensor? bias, {_INDEX}) -> Tensor")
torch.library.define(
    "regrow::spmm_t", f"(Tensor g, Tensor values, {_INDEX}, SymInt in_features, bool feature_major=False) -> Tensor"
)
torch.library.define(
    "regrow::sddmm",
    f"(Tensor g, Tensor x, {_INDEX}, SymInt block_size, bool with_sum, SymInt? block_cols=None) -> (Tensor, Tensor)",
)
torch.library.define(
    "regrow::spmm_gelu", f"(Tensor x, Tensor values, Tensor? bias, {_INDEX}, bool with_slope) -> (Tensor, Tensor)"
)
torch.library.define(
    "regrow::spmm_gelu_backward",
    f"(Tensor g, Tensor slope, Tensor x, Tensor values, {_INDEX}, bool need_x, bool need_values, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
)
_SPMM, _SPMM_T, _SDDMM, _SPMM_GELU, _SPMM_GELU_BACKWARD = (
    getattr(torch.ops.regrow, name).default for name in ("spmm", "spmm_t", "sddmm", "spmm_gelu", "spmm_gelu_backward")
)


def spmm(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col_idx: Tensor, slot: Tensor) -> Tensor:
    """Sparse linear layer: ``y = x W^T + bias``.

    Args:
        x: ``[N, in]``, any strides.
        values: ``[n_blocks, b, b]``, or ``[n_blocks, b, 1]``, the dtype of ``x``.
        bias: ``[out]`` or None.
        row_ptr, col_idx, slot: see :mod:`regrow.kernels`.

    Returns:
        ``y [N, out]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or an index is out of range.

    A 4 x 2 weight of blocks of 2, with one block, in block row 1:

    >>> index = [[0, 0, 1], [0], [0]]
    >>> index = [torch.tensor(i, dtype=torch.int32) for i in index]
    >>> spmm(torch.tensor([[1.0, 10.0]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), None, *index)
    tensor([[ 0.,  0., 21., 43.]])
    """
    return _SPMM(x, values, bias, row_ptr, col_idx, slot)


def spmm_t(g: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, slot: Tensor, in_features: int) -> Tensor:
    """Gradient of :func:`spmm` in ``x``: ``dx = g W``.

    Args:
        g: ``[N, out]``, any strides.
        values: ``[n_blocks, b, b]``, or ``[n_blocks, b, 1]``, the dtype of ``g``.
        row_ptr, col_idx, slot: see :mod:`regrow.kernels`.
        in_features: the width of the result, a multiple of a block's; the indices do not tell how many columns
            there are.

    Returns:
        ``dx [N, in_features]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or an index is out of range.

    >>> index = [[0, 0, 1], [0], [0]]
    >>> index = [torch.tensor(i, dtype=torch.int32) for i in index]
    >>> spmm_t(torch.tensor([[5.0, 6.0, 1.0, 10.0]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), *index, 2)
    tensor([[31., 42.]])
    """
    return _SPMM_T(g, values, row_ptr, col_idx, slot, in_features)


def sddmm(
    g: Tensor,
    x: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    slot: Tensor,
    block_size: int,
    block_cols: int | None = None,
) -> Tensor:
    """Gradient of :func:`spmm` in ``values``: ``g^T x`` at the blocks only.

    ``dvalues[slot[p]] = g[:, r*b:(r+1)*b]^T x[:, c*w:(c+1)*w]`` for position ``p`` at block ``(r, c)``.

    Args:
        g: ``[N, out]``, any strides.
        x: ``[N, in]``, the dtype of ``g``, any strides.
        row_ptr, col_idx, slot: see :mod:`regrow.kernels`.
        block_size: ``b``.
        block_cols: ``w``; of square blocks it need not be said.

    Returns:
        ``dvalues [n_blocks, b, w]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or an index is out of range.

    >>> index = [[0, 0, 1], [0], [0]]
    >>> index = [torch.tensor(i, dtype=torch.int32) for i in index]
    >>> sddmm(torch.tensor([[5.0, 6.0, 1.0, 2.0]]), torch.tensor([[10.0, 100.0]]), *index, 2)
    tensor([[[ 10., 100.],
             [ 20., 200.]]])
    """
    return _SDDMM(g, x, row_ptr, col_idx, slot, block_size, False, block_cols)[0]


def spmm_gelu(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col_idx: Tensor, slot: Tensor) -> Tensor:
    """:func:`spmm` and the exact (erf) GELU of it in one pass: ``y = gelu(x W^T + bias)``.

    Instead of the GELU's input, its slope is kept for the backward pass, and multiplied into the gradient while that
    is read. Differentiable once. Arguments, result and errors are those of :func:`spmm`.

    >>> index = [[0, 0, 1], [0], [0]]
    >>> index = [torch.tensor(i, dtype=torch.int32) for i in index]
    >>> spmm_gelu(torch.tensor([[1.0, 1.0]]), torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]), None, *index)
    tensor([[ 0.0000,  0.0000,  0.8413, -0.1587]])
    """
    with_slope = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias))
    return _SPMM_GELU(x, values, bias, row_ptr, col_idx, slot, with_slope)[0]


# ---- forward --------------------------------------------------------------------------------------


def _kernels(x: Tensor, height: int, width: int) -> ModuleType | None:
    """The module whose ``spmm``, ``spmm_t``, ``sddmm`` and ``spmm_gelu`` are for ``x`` and such blocks."""
    return next((module for module in (gpu, cpu) if module.supports(x, height, width)), None)


def _check_forward(x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor]) -> None:
    check_data("x", x, {"values": values, "bias": bias})
    check_blocks(values, index, columns=True)
    check_in(x, values.shape[2])
    check_bias(bias, index[0], values.shape[1])


def _spmm(x: Tensor, values: Tensor, bias: Tensor | None, *index: Tensor) -> Tensor:
    _check_forward(x, values, bias, index)
    if kernels := _kernels(x, *values.shape[1:]):
        return kernels.spmm(x, values, bias, index)
    check_contents(index, x.shape[1] // values.shape[2])
    return reference.spmm(x, values, bias, index)


def _spmm_t(g: Tensor, values: Tensor, *rest: Any) -> Tensor:
    index, in_features, feature_major = _spmm_t_rest(*rest)
    check_data("g", g, {"values": values})
    check_blocks(values, index, columns=True)
    _, b, width = values.shape
    check_out("g", g, index[0], b)
    if in_features < 0 or in_features % width:
        raise RegrowError(f"in_features is {in_features}; it must be a multiple of the block edge, {width}")
    kernels = _kernels(g, b, width)
    if kernels is gpu:
        return gpu.spmm_t(g, values, index, in_features, feature_major)
    if kernels:
        return kernels.spmm_t(g, values, index, in_features)
    check_contents(index, in_features // width)
    return reference.spmm_t(g, values, index, in_features)


def _spmm_t_rest(
    row_ptr: Tensor, col_idx: Tensor, slot: Tensor, in_features: int, feature_major: bool = False
) -> tuple[tuple[Tensor, Tensor, Tensor], int, bool]:
    """Index arrays, ``in_features``, and whether a GPU's result is to have the tokens of a feature side by side."""
    return (row_ptr, col_idx, slot), in_features, feature_major


def _sddmm(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    index, b, with_sum, width = _sddmm_rest(*rest)
    check_data("g", g, {"x": x})
    check_index(index, g.device)
    if b < 1:
        raise RegrowError(f"block_size is {b}; it must be positive")
    if width not in (b, 1):
        raise RegrowError(f"block_cols is {width}; it must be block_size, {b}, or 1")
    check_out("g", g, index[0], b)
    check_in(x, width)
    if g.shape[0] != x.shape[0]:
        raise RegrowError(f"g has {g.shape[0]} rows and x has {x.shape[0]}; they must agree")
    if index[1].numel() != index[2].numel():
        raise RegrowError("col_idx and slot must have one entry per block")
    if kernels := _kernels(g, b, width):
        return kernels.sddmm(g, x, index, b, width, with_sum)
    check_contents(index, x.shape[1] // width)
    return reference.sddmm(g, x, index, b, width), g.sum(0) if with_sum else g.new_empty(0)


def _sddmm_rest(
    row_ptr: Tensor, col_idx: Tensor, slot: Tensor, b: int, with_sum: bool, width: int | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], int, bool, int]:
    """Index arrays, height of a block, ``with_sum``, width of a block: torch leaves out an argument of its default."""
    return (row_ptr, col_idx, slot), b, with_sum, b if width is None else width


def _spmm_gelu(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *index, with_slope = rest
    _check_forward(x, values, bias, index)
    if kernels := _kernels(x, *values.shape[1:]):
        return kernels.spmm_gelu(x, values, bias, index, with_slope)
    check_contents(index, x.shape[1] // values.shape[2])
    y, slope = reference.gelu_with_slope(reference.spmm(x, values, bias, index))
    return y, slope if with_slope else x.new_empty(0)


def _spmm_gelu_backward(
    g: Tensor, slope: Tensor, x: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *index, need_x, need_values, need_bias = rest
    check_data("g", g, {"slope": slope, "x": x, "values": values})
    check_blocks(values, index, columns=True)
    _, b, width = values.shape
    check_out("g", g, index[0], b)
    check_out("slope", slope, index[0], b)
    check_in(x, width)
    if not g.shape[0] == slope.shape[0] == x.shape[0]:
        raise RegrowError(f"g, slope and x have {g.shape[0]}, {slope.shape[0]} and {x.shape[0]} rows; they must agree")
    dx, dvalues, dbias = (g.new_empty(0) for _ in range(3))
    if _kernels(g, b, width) is not cpu:  # whose kernels alone multiply while they read
        h = _laid_out(g * slope, b, width)
        if need_x:
            dx = _spmm_t(h, values, *index, x.shape[1], gpu.is_feature_major(x))
        if need_values or need_bias:
            dvalues, dbias = _sddmm(h, x, *index, b, need_bias, width)
        return dx, dvalues, dbias
    if need_x:
        dx = cpu.spmm_t(g, values, index, x.shape[1], scale=slope)
    if need_values or need_bias:
        dvalues, dbias = cpu.sddmm(g, x, index, b, width, need_bias, scale=slope)
    return dx, dvalues, dbias


def _laid_out(g: Tensor, height: int, width: int) -> Tensor:
    """``g`` as both products of a backward pass want it, so that it is copied once if at all."""
    return gpu.laid_out(g, gpu.plan(height, width)) if _kernels(g, height, width) is gpu else g


def _spmm_fake(x: Tensor, values: Tensor, bias: Tensor | None, *index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], (index[0].shape[0] - 1) * values.shape[1])


def _spmm_t_fake(g: Tensor, values: Tensor, *rest: Any) -> Tensor:
    _, in_features, feature_major = _spmm_t_rest(*rest)
    return gpu.empty(g, in_features, feature_major and _kernels(g, *values.shape[1:]) is gpu)


def _sddmm_fake(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    index, b, with_sum, width = _sddmm_rest(*rest)
    return g.new_empty(index[2].shape[0], b, width), g.new_empty(g.shape[1] if with_sum else 0)


def _spmm_gelu_fake(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *index, with_slope = rest
    _, height, width = values.shape
    on_gpu = _kernels(x, height, width) is gpu
    y = gpu.empty(x, (index[0].shape[0] - 1) * height, on_gpu and gpu.plan(height, width).feature_major)
    return y, torch.empty_like(y) if with_slope else x.new_empty(0)


def _spmm_gelu_backward_fake(
    g: Tensor, slope: Tensor, x: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_index, need_x, need_values, need_bias = rest
    with_sddmm = need_values or need_bias
    _, height, width = values.shape
    feature_major = gpu.is_feature_major(x) and _kernels(x, height, width) is gpu
    return (
        gpu.empty(x, x.shape[1], feature_major) if need_x else x.new_empty(0),
        values.new_empty(values.shape if with_sddmm else 0),
        g.new_empty(g.shape[1] if need_bias else 0),
    )


# ---- gradients ------------------------------------------------------------------------------------
# With S = the blocks that exist: y = x W^T, dx = g W, dW = S(g^T x) are linear in each argument, and the
# gradient of each is made of the other two. `None`s are for the index arrays and what is no tensor.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))


def _spmm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _bias, *index = inputs
    ctx.save_for_backward(x, values, *index)


def _spmm_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, values, *index = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    g = _laid_out(g, *values.shape[1:])
    dx = _SPMM_T(g, values, *index, x.shape[1], gpu.is_feature_major(x)) if need_x else None
    dvalues = dbias = None
    if need_values:  # its pass over g yields the bias's gradient too
        dvalues, dbias = _SDDMM(g, x, *index, values.shape[1], need_bias, values.shape[2])
    elif need_bias:
        dbias = g.sum(0)
    return dx, dvalues, dbias if need_bias else None, *[None] * 3


def _spmm_t_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    g, values, *index = ctx.saved_tensors
    need_g, need_values = ctx.needs_input_grad[:2]
    dg = _SPMM(h, values, None, *index) if need_g else None
    dvalues = _SDDMM(g, h, *index, values.shape[1], False, values.shape[2])[0] if need_values else None
    return dg, dvalues, *[None] * (len(ctx.needs_input_grad) - 2)


def _sddmm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.with_sum = inputs[6]
    _save(ctx, inputs, output[0])


def _sddmm_backward(ctx: Any, h: Tensor, h_sum: Tensor) -> tuple[Tensor | None, ...]:
    g, x, *index = ctx.saved_tensors
    need_g, need_x = ctx.needs_input_grad[:2]
    # A sum over tokens hands its gradient to every token: as a bias does.
    dg = _SPMM(x, h, h_sum if ctx.with_sum else None, *index) if need_g else None
    dx = _SPMM_T(g, h, *index, x.shape[1]) if need_x else None
    return dg, dx, *[None] * (len(ctx.needs_input_grad) - 2)


def _spmm_gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, _bias, *index, _with_slope = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the slope's gradient would be made, of zeros
    ctx.save_for_backward(x, values, output[1], *index)


def _spmm_gelu_gradient(ctx: Any, g: Tensor | None, _g_slope: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 7
    x, values, slope, *index = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grads = _SPMM_GELU_BACKWARD(g, slope, x, values, *index, *needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * 4


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("spmm_gelu has no second derivative; use gelu(spmm(...))")


register_operator("spmm", _spmm, _spmm_fake, _spmm_backward, _spmm_setup)
register_operator("spmm_t", _spmm_t, _spmm_t_fake, _spmm_t_backward, _save)
register_operator("sddmm", _sddmm, _sddmm_fake, _sddmm_backward, _sddmm_setup)
register_operator("spmm_gelu", _spmm_gelu, _spmm_gelu_fake, _spmm_gelu_gradient, _spmm_gelu_setup)
register_operator(
    "spmm_gelu_backward", _spmm_gelu_backward, _spmm_gelu_backward_fake, _no_second_gradient, lambda *context: None
)
