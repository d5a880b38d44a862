"""What a run must say about its topology: explored positions, fresh removals, churn.

Definitions: Dietrich et al. 2021, arXiv 2108.06277, section 4 and Fig. 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, overload

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


class UpdateRecords(Sequence[UpdateRecord]):
    """The records of one update of all layers. How many is known at once; to look at one waits for the device.

    Args:
        known: of each what the host knows: ``step``, ``layer``, ``n_blocks``, ``fraction``.
        measured: float64 [4] of each on the layer's device: ``n_moved``, ``coverage``, ``fresh_removed``, ``churn``.
    """

    def __init__(self, known: Sequence[Mapping[str, Any]] = (), measured: Sequence[Tensor] = ()) -> None:
        self._known, self._measured = known, measured

    @cached_property
    def _records(self) -> list[UpdateRecord]:
        records = []
        for known, measured in zip(self._known, self._measured, strict=True):
            n_moved, coverage, fresh_removed, churn = measured.tolist()
            shares = {"coverage": coverage, "fresh_removed": fresh_removed, "churn": churn}
            records.append(UpdateRecord(**known, n_moved=int(n_moved), **shares))
        return records

    def __len__(self) -> int:
        return len(self._known)

    @overload
    def __getitem__(self, index: int) -> UpdateRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[UpdateRecord]: ...
    def __getitem__(self, index: int | slice) -> UpdateRecord | list[UpdateRecord]:
        return self._records[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and self._records == list(other)

    __hash__ = None  # type: ignore[assignment]  # it equals lists

    def __repr__(self) -> str:
        return repr(self._records)


def mean_record(records: Sequence[UpdateRecord]) -> dict[str, float]:
    """Mean over layers of coverage, fresh_removed and churn."""
    return {name: fmean(getattr(r, name) for r in records) for name in ("coverage", "fresh_removed", "churn")}
