"""Steps that several methods share: from "these blocks go, those positions come" to an update."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.signals import Signals
from regrow.topology import BlockTopology, TopologyUpdate
from regrow.topology.fixed_size import is_among, remaining


def exchange(topology: BlockTopology, dropped: Tensor, positions: Tensor) -> TopologyUpdate | None:
    """The update that removes the blocks in slots ``dropped`` and allocates the flat ``positions``.

    Always resets: a position that is removed and drawn again starts from zero, as in the paper.
    """
    if dropped.numel() == 0 and positions.numel() == 0:
        return None
    return TopologyUpdate(dropped, positions // topology.n_block_cols, positions % topology.n_block_cols)


def exchange_keeping(topology: BlockTopology, dropped: Tensor, positions: Tensor) -> TopologyUpdate | None:
    """As :func:`exchange`, but a block that is dropped and drawn again at its own position just stays.

    Its values and optimizer state are untouched, as in SET and RigL. On a CPU the update names only blocks that move,
    and is ``None`` if there are none. To count them elsewhere would be to wait for the device: there it names all and
    says which begin anew.
    """
    if dropped.device.type != "cpu" and dropped.numel() == positions.numel():
        return exchange_all(topology, dropped, positions)
    keys = topology.keys()[dropped]
    return exchange(topology, dropped[~is_among(keys, positions)], positions[~is_among(positions, keys)])


def exchange_all(topology: BlockTopology, dropped: Tensor, positions: Tensor) -> TopologyUpdate | None:
    """The update of :func:`exchange_keeping`, for as many positions as slots, that also names what stays, last."""
    keys = topology.keys()[dropped]
    stays = is_among(keys, positions)
    order = stays.byte().argsort(stable=True)
    new = positions[is_among(positions, keys).byte().argsort(stable=True)]  # as many are redrawn as stay
    update = exchange(topology, dropped[order], torch.where(stays[order], keys[order], new))
    return None if update is None else replace(update, anew=~stays[order])


def keys_without(topology: BlockTopology, dropped: Tensor) -> Tensor:
    """Flat positions of the blocks that are not ``dropped``."""
    return topology.keys()[remaining(topology.n_blocks, dropped)]


def n_regrown(signals: Signals, dropped: Tensor) -> int:
    """How many blocks must come so that the layer ends with ``signals.n_after``."""
    return signals.n_after - (signals.topology.n_blocks - dropped.numel())


def check_share(name: str, value: float) -> None:
    """Raise unless an option is a share in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise RegrowError(f"{name} must lie in [0, 1], got {value}")


def check_window(begin: float, end: float) -> None:
    """Raise :class:`RegrowError` unless ``begin`` and ``end`` are shares in [0, 1] in that order."""
    check_share("begin", begin)
    check_share("end", end)
    if begin >= end:
        raise RegrowError(f"begin must be less than end, got {begin} and {end}")
