"""GSE, guided stochastic exploration: exact gradients at sampled candidates only. Always sparse.

M. Heddes, N. Srinivasa, T. Givargis, A. Nicolau, *Always-Sparse Training by Growing Connections with Guided Stochastic
Exploration*, 2024, https://arxiv.org/abs/2401.06898.

The ``k`` weakest blocks go. As many candidates as there are blocks (times ``candidates``) are sampled among the empty
positions; their exact gradient is one ``sddmm``, about the cost of an ordinary weight gradient; the ``k`` of largest
gradient norm come, at zero. Positions just left are excluded, as published, unless ``regrow_pruned``. Sampling:

* ``uniform``: every empty position alike;
* ``norms``: with probability proportional to ``sum |g| * sum |x|`` of the block row and the block column;
* ``sketch``: the same with ``|s^T g| * |s^T x|`` for random signs ``s`` over the tokens, whose signed product
  estimates the
  gradient without bias.

With every empty position a candidate this is RigL.

An update of 2 x 3 positions: blocks of magnitudes 5, 1, 4, 2 at flat positions 0, 1, 3, 5, gradient ``[[9, 6, 1],
[9, 7, 3]]``. Slot 1 goes (a share of .25). The empty positions 2 and 4 are both candidates; 4 has the larger gradient:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Gradient, Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0]).view(4, 1, 1)
    >>> gradient = Gradient(torch.tensor([[9.0, 6.0, 1.0], [9.0, 7.0, 3.0]]), torch.eye(2), block_size=1)
    >>> signals = Signals(values, topology, 0.25, torch.Generator().manual_seed(0), gradient=gradient)
    >>> update = create("gse").propose(signals)
    >>> update.slots.tolist(), update.rows.tolist(), update.cols.tolist()
    ([1], [1], [1])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import LayerSize, Method, register
from regrow.methods.rules import exchange_keeping, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, strongest, weakest
from regrow.methods.signals import Gradient, Signals
from regrow.topology import TopologyUpdate
from regrow.topology.sampling import sample_free

_ROUNDS = 8  # of rejection sampling; what is missing then is drawn uniformly


@register("gse")
@dataclass(frozen=True)
class GSE(Method):
    """Prune the weakest blocks, grow the largest gradients among sampled candidates."""

    paper = "Heddes et al., Always-Sparse Training by Growing Connections with Guided Stochastic Exploration"
    year = 2024
    link = "https://arxiv.org/abs/2401.06898"
    needs_gradient = True

    norm: Norm = field(default="l1", metadata={"help": "block norm of values and gradients"})
    sampling: Literal["uniform", "norms", "sketch"] = field(
        default="uniform", metadata={"help": "how candidates are drawn: uniform, by norms of x and g, or by a sketch"}
    )
    candidates: float = field(default=1.0, metadata={"help": "candidates, as a multiple of the number of blocks"})
    regrow_pruned: bool = field(default=False, metadata={"help": "positions just pruned may be candidates"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if self.sampling not in ("uniform", "norms", "sketch"):
            raise RegrowError(f"sampling must be 'uniform', 'norms' or 'sketch', got {self.sampling!r}")
        if not self.candidates > 0:
            raise RegrowError(f"candidates must be positive, got {self.candidates}")

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        assert signals.gradient is not None
        topology = signals.topology
        dropped = weakest(block_norm(signals.values, self.norm), signals.n_moved)
        taken = keys_without(topology, dropped) if self.regrow_pruned else topology.keys()
        if dropped.numel() == 0 or taken.numel() == topology.n_positions:
            return None
        candidates = self._candidates(signals, signals.gradient, taken).sort().values
        blocks = signals.gradient.at(candidates // topology.n_block_cols, candidates % topology.n_block_cols)
        positions = strongest([(candidates, block_norm(blocks, self.norm))], dropped.numel(), excluded=taken)
        return exchange_keeping(topology, dropped[: positions.numel()], positions)

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        return round(2 * tokens * self.candidates * layer.n_blocks * layer.block_shape.numbers)

    def _candidates(self, signals: Signals, gradient: Gradient, taken: Tensor) -> Tensor:
        topology = signals.topology
        wanted = max(signals.n_moved, round(self.candidates * topology.n_blocks))
        wanted = min(wanted, topology.n_positions - taken.numel())
        found = taken.new_empty(0)
        if self.sampling != "uniform":
            of_rows, of_cols = (
                gradient.strengths() if self.sampling == "norms" else gradient.sketches(signals.generator)
            )
            for _ in range(_ROUNDS):
                rows, cols = (_draw(weights, 2 * wanted, signals.generator) for weights in (of_rows, of_cols))
                drawn = _first_occurrences(rows * topology.n_block_cols + cols)
                drawn = drawn[~torch.isin(drawn, torch.cat([taken, found]))]
                found = torch.cat([found, drawn[: wanted - found.numel()]])
        missing = wanted - found.numel()
        occupied = torch.cat([taken, found])
        return torch.cat([found, sample_free(topology.n_positions, occupied, missing, signals.generator)])


def _first_occurrences(drawn: Tensor) -> Tensor:
    """Distinct values in the order in which they were drawn."""
    order = torch.argsort(drawn, stable=True)
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[1:] = drawn[order].diff() != 0
    return drawn[order[first].sort().values]


def _draw(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``n`` independent indices with probability proportional to ``weights``; uniform if all are zero."""
    weights = weights.double().cpu()
    if not bool(weights.sum() > 0):
        weights = torch.ones_like(weights)
    return torch.multinomial(weights, n, replacement=True, generator=generator)
