"""CHTs, the soft rule of Cannistraci-Hebb training: removal and growth are sampled. Always sparse.

Y. Zhang, D. Cerretti, J. Zhao, W. Wu, Z. Liao, U. Michieli, C. V. Cannistraci, *Brain network science modelling of
sparse neural networks enables Transformers and LLMs to perform as fully connected*, 2025,
https://arxiv.org/abs/2501.19107.

The blocks that stay are a sample without replacement with probability proportional to ``norm^T``, where ``T`` rises
linearly from 1 to 9 over training, from nearly random to nearly magnitude. The positions that come are a sample with
probability proportional to their CH2-L3n score (:mod:`regrow.methods.cht`); pairs without a path of length three come
last, at random. In the paper a share of .1 moves every 100 steps, cosine.

In the 3 x 3 example of ``cht`` every empty position that can be reached, (2, 0) alone, is taken when the block at (2,
2) goes:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> rows, cols = [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 1, 2]
    >>> topology = BlockTopology.from_coordinates(rows, cols, n_block_rows=3, n_block_cols=3)
    >>> values = torch.tensor([5.0, 4.0, 3.0, 6.0, 7.0, 0.0]).view(6, 1, 1)
    >>> signals = Signals(values, topology, fraction=1 / 6, generator=torch.Generator().manual_seed(0))
    >>> update = create("chts").propose(signals)
    >>> update.slots.tolist(), update.rows.tolist(), update.cols.tolist()
    ([5], [2], [0])
"""

from __future__ import annotations

from dataclasses import dataclass, field

from regrow.errors import RegrowError
from regrow.methods.base import LayerSize, Method, register
from regrow.methods.cht import ch2_l3n, ch2_l3n_flops, graph
from regrow.methods.rules import exchange_keeping, keys_without, n_regrown
from regrow.methods.scores import Norm, block_norm, check_norm, random_keys, strongest, weakest
from regrow.methods.signals import Signals, positions_of
from regrow.topology import TopologyUpdate


@register("chts")
@dataclass(frozen=True)
class CHTs(Method):
    """Sample what stays by magnitude and what comes by the network's shape."""

    paper = "Zhang et al., Brain network science modelling of sparse neural networks"
    year = 2025
    link = "https://arxiv.org/abs/2501.19107"

    norm: Norm = field(default="l1", metadata={"help": "block norm that weighs blocks for removal"})
    start_power: float = field(default=1.0, metadata={"help": "exponent of the norm at the start of training"})
    end_power: float = field(default=9.0, metadata={"help": "exponent of the norm at its end"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        for name in ("start_power", "end_power"):
            if getattr(self, name) < 0:
                raise RegrowError(f"{name} must be >= 0, got {getattr(self, name)}")

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology = signals.topology
        power = self.start_power + (self.end_power - self.start_power) * signals.progress
        norms = block_norm(signals.values, self.norm).double()
        relative = norms / norms.max().clamp_min(1e-300)  # powers of 9 must not overflow
        chance_to_stay = random_keys(relative**power, signals.generator)
        surplus = topology.n_blocks - signals.n_after
        exchanged = round(signals.fraction * signals.n_after)
        dropped = weakest(chance_to_stay, min(surplus + exchanged, topology.n_blocks - 1))
        kept = keys_without(topology, dropped)
        pieces = (
            (positions, random_keys(scores, signals.generator))
            for positions, scores in positions_of(ch2_l3n(graph(topology, kept)))
        )
        positions = strongest(pieces, n_regrown(signals, dropped), excluded=kept)
        return exchange_keeping(topology, dropped, positions)

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        return ch2_l3n_flops(layer)
