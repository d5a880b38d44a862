"""What a run must say about its topology: explored positions, fresh removals, churn.

Definitions: Dietrich et al. 2021, arXiv 2108.06277, section 4 and Fig. 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean


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
