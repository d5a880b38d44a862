"""What a sparse layer computes in under ``torch.autocast``."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.kernels import gpu


def compute_dtype(x: Tensor, values: Tensor) -> torch.dtype:
    """The dtype in which ``x`` is to be multiplied by ``values``.

    Without autocast each has its own, and they must agree. Under it, it is what autocast asks for if there are kernels
    for that on the device of ``x``; elsewhere the dtype of ``values``, because a product in the reference would be
    slower than the one in float32.

    Example:
        >>> x, values = torch.zeros(2, 16), torch.zeros(1, 16, 16)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     compute_dtype(x.bfloat16(), values)
        torch.float32
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    wanted = torch.get_autocast_dtype(x.device.type)
    return wanted if wanted in gpu.DTYPES and gpu.handles(x.device) else values.dtype


def in_compute_dtype(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x``, ``values`` and ``bias`` as they are multiplied; gradients come back in the dtypes they came in.

    Only under autocast is anything cast: otherwise dtypes that disagree are an error of the caller, which the operator
    names.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x, values, bias
    dtype = compute_dtype(x, values)
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
