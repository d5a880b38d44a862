"""Where the non-zero blocks of one weight matrix are.

A :class:`BlockTopology` is the index half of a sparse layer; the values live beside it as an ordinary parameter.
**Slots are stable**: slot ``k`` is row ``k`` of the values for the whole life of the layer. A topology update
overwrites the coordinates of dead slots and re-sorts *indices*; no value and no optimizer state ever moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regrow.errors import RegrowError
from regrow.topology.faults import Faults
from regrow.topology.fixed_size import remaining, sent
from regrow.topology.sampling import sample_distinct, sample_free
from regrow.topology.update import TopologyUpdate

_BUFFERS = ("row_ptr", "col_idx", "slot")
_MAX_POSITIONS = 2**31 - 1  # indices are int32


class BlockTopology(nn.Module):
    """Indices of the non-zero blocks of a matrix of ``n_block_rows x n_block_cols`` blocks.

    Buffers, all int32 (``n`` = number of blocks, ``R`` x ``C`` block positions):

    ===========  =======  ==========================================================================
    ``row_ptr``  [R + 1]  entries ``row_ptr[r]:row_ptr[r+1]`` belong to block row ``r``
                          (PyTorch's sparse tensors call it ``crow_indices``)
    ``col_idx``  [n]      block column of each entry, ascending within a row
    ``slot``     [n]      row of ``values`` that holds the entry: a permutation of ``0..n-1``
    ===========  =======  ==========================================================================

    Example:
        >>> topology = BlockTopology.from_coordinates([1, 0], [0, 2], n_block_rows=2, n_block_cols=3)
        >>> topology.row_ptr.tolist(), topology.col_idx.tolist(), topology.slot.tolist()
        ([0, 1, 2], [2, 0], [1, 0])
    """

    row_ptr: Tensor
    col_idx: Tensor
    slot: Tensor

    def __init__(
        self,
        n_block_rows: int,
        n_block_cols: int,
        n_blocks: int,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for ``n_blocks`` entries; they are meaningless until :meth:`set_coordinates` or a load."""
        super().__init__()
        check_counts(n_block_rows, n_block_cols, n_blocks)
        self.n_block_rows, self.n_block_cols, self.n_blocks = n_block_rows, n_block_cols, n_blocks
        self.faults = Faults()
        for name, size in zip(_BUFFERS, (n_block_rows + 1, n_blocks, n_blocks), strict=True):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int32, device=device))

    @classmethod
    def from_coordinates(
        cls, rows: Tensor | list[int], cols: Tensor | list[int], *, n_block_rows: int, n_block_cols: int
    ) -> BlockTopology:
        """Topology in which slot ``k`` sits at block position ``(rows[k], cols[k])``; validated."""
        rows, cols = torch.as_tensor(rows), torch.as_tensor(cols)
        topology = cls(n_block_rows, n_block_cols, rows.numel(), device=rows.device)
        topology.set_coordinates(rows, cols)
        return topology

    @classmethod
    def random(
        cls,
        n_block_rows: int,
        n_block_cols: int,
        n_blocks: int,
        generator: torch.Generator | None = None,
    ) -> BlockTopology:
        """``n_blocks`` distinct positions, uniform over all ``R * C``; memory is O(n_blocks)."""
        check_counts(n_block_rows, n_block_cols, n_blocks)
        keys = sample_distinct(n_block_rows * n_block_cols, n_blocks, generator).sort().values
        return cls.from_coordinates(
            keys // n_block_cols, keys % n_block_cols, n_block_rows=n_block_rows, n_block_cols=n_block_cols
        )

    @property
    def density(self) -> float:
        """Share of block positions that hold a block, in (0, 1]."""
        return self.n_blocks / self.n_positions

    @property
    def n_positions(self) -> int:
        """Number of block positions, ``R * C``."""
        return self.n_block_rows * self.n_block_cols

    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(row_ptr, col_idx, slot)``, the order in which every kernel takes them."""
        return self.row_ptr, self.col_idx, self.slot

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """``(rows [n], cols [n])`` as int64, indexed **by slot**: slot ``k`` sits at ``(rows[k], cols[k])``."""
        slot = self.slot.long()
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).long()
        by_entry = torch.repeat_interleave(
            torch.arange(self.n_block_rows, device=slot.device), counts, output_size=self.n_blocks
        )
        rows, cols = torch.empty_like(slot), torch.empty_like(slot)
        rows[slot], cols[slot] = by_entry, self.col_idx.long()
        return rows, cols

    def keys(self) -> Tensor:
        """Flat position ``row * C + col`` of every slot, int64 ``[n]``."""
        rows, cols = self.coordinates()
        return rows * self.n_block_cols + cols

    def free_positions(
        self, k: int, generator: torch.Generator | None = None, *, occupied: Tensor | None = None
    ) -> Tensor:
        """``k`` distinct flat positions, uniform over those not in ``occupied`` (default: every block's).

        Raises:
            RegrowError: fewer than ``k`` positions are free.
        """
        return sample_free(self.n_positions, self.keys() if occupied is None else occupied, k, generator)

    @torch.no_grad()
    def set_coordinates(self, rows: Tensor, cols: Tensor) -> None:
        """Place slot ``k`` at ``(rows[k], cols[k])`` for all ``k`` and rebuild every index array.

        The arrays are written in place; another number of slots than before makes new ones.

        Raises:
            RegrowError: a coordinate is out of range, or two slots share a position; to know it, the host waits for
                the device.
        """
        if rows.dim() != 1 or rows.shape != cols.shape:
            raise RegrowError(f"rows and cols must be 1-D of one length, got {list(rows.shape)} and {list(cols.shape)}")
        self._place(sent(rows, self.slot.device).long(), sent(cols, self.slot.device).long(), wait=True)

    def _place(self, rows: Tensor, cols: Tensor, wait: bool) -> None:
        self.faults.check(_outside(rows, self.n_block_rows), _must_lie("rows", self.n_block_rows), rows, wait=wait)
        self.faults.check(_outside(cols, self.n_block_cols), _must_lie("cols", self.n_block_cols), cols, wait=wait)
        cols = cols.clamp(0, self.n_block_cols - 1)
        keys, order = (rows.clamp(0, self.n_block_rows - 1) * self.n_block_cols + cols).sort()
        self.faults.check(
            (keys.diff() == 0).any(),
            "two slots share one block position; every position may be listed once",
            wait=wait,
        )
        if rows.numel() != self.n_blocks:
            self.resize(rows.numel())
        self.slot.copy_(order)
        self.col_idx.copy_(cols[order])
        starts = torch.arange(self.n_block_rows + 1, device=keys.device) * self.n_block_cols
        self.row_ptr.copy_(torch.searchsorted(keys, starts))

    def reallocate(self, update: TopologyUpdate) -> Tensor:
        """Apply an update; slots it does not name keep their positions.

        If the number of blocks stays, no device is waited for. Then what is raised at once on a CPU is raised elsewhere
        by the next update of a :class:`regrow.TopologyUpdater`, :meth:`validate` or ``state_dict``; see
        :mod:`regrow.topology.faults`.

        Returns:
            int64 ``[n_kept]``: the old slots that live on (moved ones included), in their new order; a layer that
            grows has new slots behind them.

        Raises:
            RegrowError: a slot is named twice or out of range, or the result would hold a position twice; nothing
                has changed then.
        """
        slots, new_rows, new_cols = (
            sent(part, self.slot.device).long() for part in (update.slots, update.rows, update.cols)
        )
        n, wait = update.n_moved, update.growth != 0
        self.faults.check(_outside(slots, self.n_blocks), _must_lie("slots", self.n_blocks), slots, wait=wait)
        self.faults.check(
            (slots.sort().values.diff() == 0).any(),
            "a TopologyUpdate names one slot twice; every slot may move once per update",
            wait=wait,
        )
        slots = slots.clamp(0, self.n_blocks - 1)
        rows, cols = self.coordinates()
        rows[slots[:n]], cols[slots[:n]] = new_rows[:n], new_cols[:n]
        kept = remaining(self.n_blocks, slots[n:])
        if update.growth:
            rows, cols = torch.cat([rows[kept], new_rows[n:]]), torch.cat([cols[kept], new_cols[n:]])
        self._place(rows, cols, wait)
        self.faults.send()
        return kept

    def resize(self, n_blocks: int) -> None:
        """Make room for another number of entries; they are meaningless until the next assignment or load."""
        check_counts(self.n_block_rows, self.n_block_cols, n_blocks)
        self.n_blocks = n_blocks
        for name in ("col_idx", "slot"):
            setattr(self, name, torch.zeros(n_blocks, dtype=torch.int32, device=self.row_ptr.device))

    @torch.no_grad()
    def validate(self) -> None:
        """Check the arrays, which may come from a file.

        Raises:
            RegrowError: naming the array, if its shape or dtype is another, pointers are not monotone, an index is
                out of range, columns of a row are not strictly ascending, or ``slot`` is not a permutation; or an
                update was wrong, which so far was only noted on its device.
        """
        self.faults.tell(wait=True)
        n = self.n_blocks
        for name, size in zip(_BUFFERS, (self.n_block_rows + 1, n, n), strict=True):
            array = self.get_buffer(name)
            if array.shape != (size,) or array.dtype is not torch.int32:
                raise RegrowError(f"{name} must be int32 [{size}], got {array.dtype} {list(array.shape)}")
        row_ptr = self.row_ptr.long()
        if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != n or bool((row_ptr.diff() < 0).any()):
            raise RegrowError(f"row_ptr must rise from 0 to n_blocks={n}; the file or state is damaged")
        for name, size in (("col_idx", self.n_block_cols), ("slot", n)):
            array = self.get_buffer(name)
            self.faults.check(_outside(array, size), _must_lie(name, size), array, wait=True)
        if bool((torch.bincount(self.slot.long(), minlength=n) != 1).any()):
            raise RegrowError("slot must name every row of values exactly once; the file or state is damaged")
        if bool((self.keys()[self.slot.long()].diff() <= 0).any()):
            raise RegrowError("col_idx must ascend strictly within each block row; the file or state is damaged")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.faults.tell(wait=True, where=prefix.removesuffix("."))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        *_, errors = args
        for name in _BUFFERS:
            array = state_dict.get(prefix + name)
            if isinstance(array, Tensor) and array.dtype is not torch.int32:
                raise RegrowError(f"{prefix}{name} must be int32, got {array.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = [self._fits(state_dict.get(prefix + name), name) for name in _BUFFERS]
        if any(loaded) and not self.slot.is_meta:
            self.faults = Faults()
            try:
                self.validate()
            except RegrowError as error:
                if all(loaded):
                    raise RegrowError(f"{prefix}{error}") from None
                errors.append(f"{prefix}{error}")  # torch raises it, and says what is missing or of another size

    def _fits(self, array: Tensor | None, name: str) -> bool:
        return array is not None and array.shape == self.get_buffer(name).shape

    def extra_repr(self) -> str:
        return f"{self.n_block_rows} x {self.n_block_cols} positions, n_blocks={self.n_blocks}"


def check_counts(n_block_rows: int, n_block_cols: int, n_blocks: int) -> None:
    """Raise unless ``n_blocks`` distinct blocks fit into ``n_block_rows x n_block_cols`` positions."""
    if n_block_rows < 1 or n_block_cols < 1:
        raise RegrowError(f"a topology needs at least one block row and column, got {n_block_rows} x {n_block_cols}")
    if n_block_rows * n_block_cols > _MAX_POSITIONS:
        raise RegrowError(f"{n_block_rows} x {n_block_cols} block positions exceed 2**31 - 1; use larger blocks")
    if not 1 <= n_blocks <= n_block_rows * n_block_cols:
        raise RegrowError(
            f"n_blocks must lie between 1 and {n_block_rows * n_block_cols} "
            f"({n_block_rows} x {n_block_cols} positions), got {n_blocks}"
        )


def _outside(index: Tensor, size: int) -> Tensor:
    return ((index < 0) | (index >= size)).any()


def _must_lie(name: str, size: int) -> str:
    return f"{name} must lie in [0, {size})"
