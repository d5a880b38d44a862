"""AC/DC and its variants: dense and sparse phases take turns on one dense weight. Not always sparse, saves nothing.

A. Peste, E. Iofinova, A. Vladu, D. Alistarh, *AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
Networks*, 2021, https://arxiv.org/abs/2106.12379. Dietrich et al. 2021 (arXiv 2108.06277, section A.5) use variants of
it as controls: which blocks a sparse phase trains (``selection``), and what becomes of the others (``unused``).

The training is cut into ``n_updates`` segments that take turns, so that the last one is sparse. With ``dense_until``
there is one switch instead: dense up to that share of the steps, sparse from there on; at 0 and with ``unused="zero"``
that is static sparse training, carried out on a dense weight.

At the beginning of a sparse phase the share ``density`` of all blocks is chosen: the strongest by L1 norm
(``magnitude``), random ones drawn anew (``random``), or always the same random ones (``fixed``). The other blocks are
set to zero or frozen at their values, and get neither gradient, momentum nor decay until the next dense phase.

Four segments of ten steps, and the second sparse phase's choice of two blocks:

    >>> import torch
    >>> from regrow.methods import create
    >>> from regrow.training import UpdateSchedule
    >>> acdc = create("acdc")
    >>> [acdc.phase(UpdateSchedule(total_steps=40, n_updates=4), step) for step in (0, 10, 20, 30)]
    [None, 1, None, 3]
    >>> acdc.choose(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), 2, torch.Generator())
    tensor([[False,  True],
            [ True, False]])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import DenseLayoutMethod, Schedule, register
from regrow.methods.rules import check_share
from regrow.methods.scores import weakest


@register("acdc")
@dataclass(frozen=True)
class ACDC(DenseLayoutMethod):
    """Train all weights and a share of them in turns; the rest is zeroed or frozen meanwhile."""

    paper = "Peste et al., AC/DC: Alternating Compressed/DeCompressed Training"
    year = 2021
    link = "https://arxiv.org/abs/2106.12379"

    unused: Literal["zero", "freeze"] = field(
        default="zero", metadata={"help": "what blocks that do not train are: zero, or frozen at their values"}
    )
    selection: Literal["magnitude", "random", "fixed"] = field(
        default="magnitude", metadata={"help": "which blocks a sparse phase trains"}
    )
    dense_until: float | None = field(
        default=None,
        metadata={
            "help": "share of the training that is dense before all the rest is sparse; by default they take turns"
        },
    )

    def __post_init__(self) -> None:
        if self.unused not in ("zero", "freeze"):
            raise RegrowError(f"unused must be 'zero' or 'freeze', got {self.unused!r}")
        if self.selection not in ("magnitude", "random", "fixed"):
            raise RegrowError(f"selection must be 'magnitude', 'random' or 'fixed', got {self.selection!r}")
        if self.dense_until is not None:
            check_share("dense_until", self.dense_until)

    def phase(self, schedule: Schedule, step: int) -> int | None:
        if self.dense_until is not None:
            return None if step < self.dense_until * schedule.total_steps else 0
        segment = step * schedule.n_updates // schedule.total_steps
        if (schedule.n_updates - segment) % 2 == 0:
            return None
        return 0 if self.selection == "fixed" else segment

    def choose(self, norms: Tensor, n_active: int, generator: torch.Generator) -> Tensor:
        flat = norms.flatten() if self.selection == "magnitude" else torch.rand(norms.numel(), generator=generator)
        mask = torch.ones(norms.numel(), dtype=torch.bool, device=norms.device)
        mask[weakest(flat, norms.numel() - n_active).to(norms.device)] = False
        return mask.view_as(norms)
