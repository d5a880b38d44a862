"""What the operators require of their arguments.

Every check raises :class:`RegrowError` with the name of the argument. Where an operator has several weights, ``which``
ends the names of what belongs to one of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.errors import RegrowError


def check_data(first: str, lead: Tensor, others: dict[str, Tensor | None]) -> None:
    """One floating-point dtype and one device for all."""
    dtype, device = lead.dtype, lead.device
    if not lead.is_floating_point():
        raise RegrowError(f"{first} is {dtype}; it must be floating point")
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype is not dtype or tensor.device != device):
            raise RegrowError(
                f"{name} is {tensor.dtype} on {tensor.device}, {first} is {dtype} on {device}; they must agree"
            )


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
        raise RegrowError(
            f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; "
            f"expected {list(shape)} {dtype} on {device}"
        )


def check_adamw(values: Tensor, grad: Tensor, mean: Tensor, square: Tensor, size: Tensor, root: Tensor) -> None:
    """All float32 and where ``values`` are: moments of their shape, which may come from a file, one number a block."""
    shape, device = tuple(values.shape), values.device
    for name, array in (("gradient", grad), ("mean", mean), ("square", square)):
        check_tensor(name, array, shape, torch.float32, device)
    for name, array in (("size", size), ("root", root)):
        check_tensor(name, array, shape[:1], torch.float32, device)


# ---- block-sparse weights -------------------------------------------------------------------------


def check_index(index: Sequence[Tensor], device: torch.device, which: str = "") -> None:
    """``row_ptr, col_idx, slot``: int32 1-D contiguous arrays."""
    for name, tensor in zip(("row_ptr", "col_idx", "slot"), index, strict=True):
        if tensor.dtype is not torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise RegrowError(
                f"{name}{which} must be a contiguous 1-D int32 tensor, not {tensor.dim()}-D {tensor.dtype}"
            )
        if tensor.device != device:
            raise RegrowError(f"{name}{which} is on {tensor.device}, the data on {device}; they must agree")
    if not index[0].shape[0]:
        raise RegrowError(f"row_ptr{which} is empty; it needs one entry more than there are block rows")


def check_blocks(values: Tensor, index: Sequence[Tensor], which: str = "", *, columns: bool = False) -> None:
    """Square blocks; with ``columns`` also single columns, ``[n_blocks, b, 1]``."""
    widths = (values.shape[1], 1 if columns else values.shape[1]) if values.dim() == 3 else ()
    if values.dim() != 3 or values.shape[2] not in widths or not values.shape[1]:
        or_column = " or [n_blocks, b, 1]" if columns else ""
        raise RegrowError(f"values{which} must be [n_blocks, b, b]{or_column}, not {list(values.shape)}")
    check_index(index, values.device, which)
    for name, tensor in (("col_idx", index[1]), ("slot", index[2])):
        if tensor.shape[0] != values.shape[0]:
            raise RegrowError(f"{name}{which} has {tensor.shape[0]} entries for {values.shape[0]} blocks")


def check_bias(bias: Tensor | None, row_ptr: Tensor, b: int, which: str = "") -> None:
    out = (row_ptr.shape[0] - 1) * b
    if bias is not None and bias.shape != (out,):
        raise RegrowError(f"bias{which} is {list(bias.shape)}; expected [{out}]")


def check_out(name: str, tensor: Tensor, row_ptr: Tensor, b: int) -> None:
    width = (row_ptr.shape[0] - 1) * b
    if tensor.dim() != 2 or tensor.shape[1] != width:
        raise RegrowError(f"{name} is {list(tensor.shape)}; row_ptr and blocks of {b} need [N, {width}]")


def check_in(x: Tensor, b: int) -> None:
    if x.dim() != 2 or x.shape[1] % b:
        raise RegrowError(f"x is {list(x.shape)}; blocks of {b} need [N, a multiple of {b}]")


def check_contents(index: Sequence[Tensor], n_cols: int, which: str = "") -> None:
    """What the compiled kernels check themselves, for the reference on a CPU (elsewhere it would wait)."""
    row_ptr, col_idx, slot = index
    if row_ptr.device.type != "cpu":
        return
    n = col_idx.numel()
    if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != n or bool((row_ptr.diff() < 0).any()):
        raise RegrowError(f"row_ptr{which} must rise from 0 to the number of blocks, {n}")
    for name, tensor, top in (("col_idx", col_idx, n_cols), ("slot", slot, n)):
        if n and not 0 <= int(tensor.min()) <= int(tensor.max()) < top:
            raise RegrowError(f"{name}{which} holds an index outside [0, {top})")


# ---- packed sequences -----------------------------------------------------------------------------


def check_offsets(offsets: Tensor, device: torch.device) -> None:
    if offsets.dtype is not torch.int32 or offsets.dim() != 1:
        raise RegrowError(f"offsets must be a 1-D int32 tensor, not {offsets.dim()}-D {offsets.dtype}")
    if offsets.device != device:
        raise RegrowError(f"offsets is on {offsets.device}, the data on {device}; they must agree")
    if not offsets.shape[0]:
        raise RegrowError("offsets is empty; offsets must be one entry longer than there are sequences")


def check_offsets_contents(offsets: Tensor, n: int) -> None:
    """What the compiled kernels check themselves, for the reference."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != n or bool((offsets.diff() < 0).any()):
        raise RegrowError(f"offsets must rise from 0 to the number of tokens, {n}")
