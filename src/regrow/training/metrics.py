"""What a run must say about its topology: explored positions, fresh removals, churn.

Definitions: Dietrich et al. 2021, arXiv 2108.06277, section 4 and Fig. 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateRecord:
    """One layer's update in numbers.

    Args:
        step: optimizer step after which it happened.
        layer: qualified module name.
        n_blocks, n_moved: blocks in the layer, and re-allocated by this update.
        fraction: share the schedule asked for.
        coverage: share of all block positions that were ever active, this update included.
        fresh_removed: share of the removed blocks that the previous update had allocated.
        churn: share of the new pattern's positions that the old one did not hold.
    """

    step: int
    layer: str
    n_blocks: int
    n_moved: int
    fraction: float
    coverage: float
    fresh_removed: float
    churn: float


def mean_record(records: list[UpdateRecord]) -> dict[str, float]:
    """Mean over layers of coverage, fresh_removed and churn."""
    return {name: fmean(getattr(r, name) for r in records) for name in ("coverage", "fresh_removed", "churn")}


class ExploredPositions:
    """The set of positions a layer ever used: one bit a position, 1/32 of a dense float32 weight at block edge 1.

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
        positions = positions.cpu()
        byte, bit = positions // 8, positions % 8
        masks = torch.ones_like(bit).bitwise_left_shift(bit).to(torch.uint8)
        new = (self.bits[byte] & masks) == 0
        self.bits.index_add_(0, byte[new], masks[new])  # distinct unset bits: addition is union

    @property
    def count(self) -> int:
        """Number of positions ever used."""
        bits = self.bits
        return sum(int(((bits >> shift) & 1).sum()) for shift in range(8))

    @property
    def coverage(self) -> float:
        """Share of all positions ever used: the explored degrees of freedom."""
        return self.count / self.n_positions
