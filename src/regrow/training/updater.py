"""The one place where a topology update is applied."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.errors import RegrowError
from regrow.methods import Method, Signals, create
from regrow.nn import BlockSparseLinear, named_sparse_layers
from regrow.optim import reset_slots_
from regrow.topology import TopologyUpdate
from regrow.training.metrics import ExploredPositions, UpdateRecord
from regrow.training.schedule import UpdateSchedule

_NEVER = -1


@dataclass
class _LayerHistory:
    explored: ExploredPositions
    allocated_at: Tensor
    """[n_blocks] int32: step at which each slot was last allocated, 0 for the start."""


class TopologyUpdater:
    """Rewires every :class:`BlockSparseLinear` of a model while it trains.

    Call :meth:`step` once after each ``optimizer.step()``. At a scheduled step the method decides for every layer
    which blocks move; the updater then overwrites their coordinates and zeroes their values and optimizer state.
    Survivors are not touched: their values and moments stay bitwise the same.

    Randomness comes from ``(seed, step, layer name)`` alone. So every rank of a distributed run draws the same
    update, a resumed run the same as an uninterrupted one, and the global random state is never used.

    Args:
        model: a model with sparse layers.
        optimizer: the optimizer that holds their ``values``.
        method: a name from ``regrow.methods.available()`` or a :class:`~regrow.methods.Method`.
        schedule: when and how much.
        seed: of the updates.

    Raises:
        RegrowError: the model has no sparse layer, or the optimizer does not hold one's values.

    Example:
        >>> from regrow import BlockSparseLinear
        >>> layer = BlockSparseLinear(64, 64, block_size=16, density=0.5)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> updater = TopologyUpdater(layer, optimizer, schedule=UpdateSchedule(total_steps=10, n_updates=2))
        >>> for _ in range(10):
        ...     layer(torch.ones(1, 64)).sum().backward()
        ...     optimizer.step()
        ...     for record in updater.step():
        ...         print(record.step, record.n_moved, "of", record.n_blocks)
        5 2 of 8
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: str | Method = "dynsparse",
        *,
        schedule: UpdateSchedule,
        seed: int = 0,
    ) -> None:
        self.layers = dict(named_sparse_layers(model))
        if not self.layers:
            raise RegrowError("the model has no BlockSparseLinear; call regrow.sparsify(model, ...) first")
        self.optimizer, self.schedule, self.seed = optimizer, schedule, seed
        self.method = create(method) if isinstance(method, str) else method
        self.n_steps = 0
        self.last_update_step = _NEVER
        self._group_index = self._group_of_each_layer()
        self._history = {name: _start_history(layer) for name, layer in self.layers.items()}

    def step(self) -> list[UpdateRecord]:
        """Count one optimizer step; at a scheduled one update every layer. Returns a record for each layer moved."""
        self.n_steps += 1
        for name, layer in self.layers.items():
            lr = self.optimizer.param_groups[self._group_index[name]]["lr"]
            self.method.regularise_(layer.values.data, lr)
        if not self.schedule.is_update(self.n_steps):
            return []
        records = [record for name in self.layers if (record := self._update(name)) is not None]
        if records:
            self.last_update_step = self.n_steps
        return records

    @property
    def coverage(self) -> float:
        """Share of all positions of all layers that were ever active."""
        explored = [history.explored for history in self._history.values()]
        return sum(e.count for e in explored) / sum(e.n_positions for e in explored)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as flat named tensors (safetensors can hold them)."""
        counters = torch.tensor([self.n_steps, self.last_update_step])
        tensors = {"counters": counters}
        for name, history in self._history.items():
            tensors[f"{name}.explored"] = history.explored.bits
            tensors[f"{name}.allocated_at"] = history.allocated_at
        return tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            RegrowError: an entry is missing, left over, or of another shape or type.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            odd = sorted(state.keys() ^ expected.keys())[0]
            raise RegrowError(f"topology state does not belong to this model: entry {odd!r} is missing or unknown")
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
                raise RegrowError(
                    f"topology state {name!r} must be {expected[name].dtype} {list(expected[name].shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        self.n_steps, self.last_update_step = state["counters"].tolist()
        for name, history in self._history.items():
            history.explored.bits = state[f"{name}.explored"].clone()
            history.allocated_at = state[f"{name}.allocated_at"].clone()

    def _update(self, name: str) -> UpdateRecord | None:
        layer = self.layers[name]
        fraction = self.schedule.fraction(self.n_steps)
        generator = torch.Generator().manual_seed(_mix(self.seed, self.n_steps, name))
        update = self.method.propose(Signals(layer.values.data, layer.topology, fraction, generator))
        if update is None or len(update) == 0:
            return None
        old_keys = layer.topology.keys()
        apply_update(layer, update, self.optimizer)
        return self._record(name, update, fraction, old_keys)

    def _record(self, name: str, update: TopologyUpdate, fraction: float, old_keys: Tensor) -> UpdateRecord:
        layer, history = self.layers[name], self._history[name]
        keys = layer.topology.keys()
        history.explored.add(keys)
        slots = update.slots.cpu()
        fresh = (history.allocated_at[slots] == self.last_update_step).float().mean()
        history.allocated_at[slots] = self.n_steps
        return UpdateRecord(
            step=self.n_steps,
            layer=name,
            n_blocks=layer.topology.n_blocks,
            n_moved=len(update),
            fraction=fraction,
            coverage=history.explored.coverage,
            fresh_removed=float(fresh),
            churn=float((~torch.isin(keys, old_keys)).float().mean()),
        )

    def _group_of_each_layer(self) -> dict[str, int]:
        group_of = {
            id(parameter): index
            for index, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }
        for name, layer in self.layers.items():
            if id(layer.values) not in group_of:
                raise RegrowError(f"the optimizer does not hold {name}.values; build it from model.parameters()")
        return {name: group_of[id(layer.values)] for name, layer in self.layers.items()}


@torch.no_grad()
def apply_update(layer: BlockSparseLinear, update: TopologyUpdate, optimizer: Optimizer | None = None) -> None:
    """Move the update's slots; their values and optimizer state become zero, all others stay bitwise the same."""
    if optimizer is not None:  # first: it may refuse, and then nothing has changed
        reset_slots_(optimizer, layer.values, update.slots)
    layer.topology.reallocate(update)
    layer.values[update.slots.to(layer.values.device)] = 0


def _start_history(layer: BlockSparseLinear) -> _LayerHistory:
    explored = ExploredPositions(layer.topology.n_positions)
    explored.add(layer.topology.keys())
    return _LayerHistory(explored, torch.zeros(layer.topology.n_blocks, dtype=torch.int32))


def _mix(seed: int, step: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63
