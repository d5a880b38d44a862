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
from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import Method, register
from regrow.methods.rules import exchange, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Signals
from regrow.optim.group_lasso import BlockFactor, group_lasso_
from regrow.topology import BlockTopology, TopologyUpdate
from regrow.topology.fixed_size import sent
from regrow.topology.sampling import sample_free_by_group


@register("dynsparse")
@dataclass(frozen=True)
class DynSparse(Method):
    """Prune the blocks of smallest norm, re-allocate as many at random positions."""

    paper = "Dietrich et al., Towards Structured Dynamic Sparse Pre-Training of BERT"
    year = 2021
    link = "https://arxiv.org/abs/2108.06277"

    norm: Norm = field(default="l1", metadata={"help": "block norm that ranks blocks for removal"})
    regrow_pruned: bool = field(
        default=True, metadata={"help": "a position just pruned may be drawn again (with zero values)"}
    )
    growth: Literal["random", "unexplored"] = field(
        default="random", metadata={"help": "unexplored: positions that were never active come first"}
    )
    quota_rows: int = field(
        default=0,
        metadata={
            "help": "groups of so many block rows keep equally many blocks each, which balances the work; 1 is "
            "constant fan-in, 0 is off"
        },
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
        if self.growth not in ("random", "unexplored"):
            raise RegrowError(f"growth must be 'random' or 'unexplored', got {self.growth!r}")
        if self.quota_rows < 0:
            raise RegrowError(f"quota_rows must be >= 0, got {self.quota_rows}")
        if self.quota_rows and self.growth == "unexplored":
            raise RegrowError("quota_rows and growth='unexplored' both decide where blocks grow; choose one")

    def check_layer(self, name: str, topology: BlockTopology) -> None:
        if not self.quota_rows:
            return
        if topology.n_block_rows % self.quota_rows:
            raise RegrowError(
                f"quota_rows={self.quota_rows} does not divide the {topology.n_block_rows} block rows of {name}"
            )
        n_groups = topology.n_block_rows // self.quota_rows
        if topology.n_blocks < n_groups:
            raise RegrowError(
                f"{name}: {topology.n_blocks} blocks leave less than one for each of its {n_groups} groups of "
                f"{self.quota_rows} block rows; raise density or quota_rows"
            )

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology = signals.topology
        norms = block_norm(signals.values, self.norm)
        if self.quota_rows:
            return self._propose_by_quota(topology, norms, signals)
        dropped = weakest(norms, signals.n_moved)
        taken = keys_without(topology, dropped) if self.regrow_pruned else topology.keys()
        k, new = dropped.numel(), dropped.new_empty(0)
        if self.growth == "unexplored" and signals.explored is not None:
            new = sent(signals.explored.sample_new(k, signals.generator), taken.device)
        rest = topology.free_positions(k - new.numel(), signals.generator, occupied=torch.cat([taken, new]))
        return exchange(topology, dropped, torch.cat([new, rest]))

    def regularise_(self, values: Tensor, lr: float) -> None:
        if self.group_lasso > 0:
            group_lasso_(values, lr=lr, strength=self.group_lasso, factor=self.group_lasso_factor)

    def _propose_by_quota(self, topology: BlockTopology, norms: Tensor, signals: Signals) -> TopologyUpdate | None:
        """Drop the weakest of all, then the weakest of every group above its quota; refill each group."""
        if signals.n_moved == 0:
            return None
        size = self.quota_rows * topology.n_block_cols
        n_groups = topology.n_positions // size
        groups, keys = torch.arange(n_groups, device=norms.device), topology.keys()
        quota = topology.n_blocks // n_groups + (groups < topology.n_blocks % n_groups)
        rank = torch.empty_like(keys)
        rank[torch.argsort(norms, stable=True)] = torch.arange(keys.numel(), device=keys.device)
        order = torch.argsort(rank, descending=True)
        order = order[torch.argsort(keys[order] // size, stable=True)]  # by group, strongest first
        group = keys[order] // size
        place = torch.arange(group.numel(), device=keys.device) - torch.searchsorted(group, group)
        drop = torch.zeros_like(keys, dtype=torch.bool)
        drop[order] = place >= quota[group]
        drop |= rank < signals.n_moved
        dropped = drop.nonzero().flatten()
        wanted = quota - torch.bincount(keys[~drop] // size, minlength=n_groups)
        taken = keys[~drop] if self.regrow_pruned else keys
        return exchange(topology, dropped, sample_free_by_group(size, taken, wanted, signals.generator))
