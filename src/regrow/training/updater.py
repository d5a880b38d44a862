"""The one place where a topology update is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.errors import RegrowError
from regrow.methods import Gradient, Method, Signals, WeightTransform, create
from regrow.nn import BlockSparseLinear, named_sparse_layers
from regrow.nn.layout import record_layout
from regrow.nn.options import Composite
from regrow.optim import check_optimizer, reset_slots_, resize_slots_
from regrow.optim.state import fill_slots_, resized, state_by_block
from regrow.shards import is_sharded, own, whole
from regrow.topology import ExploredPositions, TopologyUpdate
from regrow.topology.fixed_size import is_among, sent
from regrow.training import checks
from regrow.training.agreement import check_agreement
from regrow.training.capture import GradientCapture
from regrow.training.ddp import Wrapper, unwrapped
from regrow.training.metrics import UpdateRecord, UpdateRecords
from regrow.training.schedule import UpdateSchedule
from regrow.training.seeds import mix

_NEVER = -1


@dataclass
class _LayerHistory:
    explored: ExploredPositions
    allocated_at: Tensor
    """[n_blocks] int32: step at which each slot was last allocated, 0 for the start."""
    start_blocks: int


class TopologyUpdater:
    """Rewires every :class:`BlockSparseLinear` of a model while it trains.

    Call :meth:`step` once after each ``optimizer.step()``. At a scheduled step the method decides for every layer
    which blocks move; the updater then overwrites their coordinates and zeroes their values and optimizer state.
    Survivors are not touched: their values and moments stay bitwise the same. A layer without a free position is left
    alone unless its density falls.

    A method that needs gradients sees them in the backward pass of the update step and decides there, layer by layer,
    so that no activation is kept longer; see :class:`~regrow.training.capture.GradientCapture`.

    With the methods dynsparse, set, rigl and static (and the ``growth`` and ``quota_rows`` of dynsparse as they are by
    default) an update on a GPU does not make the host wait for it: sizes follow from sizes, nothing is read, and the
    index arrays are written in place, so that what was compiled or captured of the model goes on. The records are read
    when they are looked at. What an update of another device got wrong is raised at the next one, or by ``state_dict``
    of the model; see :mod:`regrow.topology.faults`. Other methods, and layers that change their size or are shared
    out, may wait.

    Randomness comes from ``(seed, step, layer name)`` alone. So every rank of a distributed run draws the same
    update, a resumed run the same as an uninterrupted one, and the global random state is never used. Ranks compare a
    digest of their indices at the start and after every update, so all of them must make an updater and step it.

    Args:
        model: a model with sparse layers, or ``DistributedDataParallel`` around one.
        optimizer: the optimizer that holds their ``values``.
        method: a name from ``regrow.methods.available()`` or a :class:`~regrow.methods.Method`.
        schedule: when and how much.
        seed: of the updates.

    Raises:
        RegrowError: the model has no sparse layer, the optimizer does not hold one's values or keeps state that does
            not belong to blocks, a layer does not suit the method, the schedule never updates a method that moves, or
            the ranks of a distributed run do not have the same blocks.

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
        self._wrapper, self.model = Wrapper(model), unwrapped(model)
        self.layers = dict(named_sparse_layers(self.model))
        self._composites = [module for module in self.model.modules() if isinstance(module, Composite)]
        if not self.layers:
            raise RegrowError("the model has no BlockSparseLinear; call regrow.sparsify(model, ...) first")
        # transformers' Trainer hands over a wrapper
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.schedule, self.seed = schedule, seed
        self.method = create(method) if isinstance(method, str) else method
        self._values = {name: layer.values for name, layer in self.layers.items()}
        """As the optimizer knows them: while it computes, a layer of a sharded model has all rows instead."""
        self._group_index = self._group_of_each_layer()
        if is_sharded(self.model):
            check_shardable(self.method)
        check_trainable(self.layers, self.optimizer, self.method, schedule)
        self.n_steps = 0
        self.last_update_step = _NEVER
        self._history = {name: _start_history(layer) for name, layer in self.layers.items()}
        self._capture = GradientCapture(self.layers, self._propose_with) if self.method.needs_gradient else None
        self._proposals: dict[str, TopologyUpdate | None] = {}
        self._targets: dict[str, int] = {}
        self._check_agreement("at the start")
        self._prepare()

    def step(self) -> Sequence[UpdateRecord]:
        """Count one optimizer step; at a scheduled one update every layer. Returns a record for each layer moved.

        Raises:
            RegrowError: the method proposed an update that cannot be; on a GPU, in an earlier step.
        """
        self.n_steps += 1
        for name, layer in self.layers.items():
            lr = self.optimizer.param_groups[self._group_index[name]]["lr"]
            self.method.regularise_(own(layer.values.data), lr)
        self._after_step()
        if not self.schedule.is_update(self.n_steps):
            self._prepare()
            return []
        for name, layer in self.layers.items():
            layer.topology.faults.tell(wait=False, where=name)
        if self._capture is None:
            self._decide_targets()
            proposals = {name: self._propose(name, self.n_steps) for name in self._targets}
        else:
            self._capture.stop()
            proposals = self._proposals
        moved = [(name, update) for name, update in proposals.items() if update]
        measured = [self._apply(name, update) for name, update in moved]
        records = UpdateRecords([self._known(name) for name, _ in moved], measured)
        if any(update.growth for update in proposals.values() if update):
            self._wrapper.renew()
        self._check_agreement(f"after the update of step {self.n_steps}")
        if records:
            self.last_update_step = self.n_steps
        self._prepare()
        return records

    def _after_step(self) -> None:
        """Composite layers may have something to do, and may give up parameters."""
        progress = self.n_steps / self.schedule.total_steps
        given_up = [parameter for module in self._composites for parameter in module.after_step_(progress)]
        for parameter in given_up:
            self.optimizer.state.pop(parameter, None)
        if given_up:
            record_layout(self.model, self.layers)
            self._wrapper.renew()

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
            tensors[f"{name}.explored"] = history.explored.bits.cpu()
            tensors[f"{name}.allocated_at"] = history.allocated_at.cpu()
            tensors[f"{name}.start_blocks"] = torch.tensor(history.start_blocks)
        return tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            RegrowError: an entry is missing, left over, of another shape or type, or one that no run writes.
        """
        for name, layer in self.layers.items():  # whose number of blocks a loaded model may have changed
            if len(self._history[name].allocated_at) != layer.topology.n_blocks:
                self._history[name].allocated_at = torch.zeros(layer.topology.n_blocks, dtype=torch.int32)
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
        self._check_state(state)
        self.n_steps, self.last_update_step = state["counters"].tolist()
        for name, history in self._history.items():
            device = self.layers[name].topology.slot.device
            history.explored.bits = state[f"{name}.explored"].to(device, copy=True)
            history.allocated_at = state[f"{name}.allocated_at"].to(device, copy=True)
            history.start_blocks = int(state[f"{name}.start_blocks"])
        self._prepare()

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        n_steps, last_update_step = state["counters"].tolist()
        if wrong := checks.wrong_counters(n_steps, last_update_step):
            raise RegrowError(f"topology state: {wrong}")
        for name, layer in self.layers.items():
            explored, allocated_at, start = (state[f"{name}.{p}"] for p in ("explored", "allocated_at", "start_blocks"))
            if wrong := checks.wrong_history(layer.topology, explored, allocated_at, int(start), n_steps):
                raise RegrowError(f"topology state of {name}: {wrong}")

    def _prepare(self) -> None:
        """Before the forward pass of an update step: gradients are wanted."""
        if self._capture is None:
            return
        if not self.schedule.is_update(self.n_steps + 1):
            self._capture.stop()
            return
        self._proposals = {}
        self._decide_targets()
        self._capture.start(self._targets)

    def _check_agreement(self, when: str) -> None:
        check_agreement({name: layer.topology.indices() for name, layer in self.layers.items()}, when)

    def _decide_targets(self) -> None:
        targets = {name: layer.topology.n_blocks for name, layer in self.layers.items()}
        if self.method.resizes:
            step = self.n_steps + (self._capture is not None)
            targets = self.method.allocate({name: self._signals(name, step) for name in self.layers})
        self._targets = {
            name: target
            for name, target in targets.items()
            if target < (layer := self.layers[name]).topology.n_positions or target != layer.topology.n_blocks
        }

    def _propose_with(self, name: str, x: Tensor, g: Tensor) -> None:
        gradient = Gradient(x, g, self.layers[name].block_shape)
        self._proposals[name] = self._propose(name, self.n_steps + 1, gradient)

    def _propose(self, name: str, step: int, gradient: Gradient | None = None) -> TopologyUpdate | None:
        return self.method.propose(replace(self._signals(name, step), target=self._targets[name], gradient=gradient))

    def _signals(self, name: str, step: int) -> Signals:
        layer, history = self.layers[name], self._history[name]
        state = self.optimizer.state.get(self._values[name], {})
        momentum = state.get("exp_avg", state.get("momentum_buffer"))
        return Signals(
            whole(layer.values.data),
            layer.topology,
            self.schedule.fraction(step),
            torch.Generator().manual_seed(mix(self.seed, step, name)),
            progress=step / self.schedule.total_steps,
            start_blocks=history.start_blocks,
            explored=history.explored,
            momentum=None if momentum is None else whole(momentum),
        )

    def _apply(self, name: str, update: TopologyUpdate) -> Tensor:
        """Carry it out; returns what :class:`UpdateRecords` calls measured."""
        layer, history = self.layers[name], self._history[name]
        old_keys = layer.topology.keys()
        slots = _slots(layer, update)
        allocated_at = history.allocated_at.to(slots.device)
        fresh = allocated_at[slots] == self.last_update_step
        kept = apply_update(layer, update, self.optimizer)
        fill_slots_(allocated_at, slots[: update.n_moved], self.n_steps, update.anew)
        new = allocated_at.new_full((max(update.growth, 0),), self.n_steps)
        history.allocated_at = torch.cat([allocated_at[kept], new])
        keys = layer.topology.keys()
        history.explored.add(keys)
        if update.growth:
            self._values[name] = layer.values
            record_layout(self.model, self.layers)
        anew = torch.ones_like(fresh) if update.anew is None else update.anew
        n_moved = anew.sum() + max(update.growth, 0)
        coverage = history.explored.counted().double() / history.explored.n_positions
        fresh_removed = (fresh & anew).sum().float() / anew.sum().clamp_min(1)
        churn = (~is_among(keys, old_keys)).float().mean()
        return torch.stack([number.double() for number in (n_moved, coverage, fresh_removed, churn)])

    def _known(self, name: str) -> dict[str, Any]:
        fraction, n_blocks = self.schedule.fraction(self.n_steps), self.layers[name].topology.n_blocks
        return {"step": self.n_steps, "layer": name, "n_blocks": n_blocks, "fraction": fraction}

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


def check_trainable(
    layers: Mapping[str, BlockSparseLinear], optimizer: Optimizer, method: Method, schedule: UpdateSchedule
) -> None:
    """Raise :class:`RegrowError` for what no update could do: known before the first step."""
    updates = any(schedule.is_update(step) for step in range(1, schedule.total_steps))
    if method.moves and not updates and schedule.total_steps > 1:
        raise RegrowError(
            f"the schedule never updates the topology (n_updates={schedule.n_updates}, stop={schedule.stop}, "
            f"total_steps={schedule.total_steps}), so {method.name} would be static; raise n_updates, or choose the "
            "method 'static'"
        )
    method.check_layers({name: layer.topology for name, layer in layers.items()})
    if method.moves:
        check_optimizer(optimizer)


def check_shardable(method: Method) -> None:
    """Raise :class:`RegrowError` if parameters cannot be shared out between updates of this method."""
    if method.dense_layout or method.resizes:
        why = "masks dense weights" if method.dense_layout else "changes how many blocks a layer has"
        if isinstance(method, WeightTransform):
            why = "transforms dense weights"
        raise RegrowError(
            f"method {method.name!r} {why}, which parameters that are shared out cannot follow; train it with "
            "DistributedDataParallel (--parallel ddp), or choose another method"
        )


@torch.no_grad()
def apply_update(layer: BlockSparseLinear, update: TopologyUpdate, optimizer: Optimizer | None = None) -> Tensor:
    """Carry out an update: blocks that come start with zero values and optimizer state, all others stay bitwise as is.

    Returns:
        int64 [n_kept]: the old slots that live on, in their new order (:meth:`BlockTopology.reallocate`).
    """
    if optimizer is not None:  # first: it may refuse, and then nothing has changed
        state_by_block(optimizer, layer.values)
    moved = _slots(layer, update)[: update.n_moved]
    kept = layer.topology.reallocate(update)
    if optimizer is not None:
        reset_slots_(optimizer, layer.values, moved, update.anew)
    fill_slots_(layer.values, moved, 0, update.anew)
    if update.growth:
        # A new parameter: autograd remembers the shape of the old one for as long as any graph that used it lives.
        old, layer.values = layer.values, nn.Parameter(resized(layer.values.data, kept, max(update.growth, 0)))
        if optimizer is not None:
            resize_slots_(optimizer, old, layer.values, kept)
    return kept


def _slots(layer: BlockSparseLinear, update: TopologyUpdate) -> Tensor:
    """The slots an update names, on the layer's device and within its rows, whatever the method said."""
    topology = layer.topology
    return sent(update.slots, topology.slot.device).long().clamp(0, topology.n_blocks - 1)


def _start_history(layer: BlockSparseLinear) -> _LayerHistory:
    explored = ExploredPositions(layer.topology.n_positions)
    explored.add(layer.topology.keys())
    return _LayerHistory(explored, torch.zeros_like(layer.topology.slot), layer.topology.n_blocks)
