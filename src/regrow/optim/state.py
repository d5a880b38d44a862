"""Keeping optimizer state in step with a topology that moves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from regrow.errors import RegrowError


@torch.no_grad()
def reset_slots_(optimizer: Optimizer, parameter: Tensor, slots: Tensor) -> None:
    """Zero the optimizer's memory of the given slots of ``parameter``; everyone else's stays bitwise as it was.

    No list of known optimizers is needed: a state tensor whose first dimension is the slots is zeroed at
    ``slots``, a single number (a step counter) belongs to the whole tensor and is kept.

    Args:
        parameter: [n_blocks, b, b] the ``values`` of a layer.
        slots: [n_moved] integer.

    Raises:
        RegrowError: the optimizer keeps state of another shape, which no rule maps to slots.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(3, 1, 1))
        >>> adam = torch.optim.Adam([p])
        >>> p.sum().backward()
        >>> adam.step()
        >>> reset_slots_(adam, p, torch.tensor([1]))
        >>> [round(x, 4) for x in adam.state[p]["exp_avg"].flatten().tolist()]
        [0.1, 0.0, 0.1]
    """
    n_blocks = parameter.shape[0]
    for name, entry in optimizer.state.get(parameter, {}).items():
        if isinstance(entry, Tensor) and entry.dim() > 0 and entry.shape[0] == n_blocks:
            entry[slots.to(entry.device)] = 0
        elif not _is_single_number(entry):
            kind = f"shape {list(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
            raise RegrowError(
                f"{type(optimizer).__name__} keeps state {name!r} of {kind} for a layer of {n_blocks} blocks, which "
                "cannot be mapped to blocks; use an optimizer with element-wise state such as AdamW"
            )


def _is_single_number(entry: object) -> bool:
    if isinstance(entry, Tensor):
        return entry.numel() == 1
    return entry is None or isinstance(entry, (bool, int, float))
