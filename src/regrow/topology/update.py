"""An update of a topology, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regrow.errors import RegrowError


@dataclass(frozen=True)
class TopologyUpdate:
    """The blocks in ``slots`` go, and blocks at ``(rows[i], cols[i])`` come.

    Slot ``slots[i]`` is re-allocated to position ``(rows[i], cols[i])``. With more positions than slots the layer
    grows: the last ones get new slots at the end. With more slots than positions it shrinks: the last slots are
    removed, and those behind them move down.

    A method only decides; :class:`regrow.TopologyUpdater` applies. So an update can be logged, replayed,
    broadcast and tested as a value.

    Args:
        slots: integer ``[n_dropped]``, distinct.
        rows, cols: integer ``[n_grown]`` each.
        anew: bool ``[n_dropped]``, for as many positions as slots: which begin at zero, values and optimizer state;
            the others are given the position they have, and keep both. All begin anew if absent.
    """

    slots: Tensor
    rows: Tensor
    cols: Tensor
    anew: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("slots", "rows", "cols")}
        if any(len(shape) != 1 for shape in shapes.values()) or shapes["rows"] != shapes["cols"]:
            raise RegrowError(f"slots, rows and cols must be 1-D, rows and cols of one length, got {shapes}")
        if self.anew is not None and not shapes["slots"] == shapes["rows"] == tuple(self.anew.shape):
            raise RegrowError(f"anew, slots and rows must be of one length, got {list(self.anew.shape)} and {shapes}")

    def __len__(self) -> int:
        """Number of blocks that go or come, whichever is more."""
        return max(self.slots.numel(), self.rows.numel())

    @property
    def n_moved(self) -> int:
        """Number of slots that change their position."""
        return min(self.slots.numel(), self.rows.numel())

    @property
    def growth(self) -> int:
        """By how many blocks the layer grows; negative if it shrinks."""
        return self.rows.numel() - self.slots.numel()
