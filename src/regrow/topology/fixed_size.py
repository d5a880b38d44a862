"""Set operations whose results have sizes that the host knows, so that it need not wait for a GPU to learn them.

A boolean mask as an index, ``nonzero``, ``unique``, ``isin`` and ``bincount`` stop the host until the device has
counted. Where the number of elements follows from the arguments' sizes, sorted order and bisection find the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host goes on while it is copied, which takes pinned memory.

    Random numbers are drawn on the CPU and sent, so that a seed means the same pattern on every device.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def remaining(n: int, gone: Tensor) -> Tensor:
    """The integers ``0..n-1`` without the distinct ones in ``gone``, ascending; int64.

    The ``i``-th that stays is the first by which ``i`` have been counted.

    Example:
        >>> remaining(5, torch.tensor([3, 0]))
        tensor([1, 2, 4])
    """
    counted = torch.ones(n, dtype=torch.int64, device=gone.device).index_fill_(0, gone, 0).cumsum(0)
    return torch.searchsorted(counted, torch.arange(1, n - gone.numel() + 1, device=gone.device))


def is_among(elements: Tensor, others: Tensor) -> Tensor:
    """bool, the shape of ``elements``: whether each is one of ``others``, which may be in any order.

    Example:
        >>> is_among(torch.tensor([1, 7, 4]), torch.tensor([4, 1]))
        tensor([ True, False,  True])
    """
    if others.numel() == 0:
        return torch.zeros_like(elements, dtype=torch.bool)
    ordered = others.sort().values
    place = torch.searchsorted(ordered, elements).clamp_max(others.numel() - 1)
    return ordered[place] == elements
