"""The compiled float32 kernels: prepares the tensors and calls ``regrow.kernels._native``.

The extension is loaded at the first call, and after torch, so that both use one OpenMP thread pool. The
environment variable ``REGROW_ISA`` (``generic``, ``avx2`` or ``avx512``) forces an instruction set.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels.checks import check_adamw, check_tensor

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)
GATHERED = (16, 1)
"""Outputs and inputs of the only blocks that are not square."""
_CPU = torch.device("cpu")


@cache
def native() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it was not built; the message says how to build it.
    """
    try:
        return import_module("regrow.kernels._native")
    except ImportError as error:
        raise ImportError(
            f"regrow's compiled CPU kernels could not be loaded ({error}); build them with 'pip install .' "
            "from a checkout (it needs GCC 12 or Clang)"
        ) from error


def supports(x: Tensor, block_size: int, block_cols: int | None = None) -> bool:
    """Whether these kernels handle it; anything else goes to the reference."""
    square = block_cols is None or block_cols == block_size
    known = block_size in BLOCK_SIZES if square else (block_size, block_cols) == GATHERED
    return x.is_cpu and x.dtype is torch.float32 and known


def supports_rows(*tensors: Tensor | None) -> bool:
    """Whether the kernels of dropout and of LayerNorm handle them."""
    return all(x is None or (x.is_cpu and x.dtype is torch.float32) for x in tensors)


# Only addresses and sizes cross to the extension, which checks what the index arrays hold. The shapes, dtypes and
# devices were checked by the operators.


def spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor]) -> Tensor:
    """``x W^T + bias``."""
    return _spmm(x, None, values, bias, index)[0]


def spmm_t(g: Tensor, values: Tensor, index: Sequence[Tensor], in_features: int, scale: Tensor | None = None) -> Tensor:
    """``g W``. With ``scale``, of the shape of ``g``, of their product instead of ``g``."""
    return _spmm(g, scale, values, None, index, in_features)[0]


def spmm_gelu(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], with_slope: bool
) -> tuple[Tensor, Tensor]:
    """``gelu(x W^T + bias)``; and the derivative of the activation there, or nothing of it."""
    return _spmm(x, None, values, bias, index, gelu=True, with_slope=with_slope)


def _spmm(
    x: Tensor,
    scale: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    index: Sequence[Tensor],
    in_features: int | None = None,  # of the transposed product
    *,
    gelu: bool = False,
    with_slope: bool = False,
) -> tuple[Tensor, Tensor]:
    n, (n_blocks, b, cols) = x.shape[0], values.shape
    width = (index[0].shape[0] - 1) * b if in_features is None else in_features
    y = x.new_empty(n, width)
    slope = torch.empty_like(y) if with_slope else y.new_empty(0)
    if cols != b:
        _gathered(x, scale, values, bias, y, slope if with_slope else None, index, in_features is not None, gelu)
        return y, slope
    sizes = n, x.shape[1] // b, width // b, n_blocks, b, in_features is not None, gelu
    call("spmm", (x, scale, values, bias, y, slope if with_slope else None, *index), *sizes)
    return y, slope


def _gathered(
    x: Tensor,
    scale: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    slope: Tensor | None,
    index: Sequence[Tensor],
    transposed: bool,
    gelu: bool,
) -> None:
    sizes = x.shape[0], y.shape[1] if transposed else x.shape[1], index[0].shape[0] - 1, values.shape[0]
    if transposed:
        call("gathered_t", (x, scale, values, y, *index), *sizes)
    else:
        call("gathered", (x, values, bias, y, slope, *index), *sizes, gelu)


def sddmm(
    g: Tensor,
    x: Tensor,
    index: Sequence[Tensor],
    block_size: int,
    block_cols: int,
    with_sum: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``g^T x`` at the blocks, in slot order; and ``g.sum(0)``, or nothing of it.

    With ``scale``, of the shape of ``g``, of their product instead of ``g``.
    """
    n_blocks = index[2].shape[0]
    dvalues = g.new_empty(n_blocks, block_size, block_cols)
    g_sum = g.new_empty(g.shape[1] if with_sum else 0)
    sizes = g.shape[0], index[0].shape[0] - 1, x.shape[1] // block_cols, n_blocks, block_size, block_cols
    call("sddmm", (g, scale, x, dvalues, g_sum if with_sum else None, *index), *sizes)
    return dvalues, g_sum


def supports_adamw(*written: Tensor) -> bool:
    """Whether :func:`adamw_` can write these tensors."""
    return all(x.is_cpu and x.dtype is torch.float32 and x.is_contiguous() and x.numel() for x in written)


def adamw_(
    values: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    size: Tensor,
    root: Tensor,
    *,
    betas: tuple[float, float],
    keep: float,
    eps: float,
) -> None:
    r"""One AdamW step in place, ``values``, ``mean`` and ``square`` contiguous float32 on a CPU.

    ``size`` [n_blocks] is each block's step size, ``root`` its :math:`1 / \sqrt{1 - \beta_2^t}`, ``keep`` is 1 - lr *
    weight decay.

    Raises:
        RegrowError: a shape or dtype is another; moments may come from a file.
    """
    check_adamw(values, grad, mean, square, size, root)
    n, *block = values.shape
    call("adamw", (values, grad, mean, square, size, root), n, prod(block), *betas, keep, eps)


def supports_dense(x: Tensor) -> bool:
    """Whether the kernels for dense arrays handle it."""
    return x.is_cpu and x.dtype is torch.float32 and x.is_contiguous()


def cross_entropy_(logits: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy ``[rows]`` of ``logits + bias``, and the column sums of its gradient times ``scale``.

    That gradient takes the place of the logits; with scale 0 there is none, and no sums.

    Raises:
        RegrowError: a target is no class, or shapes or dtypes disagree.
    """
    check_tensor("targets", targets, (logits.shape[0],), torch.int64, logits.device)
    if bias is not None:
        _check_float32("bias", bias, (logits.shape[1],))
    losses, sums = logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[1] if scale else 0)
    call("cross_entropy", (logits, bias, targets, losses, sums), *logits.shape, scale)
    return losses, sums


def add_rows_(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """``x[rows[i]] += values[i]``, in order of ``i``; ``x [n, width]`` contiguous float32 on a CPU.

    Raises:
        RegrowError: a row does not exist, or shapes or dtypes disagree.
    """
    check_tensor("rows", rows, tuple(values.shape[:1]), torch.int64, x.device)
    _check_float32("values", values, (*rows.shape, x.shape[1]))
    call("add_rows", (x, rows, values), *x.shape, rows.shape[0])


def _check_float32(name: str, array: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, array, shape, torch.float32, _CPU)


def call(name: str, arrays: Sequence[Tensor | None], *sizes: float) -> None:
    """Call a function of the extension with the addresses of ``arrays``, made contiguous, and ``sizes``."""
    arrays = [None if array is None else array.contiguous() for array in arrays]  # kept until the call returns
    addresses = [0 if array is None else array.data_ptr() for array in arrays]
    try:
        getattr(native(), name)(*addresses, *sizes, torch.get_num_threads())
    except ValueError as error:
        raise RegrowError(str(error)) from None
