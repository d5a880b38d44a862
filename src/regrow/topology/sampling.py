"""Uniform sampling of positions without ever listing all of them.

At block edge 1 a weight has as many positions as a dense matrix has elements, so an ordinary random
permutation of the positions would be the dense tensor this library exists to avoid. Memory here is O(result).

Numbers are drawn on the CPU and sent to where the layer is: a seed means the same pattern on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.topology.fixed_size import sent


def sample_distinct(n: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """``k`` distinct integers, uniform over the ``k``-subsets of ``0..n-1``; int64, in random order.

    Given their number, the distinct values among independent draws are a uniform subset; so is a random
    ``k``-subset of them.

    Raises:
        RegrowError: ``k`` exceeds ``n``.

    Example:
        >>> sorted(sample_distinct(4, 4).tolist())
        [0, 1, 2, 3]
    """
    if k > n:
        raise RegrowError(f"cannot draw {k} distinct positions, only {n} exist")
    if 2 * k >= n:  # a listing is no larger than twice the result
        return torch.randperm(n, generator=generator)[:k]
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < k:
        drawn = torch.randint(n, (2 * k + 16,), generator=generator)
        found = torch.unique(torch.cat([found, drawn]))
    return found[torch.randperm(found.numel(), generator=generator)[:k]]


def sample_free(n: int, occupied: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """``k`` distinct integers, uniform over ``0..n-1`` without ``occupied``; int64, in random order.

    Draws ranks among the free positions and maps rank to position by bisection: the number of free positions
    before the ``i``-th smallest occupied one ``o_i`` is ``o_i - i``.

    Args:
        occupied: [m] distinct positions, any order.

    Raises:
        RegrowError: fewer than ``k`` positions are free.

    Example:
        >>> sorted(sample_free(5, torch.tensor([3, 0]), 3).tolist())
        [1, 2, 4]
    """
    free = n - occupied.numel()
    if k > free:
        raise RegrowError(f"cannot allocate {k} blocks, only {free} of {n} positions are free")
    ranks = sent(sample_distinct(free, k, generator), occupied.device)
    taken = torch.sort(occupied.long()).values
    free_before = taken - torch.arange(taken.numel(), device=taken.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def sample_free_by_group(
    group_size: int, occupied: Tensor, wanted: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """``wanted[i]`` distinct positions of every group ``i``, uniform over those not ``occupied``; int64, sorted.

    Group ``i`` is the range ``i * group_size .. (i + 1) * group_size - 1``. Draws with replacement whose repetitions
    and occupied positions are discarded are a uniform sample without replacement.

    Raises:
        RegrowError: a group has fewer free positions than wanted.

    Example:
        >>> sample_free_by_group(3, torch.tensor([0, 5]), torch.tensor([2, 1])).tolist()[:2]
        [1, 2]
    """
    n_groups = wanted.numel()
    free = group_size - torch.bincount(occupied // group_size, minlength=n_groups)
    if bool((wanted > free).any()):
        worst = int((free - wanted).argmin())
        raise RegrowError(
            f"cannot allocate {int(wanted[worst])} blocks in group {worst}, only {int(free[worst])} are free"
        )
    found = occupied.new_empty(0)
    missing = wanted.clone()
    groups = torch.arange(n_groups, device=occupied.device)
    while int(missing.sum()) > 0:
        group = torch.repeat_interleave(groups, missing)
        drawn = group * group_size + torch.randint(group_size, (group.numel(),), generator=generator).to(group)
        drawn = torch.unique(drawn)
        found = torch.cat([found, drawn[~torch.isin(drawn, torch.cat([occupied, found]))]])
        missing = wanted - torch.bincount(found // group_size, minlength=n_groups)
    return found.sort().values
