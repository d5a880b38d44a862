"""RigL: magnitude pruning, growth where the dense gradient is largest. Its gradient is dense, so not always sparse.

U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen, *Rigging the Lottery: Making All Tickets Winners*, ICML 2020,
https://arxiv.org/abs/1911.11134. There: a share of .3 every 100 steps, cosine, no updates after 75 % of training, ERK
densities; here all of these are the schedule's and ``sparsify``'s options.

The ``k`` weakest blocks go, and the ``k`` positions of largest gradient norm that hold no surviving block come, at
zero. A block that is dropped and grown again stays as it is. The full gradient is computed on update steps only, in
pieces of at most 1/16 of the weight that are reduced to block norms at once, and in the backward pass, so that no
activation outlives it; with gradient accumulation it is that of the last micro-batch. In the published code the mask
update replaces the optimizer step; here the step is taken too, and the decision uses weights and gradient from before
it.

An update of 2 x 3 positions: blocks of magnitudes 5, 1, 4, 2 at flat positions 0, 1, 3, 5, and a gradient of magnitudes
``[[9, 6, 1], [9, 0, 3]]``. Slots 1 and 3 go; among positions 1, 2, 4, 5 the gradient is largest at 1 and 5: both blocks
stay where they are. With a gradient of 7 at position 4, slot 3 moves there:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Gradient, Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0]).view(4, 1, 1)
    >>> def propose(dense_gradient):
    ...     gradient = Gradient(torch.tensor(dense_gradient), torch.eye(2), block_size=1)
    ...     signals = Signals(values, topology, 0.5, torch.Generator().manual_seed(0), gradient=gradient)
    ...     return create("rigl").propose(signals)
    >>> propose([[9.0, 6.0, 1.0], [9.0, 0.0, -3.0]]) is None
    True
    >>> update = propose([[9.0, 6.0, 1.0], [9.0, 7.0, -3.0]])
    >>> update.slots.tolist(), update.rows.tolist(), update.cols.tolist()
    ([3], [1], [1])
"""

from __future__ import annotations

from dataclasses import dataclass, field

from regrow.methods.base import LayerSize, Method, register
from regrow.methods.rules import exchange_keeping, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Signals
from regrow.topology import TopologyUpdate


@register("rigl")
@dataclass(frozen=True)
class RigL(Method):
    """Prune the weakest blocks, grow where the dense gradient is largest."""

    paper = "Evci et al., Rigging the Lottery: Making All Tickets Winners"
    year = 2020
    link = "https://arxiv.org/abs/1911.11134"
    always_sparse = False
    needs_gradient = True

    norm: Norm = field(default="l1", metadata={"help": "block norm of values and gradients"})
    regrow_pruned: bool = field(default=True, metadata={"help": "a block just pruned may be grown again, and stays"})

    def __post_init__(self) -> None:
        check_norm(self.norm)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        assert signals.gradient is not None
        topology = signals.topology
        dropped = weakest(block_norm(signals.values, self.norm), signals.n_moved)
        taken = keys_without(topology, dropped) if self.regrow_pruned else topology.keys()
        positions = signals.gradient.strongest(dropped.numel(), excluded=taken, norm=self.norm)
        return exchange_keeping(topology, dropped[: positions.numel()], positions)

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        return layer.dense_gradient_flops(tokens)
