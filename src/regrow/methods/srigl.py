"""SRigL: RigL with constant fan-in and removal of whole rows. Its gradient is dense, so not always sparse.

M. Lasby, A. Golubeva, U. Evci, M. Nica, Y. Ioannou, *Dynamic Sparse Training with Structured Sparsity*, ICLR 2024,
https://arxiv.org/abs/2305.02299.

In block form a "neuron" is a block row, and every active row has the same number ``k`` of blocks, which also balances
the kernels' work. At an update, with ``N`` the layer's blocks at the start of training:

1. Salient are the blocks that are not among the weakest ``fraction``, and as many positions of largest gradient.
2. An active row with fewer than ``max(1, floor(gamma * k))`` salient positions is removed for good.
3. ``k = floor(N / active rows)``. Every active row keeps its strongest salient blocks, at most ``k``, and is filled
   up to ``k`` with its positions of largest gradient, at zero.

``N`` that is no multiple of the rows leaves fewer than one block per row unused.

Three blocks on 2 x 3 positions, so ``k = 1``. The block at (0, 2) is the weakest and goes. Row 1 has one salient
block of its own and row 0 has (0, 0), so both stay, each with its strongest:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Gradient, Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 0, 1], [0, 2, 1], n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0]).view(3, 1, 1)
    >>> gradient = Gradient(torch.tensor([[0.0, 6.0, 1.0], [9.0, 0.0, 3.0]]), torch.eye(2), block_size=1)
    >>> signals = Signals(values, topology, 1 / 3, torch.Generator().manual_seed(0), gradient=gradient)
    >>> update = create("srigl").propose(signals)
    >>> update.slots.tolist(), update.rows.tolist()
    ([1], [])
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import LayerSize, Method, register
from regrow.methods.rules import check_share, exchange, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Gradient, Signals
from regrow.topology import BlockTopology, TopologyUpdate


@register("srigl")
@dataclass(frozen=True)
class SRigL(Method):
    """RigL with the same number of blocks in every block row; rows that nothing supports are removed."""

    paper = "Lasby et al., Dynamic Sparse Training with Structured Sparsity"
    year = 2024
    link = "https://arxiv.org/abs/2305.02299"
    always_sparse = False
    needs_gradient = True
    exact_budget = False

    norm: Norm = field(default="l1", metadata={"help": "block norm of values and gradients"})
    gamma: float = field(default=0.3, metadata={"help": "share of its blocks that must be salient for a row to stay"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_share("gamma", self.gamma)

    def check_layer(self, name: str, topology: BlockTopology) -> None:
        check_one_per_row(name, topology, "srigl")

    def density_at(self, progress: float, start: float) -> float:
        return start  # but for less than a block per row

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        assert signals.gradient is not None
        topology, n_cols = signals.topology, signals.topology.n_block_cols
        budget = topology.n_blocks if signals.start_blocks is None else signals.start_blocks
        norms = block_norm(signals.values, self.norm)
        dropped = weakest(norms, signals.n_moved)
        kept = keys_without(topology, dropped)
        grown = signals.gradient.strongest(dropped.numel(), excluded=kept, norm=self.norm)
        active = self._active_rows(topology, budget, torch.cat([kept, grown]) // n_cols)
        fan_in = budget // active.numel()
        kept_slots = torch.isin(topology.keys(), kept).nonzero().flatten()
        kept = _strongest_of_rows(topology.keys()[kept_slots], norms[kept_slots], active, fan_in, n_cols)
        wanted = torch.cat([kept, _fill(signals.gradient, kept, active, fan_in, self.norm)])
        keys = topology.keys()
        return exchange(
            topology, (~torch.isin(keys, wanted)).nonzero().flatten(), wanted[~torch.isin(wanted, keys)].sort().values
        )

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        # Once for the salient positions of the layer, once for the fill of each row: pieces are not kept.
        return 2 * layer.dense_gradient_flops(tokens)

    def _active_rows(self, topology: BlockTopology, budget: int, salient_rows: Tensor) -> Tensor:
        """Rows that stay, ascending: enough salient positions, and enough rows to hold the budget."""
        present = topology.row_ptr.diff() > 0
        salient = torch.bincount(salient_rows, minlength=topology.n_block_rows)
        least = max(1, int(self.gamma * (budget // int(present.sum()))))
        stays = present & (salient >= least)
        fewest = -(-budget // topology.n_block_cols)
        if int(stays.sum()) < fewest:
            by_salience = torch.argsort(salient.masked_fill(~present, -1), descending=True, stable=True)
            stays[by_salience[:fewest]] = True
        return stays.nonzero().flatten()


def check_one_per_row(name: str, topology: BlockTopology, method: str) -> None:
    """Raise unless a layer has a block for every block row."""
    if topology.n_blocks < topology.n_block_rows:
        raise RegrowError(
            f"{name}: {topology.n_blocks} blocks leave less than one for each of {topology.n_block_rows} block rows, "
            f"which {method} needs; raise density above {1 / topology.n_block_cols:.3g} or use smaller blocks"
        )


def _strongest_of_rows(keys: Tensor, norms: Tensor, active: Tensor, fan_in: int, n_cols: int) -> Tensor:
    """Of the blocks in active rows, the ``fan_in`` strongest of each row."""
    inside = torch.isin(keys // n_cols, active)
    keys, norms = keys[inside], norms[inside]
    order = torch.argsort(norms, descending=True, stable=True)
    order = order[torch.argsort(keys[order] // n_cols, stable=True)]  # by row, strongest first
    rows = keys[order] // n_cols
    first = torch.searchsorted(rows, rows)  # where the row begins
    rank = torch.arange(rows.numel(), device=rows.device) - first
    return keys[order][rank < fan_in]


def _fill(gradient: Gradient, kept: Tensor, active: Tensor, fan_in: int, norm: Norm) -> Tensor:
    """For every active row the positions of largest gradient that bring it to ``fan_in``."""
    n_cols = gradient.n_block_cols
    missing = fan_in - torch.bincount(kept // n_cols, minlength=gradient.n_block_rows)
    missing[~torch.isin(torch.arange(missing.numel(), device=missing.device), active)] = 0
    found = []
    for first, scores in gradient.norms(norm):
        here = kept[(kept >= first * n_cols) & (kept < (first + scores.shape[0]) * n_cols)] - first * n_cols
        scores.view(-1)[here] = -1.0
        order = torch.argsort(scores, dim=1, descending=True, stable=True)
        rank = torch.arange(n_cols, device=scores.device)
        chosen = rank < missing[first : first + scores.shape[0], None]
        rows = torch.arange(first, first + scores.shape[0], device=scores.device)[:, None]
        found.append((rows * n_cols + order)[chosen])
    return torch.cat(found)
