"""Keeping optimizer state in step with a topology that moves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from regrow.errors import RegrowError
from regrow.optim.adamw import AdamW
from regrow.shards import own, own_rows


@torch.no_grad()
def reset_slots_(optimizer: Optimizer, parameter: Tensor, slots: Tensor, only: Tensor | None = None) -> None:
    """Zero the optimizer's memory of the given slots of ``parameter``; everyone else's stays bitwise as it was.

    No list of known optimizers is needed: a state tensor whose first dimension is the slots is zeroed at
    ``slots``, a single number (a step counter) belongs to the whole tensor and is kept.

    Args:
        parameter: [n_blocks, b, b] the ``values`` of a layer.
        slots: [n_moved] integer.
        only: bool [n_moved], which of them; all if absent.

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
    if isinstance(optimizer, AdamW):
        optimizer.start_block_steps(parameter)
    for entry in state_by_block(optimizer, parameter).values():
        fill_slots_(entry, slots.to(entry.device), 0, only)


def fill_slots_(tensor: Tensor, slots: Tensor, value: int, only: Tensor | None = None) -> None:
    """Set rows of a tensor, which may be shared out; of ``slots`` ``only`` those where it is true.

    Example:
        >>> tensor = torch.zeros(3, 2)
        >>> fill_slots_(tensor, torch.tensor([2, 0]), 7, torch.tensor([True, False]))
        >>> tensor.tolist()
        [[0.0, 0.0], [0.0, 0.0], [7.0, 7.0]]
    """
    local = own(tensor)
    if only is None or local is not tensor:
        local.index_fill_(0, own_rows(tensor, slots if only is None else slots[only]), value)
    else:  # no list of the true ones: its length would have to come from the device
        each = only.to(local.device).view(-1, *[1] * (local.dim() - 1))
        local.index_copy_(0, slots, local[slots].masked_fill(each, value))


@torch.no_grad()
def resize_slots_(optimizer: Optimizer, old: Tensor, new: Tensor, kept: Tensor) -> None:
    """Put a parameter with another number of blocks in the place of ``old``, with the state of the slots it keeps.

    Args:
        old: [n_blocks, b, b] the parameter the optimizer holds.
        new: [n_kept + n_new, b, b] the one it is to hold.
        kept: [n_kept] integer, slots of ``old`` in the order of ``new``; state of the ones behind them begins at zero.

    Raises:
        RegrowError: as :func:`reset_slots_`; nothing has changed then.
    """
    n_new = new.shape[0] - kept.numel()
    if n_new and isinstance(optimizer, AdamW):
        optimizer.start_block_steps(old)
    by_block = state_by_block(optimizer, old)
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            name: resized(entry, kept, n_new) if name in by_block else entry for name, entry in state.items()
        }
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


def resized(tensor: Tensor, kept: Tensor, n_new: int) -> Tensor:
    """Rows ``kept`` of a tensor, and ``n_new`` rows of zeros behind them.

    Example:
        >>> resized(torch.tensor([5, 6, 7]), torch.tensor([0, 2]), 1)
        tensor([5, 7, 0])
    """
    return torch.cat([tensor[kept.to(tensor.device)], tensor.new_zeros(n_new, *tensor.shape[1:])])


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise unless the optimizer's state can follow blocks; known after one step on a throw-away parameter.

    Raises:
        RegrowError: as :func:`reset_slots_`. An optimizer that cannot be built from its own defaults is not tried.
    """
    probe = torch.nn.Parameter(torch.ones(3, 2, 2))

    def closure() -> float:
        probe.grad = torch.ones_like(probe)
        return 1.0

    try:
        twin = type(optimizer)([probe], **optimizer.defaults)
        closure()
        twin.step(closure)
    except Exception:
        return  # it wants more than a parameter and its gradient; its real state is checked at the first update
    state_by_block(twin, probe)


def state_by_block(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state tensors whose first dimension is the slots. Single numbers belong to the whole tensor.

    Raises:
        RegrowError: there is state of another shape.
    """
    found, n_blocks = {}, parameter.shape[0]
    for name, entry in optimizer.state.get(parameter, {}).items():
        if isinstance(entry, Tensor) and entry.dim() > 0 and entry.shape[0] == n_blocks:
            found[name] = entry
        elif not _is_single_number(entry):
            kind = f"shape {list(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
            raise RegrowError(
                f"{type(optimizer).__name__} keeps state {name!r} of {kind} for a layer of {n_blocks} blocks, which "
                "cannot be mapped to blocks; use an optimizer with element-wise state such as AdamW"
            )
    return found


def _is_single_number(entry: object) -> bool:
    if isinstance(entry, Tensor):
        return entry.numel() == 1
    return entry is None or isinstance(entry, (bool, int, float))
