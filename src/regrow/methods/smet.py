"""SMET: every block counts its own optimizer steps and warms up after its allocation. Always sparse.

*SMET*, ICML 2026, https://arxiv.org/abs/2606.00888.

Removal takes the blocks of smallest L1 norm, growth is uniformly random over positions that were empty before the
update. What is new is the optimizer: with a global step Adam's bias correction assumes moments that a fresh block
does not have, and its first update is ``(1 - beta1) / sqrt(1 - beta2) = 3.16`` times the learning rate. Here a
re-allocated block's moments and step are zeroed, the correction uses the block's own step, and its update is damped
by ``min(1, step / W)`` (:class:`regrow.optim.AdamW` with ``regrow_warmup=W``). Weight decay 0 and a learning rate of
about ``5e-4 / density`` belong to the recipe (``--weight-decay 0 --lr-rule inverse``).

An update of 2 x 3 positions: blocks of magnitudes 5, 1, 4, 2 at flat positions 0, 1, 3, 5. Slots 1 and 3 go; only
positions 2 and 4 were empty, so they are taken:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0]).view(4, 1, 1)
    >>> signals = Signals(values, topology, fraction=0.5, generator=torch.Generator().manual_seed(0))
    >>> update = create("smet").propose(signals)
    >>> update.slots.tolist(), sorted((update.rows * 3 + update.cols).tolist())
    ([1, 3], [2, 4])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regrow.errors import RegrowError
from regrow.methods.base import Method, register
from regrow.methods.rules import exchange
from regrow.methods.scores import block_norm, weakest
from regrow.methods.signals import Signals
from regrow.topology import TopologyUpdate


@register("smet")
@dataclass(frozen=True)
class SMET(Method):
    """Prune by L1, grow at random on empty positions; blocks step and warm up on their own clock."""

    paper = "SMET"
    year = 2026
    link = "https://arxiv.org/abs/2606.00888"

    regrow_warmup: int = field(default=100, metadata={"help": "steps over which a re-allocated block warms up"})

    def __post_init__(self) -> None:
        if self.regrow_warmup < 0:
            raise RegrowError(f"regrow_warmup must be >= 0, got {self.regrow_warmup}")

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology = signals.topology
        free = topology.n_positions - topology.n_blocks
        dropped = weakest(block_norm(signals.values, "l1"), min(signals.n_moved, free))
        return exchange(topology, dropped, topology.free_positions(dropped.numel(), signals.generator))

    def optimizer_options(self) -> dict[str, Any]:
        return {"block_steps": True, "regrow_warmup": self.regrow_warmup}
