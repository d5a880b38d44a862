"""The compiled float32 kernels: prepares the tensors and calls ``regrow.kernels._native``.

The extension is loaded at the first call, and after torch, so that both use one OpenMP thread pool. The
environment variable ``REGROW_ISA`` (``generic``, ``avx2`` or ``avx512``) forces an instruction set.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from regrow.errors import RegrowError

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)


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


def supports(dtype: torch.dtype, device: torch.device, block_size: int) -> bool:
    """Whether these kernels handle it; anything else goes to the reference."""
    return device.type == "cpu" and dtype == torch.float32 and block_size in BLOCK_SIZES


def spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], transposed: bool) -> Tensor:
    """``x W^T + bias`` with the three CSR arrays, or ``x W`` (``transposed``) with the CSC ones."""
    y = torch.empty(x.shape[0], (index[0].numel() - 1) * values.shape[1])
    if y.numel():
        raw_bias = None if bias is None else _raw(bias)
        _call("spmm", _raw(x), _raw(values), raw_bias, y, *map(_raw, index), transposed)
    return y


def sddmm(g: Tensor, x: Tensor, index: Sequence[Tensor], block_size: int, with_sum: bool) -> tuple[Tensor, Tensor]:
    """``g^T x`` at the blocks of the three CSR arrays, in slot order; and ``g.sum(0)``, or nothing of it."""
    dvalues = torch.empty(index[2].numel(), block_size, block_size)
    g_sum = torch.empty(g.shape[1] if with_sum else 0)
    _call("sddmm", _raw(g), _raw(x), dvalues, g_sum if with_sum else None, *map(_raw, index))
    return dvalues, g_sum


def _raw(tensor: Tensor) -> Tensor:
    # DLPack refuses tensors that require a gradient; the operation above us handles that.
    return tensor.detach().contiguous()


def _call(name: str, *args: object) -> None:
    try:
        getattr(native(), name)(*args, torch.get_num_threads())
    except ValueError as error:
        raise RegrowError(str(error)) from None
