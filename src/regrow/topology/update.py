"""An update of a topology, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regrow.errors import RegrowError


@dataclass(frozen=True)
class TopologyUpdate:
    """Slot ``slots[i]`` is re-allocated to block position ``(rows[i], cols[i])``.

    A method only decides; :class:`regrow.TopologyUpdater` applies. So an update can be logged, replayed,
    broadcast and tested as a value.

    Args:
        slots, rows, cols: integer tensors of one shape ``[n_moved]``.
    """

    slots: Tensor
    rows: Tensor
    cols: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("slots", "rows", "cols")}
        if len(set(shapes.values())) != 1 or self.slots.dim() != 1:
            raise RegrowError(f"slots, rows and cols must be 1-D of one length, got {shapes}")

    def __len__(self) -> int:
        return self.slots.numel()
