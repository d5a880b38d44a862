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

Two options are ours. A gradient ``G_ij = g_i^T x_j`` can be large because input ``j`` or the gradient of output ``i``
is, whatever the two have to do with each other, and growth then gathers on few inputs and outputs. With
``growth=normalised`` candidates are ranked by

.. math:: \\frac{\\|G_{ij}\\|}{\\|g_i\\|\\, \\|x_j\\|} \\in [0, 1]

(Frobenius norms over tokens and features of a block; for single weights the cosine of the angle between ``g_i`` and
``x_j`` over the tokens). And ``random_share`` of the blocks that come are drawn uniformly from all empty positions,
without a rank.

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

Here ``g`` is the identity and the gradient is ``x``, so its columns are divided by their norms. With ``[3, 1]`` as the
last of them position 2 has 3 / sqrt(10) = .95 and position 4 still 7 / sqrt(85) = .76:

    >>> gradient = Gradient(torch.tensor([[9.0, 6.0, 3.0], [9.0, 7.0, 1.0]]), torch.eye(2), block_size=1)
    >>> signals = Signals(values, topology, 0.25, torch.Generator().manual_seed(0), gradient=gradient)
    >>> for growth in ("gradient", "normalised"):
    ...     update = create("gse", growth=growth).propose(signals)
    ...     print(update.rows.tolist(), update.cols.tolist())
    [1] [1]
    [0] [2]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import LayerSize, Method, register
from regrow.methods.rules import check_share, exchange_keeping, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, strongest, weakest
from regrow.methods.signals import Gradient, Signals
from regrow.topology import TopologyUpdate
from regrow.topology.sampling import sample_free

_ROUNDS = 8  # of rejection sampling; what is missing then is drawn uniformly
_TINY = 1e-30  # where an input or a gradient is zero throughout, so is their product


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
    growth: Literal["gradient", "normalised"] = field(
        default="gradient",
        metadata={"help": "what ranks candidates: their gradient, or that over the norms of its input and output"},
    )
    random_share: float = field(default=0.0, metadata={"help": "share of the blocks that come drawn at random instead"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if self.sampling not in ("uniform", "norms", "sketch"):
            raise RegrowError(f"sampling must be 'uniform', 'norms' or 'sketch', got {self.sampling!r}")
        if not self.candidates > 0:
            raise RegrowError(f"candidates must be positive, got {self.candidates}")
        if self.growth not in ("gradient", "normalised"):
            raise RegrowError(f"growth must be 'gradient' or 'normalised', got {self.growth!r}")
        check_share("random_share", self.random_share)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        assert signals.gradient is not None
        topology = signals.topology
        dropped = weakest(block_norm(signals.values, self.norm), signals.n_moved)
        taken = keys_without(topology, dropped) if self.regrow_pruned else topology.keys()
        if dropped.numel() == 0 or taken.numel() == topology.n_positions:
            return None
        n_random = round(self.random_share * dropped.numel())
        positions = self._best(signals, signals.gradient, dropped.numel() - n_random, taken)
        occupied = torch.cat([taken, positions])
        n_random = min(n_random, topology.n_positions - occupied.numel())
        drawn = sample_free(topology.n_positions, occupied, n_random, signals.generator)
        positions = torch.cat([positions, drawn])
        return exchange_keeping(topology, dropped[: positions.numel()], positions)

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        return round(2 * tokens * self.candidates * layer.n_blocks * layer.block_shape.numbers)

    def _best(self, signals: Signals, gradient: Gradient, k: int, taken: Tensor) -> Tensor:
        """The ``k`` best of the candidates."""
        if k == 0:
            return taken.new_empty(0)
        candidates = self._candidates(signals, gradient, taken).sort().values
        rows, cols = candidates // signals.topology.n_block_cols, candidates % signals.topology.n_block_cols
        blocks = gradient.at(rows, cols)
        if self.growth == "gradient":
            scores = block_norm(blocks, self.norm)
        else:
            of_rows, of_cols = gradient.side_norms()
            scores = block_norm(blocks, "l2") / (of_rows[rows] * of_cols[cols]).clamp_min(_TINY)
        return strongest([(candidates, scores)], k, excluded=taken.new_empty(0))  # none is taken

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
