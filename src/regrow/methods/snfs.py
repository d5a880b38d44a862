"""SNFS: layers with large momentum grow at the cost of others. Its gradient is dense, so not always sparse.

T. Dettmers, L. Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing Performance*, 2019,
https://arxiv.org/abs/1907.04840.

Every layer loses its ``k`` weakest blocks. What all layers lost together is given out in proportion to the mean
``|momentum|`` of a layer's weights; a layer holds at most 99 % of its positions, and what it cannot take goes to the
others. The total stays the same. Within a layer the blocks of largest gradient among the empty positions come, at
zero.

The published method keeps a dense momentum. Here the momentum of the existing weights is the optimizer's own, and
growth is ranked by the dense gradient of the update step, computed in pieces: nothing dense is ever stored. An
optimizer without momentum gives every layer back what it lost.

Two layers of 2 x 3 positions with four blocks each lose two blocks each; the first has three times the momentum of
the second and gets three of the four:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0]).view(4, 1, 1)
    >>> def layer(momentum):
    ...     return Signals(values, topology, 0.5, torch.Generator(), momentum=torch.full((4, 1, 1), momentum))
    >>> create("snfs").allocate({"a": layer(0.3), "b": layer(-0.1)})
    {'a': 5, 'b': 3}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from regrow.errors import RegrowError
from regrow.methods.base import LayerSize, Method, register
from regrow.methods.rules import exchange, n_regrown
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Signals
from regrow.topology import TopologyUpdate


@register("snfs")
@dataclass(frozen=True)
class SNFS(Method):
    """Prune the weakest blocks, share them out by momentum, grow where the dense gradient is largest."""

    paper = "Dettmers and Zettlemoyer, Sparse Networks from Scratch"
    year = 2019
    link = "https://arxiv.org/abs/1907.04840"
    always_sparse = False
    needs_gradient = True

    norm: Norm = field(default="l1", metadata={"help": "block norm of values and gradients"})
    cap: float = field(default=0.99, metadata={"help": "most of its positions that a layer may fill"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if not 0 < self.cap <= 1:
            raise RegrowError(f"cap must lie in (0, 1], got {self.cap}")

    def allocate(self, layers: Mapping[str, Signals]) -> dict[str, int]:
        kept = {name: s.topology.n_blocks - s.n_moved for name, s in layers.items()}
        given = dict.fromkeys(layers, 0)
        room = {
            name: max(s.topology.n_blocks, math.floor(self.cap * s.topology.n_positions)) - kept[name]
            for name, s in layers.items()
        }
        left = sum(s.n_moved for s in layers.values())
        weight = {name: _mean_momentum(s) for name, s in layers.items()}
        if not sum(weight.values()) > 0:
            return {name: s.topology.n_blocks for name, s in layers.items()}
        while left > 0:
            open_ = [name for name in layers if room[name] > given[name]]
            shares = _apportion(left, {name: weight[name] for name in open_})
            for name, share in shares.items():
                taken = min(share, room[name] - given[name])
                given[name] += taken
                left -= taken
        return {name: max(1, kept[name] + given[name]) for name in layers}

    def density_at(self, progress: float, start: float) -> float:
        return start  # layers change their size, the total does not

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        assert signals.gradient is not None
        topology = signals.topology
        dropped = weakest(block_norm(signals.values, self.norm), signals.n_moved)
        wanted = n_regrown(signals, dropped)
        positions = signals.gradient.strongest(wanted, excluded=topology.keys(), norm=self.norm)
        # What the empty positions cannot supply stays where it is.
        short = wanted - positions.numel()
        return exchange(topology, dropped[: dropped.numel() - short], positions)

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        return layer.dense_gradient_flops(tokens)


def _mean_momentum(signals: Signals) -> float:
    return 0.0 if signals.momentum is None else float(signals.momentum.abs().mean(dtype=torch.float64))


def _apportion(total: int, weight: dict[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to ``weight`` that sum to ``total``: largest remainders first."""
    whole = sum(weight.values())
    exact = {name: total * (w / whole if whole > 0 else 1 / len(weight)) for name, w in weight.items()}
    result = {name: math.floor(e) for name, e in exact.items()}
    by_remainder = sorted(weight, key=lambda name: result[name] - exact[name])
    for name in by_remainder[: total - sum(result.values())]:
        result[name] += 1
    return result
