"""Which ``n`` of every ``m`` consecutive inputs are the strongest."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.errors import RegrowError


def check_nm(n: int, m: int) -> None:
    """Raise unless 0 < ``n`` < ``m``.

    Example:
        >>> check_nm(4, 4)
        Traceback (most recent call last):
        regrow.errors.RegrowError: n and m must be whole numbers with 0 < n < m (2 and 4 for 2:4), got n=4, m=4
    """
    if not 0 < n < m:
        raise RegrowError(f"n and m must be whole numbers with 0 < n < m (2 and 4 for 2:4), got n={n}, m={m}")


@torch.no_grad()
def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """True at the ``n`` greatest magnitudes of every ``m`` along the last dimension; ties go to the first.

    Example:
        >>> nm_mask(torch.tensor([[1.0, -4.0, 2.0, 2.0]]), 2, 4).int()
        tensor([[0, 1, 1, 0]], dtype=torch.int32)
    """
    if n == m:
        return torch.ones_like(weight, dtype=torch.bool)
    groups = weight.abs().view(-1, m).T.contiguous()
    beaten = torch.zeros(groups.shape, dtype=torch.int32, device=weight.device)  # by how many of its group
    for i in range(m):  # to compare pairs of long rows is several times faster than to sort millions of short ones
        for j in range(i + 1, m):
            first_wins = groups[i] >= groups[j]
            beaten[j] += first_wins
            beaten[i] += ~first_wins
    return (beaten < n).T.reshape(weight.shape)


@torch.no_grad()
def strongest_mask(scores: Tensor, n: int) -> Tensor:
    """True at the ``n`` greatest scores, ``1 <= n <= numel``; ties go to the first.

    Example:
        >>> strongest_mask(torch.tensor([[2.0, 1.0], [3.0, 2.0]]), 2).int()
        tensor([[1, 0],
                [1, 0]], dtype=torch.int32)
    """
    flat = scores.flatten()
    least = flat.kthvalue(flat.numel() - n + 1).values
    mask = flat > least
    mask[(flat == least).nonzero().squeeze(1)[: n - int(mask.sum())]] = True
    return mask.view_as(scores)
