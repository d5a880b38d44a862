"""DynSparse: magnitude pruning of blocks, random re-allocation. Always sparse.

A. Dietrich, F. Gressmann, D. Orr, I. Chelombiev, D. Justus, C. Luschi,
*Towards Structured Dynamic Sparse Pre-Training of BERT*, 2021, https://arxiv.org/abs/2108.06277, Algorithm 1.

At an update, in every weight tensor, the ``k = round(pr(t) * n_blocks)`` blocks of smallest norm are removed and
``k`` blocks are allocated uniformly at random among the positions that hold no surviving block. Their values and
optimizer state start at zero.

An update of 2 x 3 block positions traced by hand: four blocks of edge 1 with magnitudes 5, 1, 4, 2 lie at flat
positions 0, 1, 3, 5. At ``fraction=0.5`` slots 1 and 3 (magnitudes 1 and 2) go; positions 0 and 3 stay taken, so the
new ones come from {1, 2, 4, 5}:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0]).view(4, 1, 1)
    >>> signals = Signals(values, topology, fraction=0.5, generator=torch.Generator().manual_seed(0))
    >>> update = create("dynsparse").propose(signals)
    >>> update.slots.tolist()
    [1, 3]
    >>> set((update.rows * 3 + update.cols).tolist()) <= {1, 2, 4, 5}
    True
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import Method, Signals, register
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.optim.group_lasso import BlockFactor, group_lasso_
from regrow.topology import TopologyUpdate


@register("dynsparse")
@dataclass(frozen=True)
class DynSparse(Method):
    """Prune the blocks of smallest norm, re-allocate as many at random positions."""

    norm: Norm = field(default="l1", metadata={"help": "block norm that ranks blocks for removal"})
    regrow_pruned: bool = field(
        default=True, metadata={"help": "a position just pruned may be drawn again (with zero values)"}
    )
    group_lasso: float = field(
        default=0.0, metadata={"help": "strength of the decoupled group lasso on blocks; 0 is off"}
    )
    group_lasso_factor: BlockFactor = field(
        default="elements", metadata={"help": "what B means in the lasso's sqrt(B): block elements or edge"}
    )

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if self.group_lasso < 0:
            raise RegrowError(f"group_lasso must be >= 0, got {self.group_lasso}")

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology, k = signals.topology, signals.n_moved
        if k == 0:
            return None
        slots = weakest(block_norm(signals.values, self.norm), k)
        occupied = topology.keys()
        if self.regrow_pruned:
            survives = torch.ones_like(occupied, dtype=torch.bool)
            survives[slots] = False
            occupied = occupied[survives]
        positions = topology.free_positions(k, signals.generator, occupied=occupied)
        return TopologyUpdate(slots, positions // topology.n_block_cols, positions % topology.n_block_cols)

    def regularise_(self, values: Tensor, lr: float) -> None:
        if self.group_lasso > 0:
            group_lasso_(values, lr=lr, strength=self.group_lasso, factor=self.group_lasso_factor)
