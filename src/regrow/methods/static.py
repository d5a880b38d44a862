"""Static: the random pattern of the start is kept. Always sparse.

The control every dynamic method is measured against (Dietrich et al. 2021, section 3; U. Evci et al., *Rigging the
Lottery*, 2020, https://arxiv.org/abs/1911.11134, call it "Static"). No update ever moves a block:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> topology = BlockTopology.from_coordinates([0, 1], [0, 2], n_block_rows=2, n_block_cols=3)
    >>> signals = Signals(torch.zeros(2, 1, 1), topology, fraction=0.5, generator=torch.Generator())
    >>> create("static").propose(signals) is None
    True
"""

from __future__ import annotations

from dataclasses import dataclass

from regrow.methods.base import Method, register
from regrow.methods.signals import Signals


@register("static")
@dataclass(frozen=True)
class Static(Method):
    """Keep the random pattern of the start."""

    paper = "Evci et al., Rigging the Lottery (as a baseline)"
    year = 2020
    link = "https://arxiv.org/abs/1911.11134"
    moves = False

    def propose(self, signals: Signals) -> None:
        return None
