"""Which positions a layer ever used: the explored degrees of freedom.

Dietrich et al. 2021, arXiv 2108.06277, section 4; S. Liu et al. 2021, *Do We Actually Need Dense
Over-Parameterization?*, https://arxiv.org/abs/2102.02887, call the share the ITOP rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.topology.sampling import sample_distinct


class ExploredPositions:
    """The set of positions a layer ever used: one bit a position, 1/32 of a dense float32 weight at block edge 1.

    The bits are where the positions are that were added last, so that adding does not wait for a device; reading
    :attr:`count` and :attr:`coverage` does, and :meth:`sample_new`.

    Example:
        >>> explored = ExploredPositions(10)
        >>> explored.add(torch.tensor([0, 9]))
        >>> explored.add(torch.tensor([9, 3]))
        >>> explored.count, explored.coverage
        (3, 0.3)
    """

    def __init__(self, n_positions: int) -> None:
        self.n_positions = n_positions
        self.bits = torch.zeros((n_positions + 7) // 8, dtype=torch.uint8)

    def add(self, positions: Tensor) -> None:
        """Add distinct positions, int64 ``[n]``."""
        self.bits = self.bits.to(positions.device)
        byte, bit = positions // 8, positions % 8
        masks = torch.ones_like(bit).bitwise_left_shift(bit).to(torch.uint8)
        self.bits.index_add_(0, byte, masks & ~self.bits[byte])  # distinct unset bits: addition is union

    def counted(self) -> Tensor:
        """int64 []: number of positions ever used, on the device."""
        return torch.stack([((self.bits >> shift) & 1).sum() for shift in range(8)]).sum()

    @property
    def count(self) -> int:
        """Number of positions ever used."""
        return int(self.counted())

    @property
    def coverage(self) -> float:
        """Share of all positions ever used: the explored degrees of freedom."""
        return self.count / self.n_positions

    def sample_new(self, k: int, generator: torch.Generator | None = None) -> Tensor:
        """``min(k, n_new)`` distinct positions, uniform over the ``n_new`` never used; int64, in random order.

        Memory is O(result) and one bit a position.

        Example:
            >>> explored = ExploredPositions(10)
            >>> explored.add(torch.tensor([0, 2, 4, 6, 8, 9]))
            >>> sorted(explored.sample_new(99).tolist())
            [1, 3, 5, 7]
        """
        n_new = self.n_positions - self.count
        if n_new <= 4 * k:  # few: list them
            new = torch.cat([self._unused(start) for start in range(0, len(self.bits), _CHUNK)])
            return new[sample_distinct(n_new, min(k, n_new), generator)]
        found = torch.empty(0, dtype=torch.int64)
        while found.numel() < k:
            # A uniform sample of all positions that happen to be new is a uniform sample of the new ones.
            drawn = sample_distinct(self.n_positions, min(self.n_positions, 2 * k + 16), generator)
            found = torch.unique(torch.cat([found, drawn[~self.contains(drawn)]]))
        return found[sample_distinct(found.numel(), k, generator)]

    def contains(self, positions: Tensor) -> Tensor:
        """bool ``[n]``: whether each position was ever used."""
        return (self.bits.to(positions.device)[positions // 8] >> (positions % 8)) & 1 == 1

    def _unused(self, start: int) -> Tensor:
        chunk = self.bits[start : start + _CHUNK].cpu()
        unused = ((chunk[:, None] >> torch.arange(8)) & 1 == 0).flatten().nonzero().flatten() + start * 8
        return unused[unused < self.n_positions]


_CHUNK = 1 << 13  # bytes of the bit set unpacked at a time
