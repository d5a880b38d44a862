"""SET: magnitude pruning, uniformly random growth, redrawn positions stay. Always sparse.

D. C. Mocanu, E. Mocanu, P. Stone, P. H. Nguyen, M. Gibescu, A. Liotta, *Scalable training of artificial neural
networks with adaptive sparse connectivity inspired by network science*, Nature Communications 9, 2383 (2018),
https://doi.org/10.1038/s41467-018-04316-3. In the paper a share of .3 moves at every epoch.

The ``k = floor(fraction * n_blocks)`` blocks of smallest norm go; ``k`` positions are drawn uniformly among all that
hold no surviving block, those just left included. Where one of these is drawn, the block simply stays: it keeps its
values and moments. All others start at zero.

An update of 2 x 3 positions: blocks of magnitudes 5, 1, 4, 2 at flat positions 0, 1, 3, 5; slots 1 and 3 are to go.
This draw gives positions 5 and 4, so slot 3 stays at 5 and only slot 1 moves, to 4:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0]).view(4, 1, 1)
    >>> signals = Signals(values, topology, fraction=0.5, generator=torch.Generator().manual_seed(3))
    >>> update = create("set").propose(signals)
    >>> update.slots.tolist(), update.rows.tolist(), update.cols.tolist()
    ([1], [1], [1])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from regrow.methods.base import Method, register
from regrow.methods.rules import exchange_keeping, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Signals
from regrow.topology import TopologyUpdate


@register("set")
@dataclass(frozen=True)
class SET(Method):
    """Prune the weakest blocks, grow at random anywhere; a position drawn again keeps its block."""

    paper = "Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity"
    year = 2018
    link = "https://doi.org/10.1038/s41467-018-04316-3"

    norm: Norm = field(default="l1", metadata={"help": "block norm that ranks blocks for removal"})

    def __post_init__(self) -> None:
        check_norm(self.norm)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology, k = signals.topology, math.floor(signals.fraction * signals.topology.n_blocks)
        dropped = weakest(block_norm(signals.values, self.norm), k)
        positions = topology.free_positions(k, signals.generator, occupied=keys_without(topology, dropped))
        return exchange_keeping(topology, dropped, positions)
