"""Progressive gradient flow: N:M sparsity that begins dense and closes step by step. Dense cost.

A. R. Bambhaniya, A. Yazdanbakhsh, S. Subramanian, S.-C. Kao, S. Agrawal, U. Evci, T. Krishna, *Progressive Gradient
Flow for Robust N:M Sparsity Training in Transformers*, 2024, https://arxiv.org/abs/2402.04744.

Not always sparse: the weights, their gradients and the products are dense. ``M`` is true at the ``n`` strongest of
every ``m`` weights and is taken anew in every step; ``t`` is the share of the training that is done.

Mask decay (``--kind linear`` or ``exponential``) lets the other weights, and their gradients, through with a factor
that falls:

    effective = w * (M + (1 - M) * d),    d = max(0, 1 - rate * t)  or  d = exp(-rate * t)

Structure decay (``--kind structure``) prunes outright, but at first little: the training is cut into equal frames that
keep m-1, m/2, m/4, ..., n of every m. What is pruned gets no gradient.

Evaluation and the saved model keep exactly n of every m, whatever ``d`` is.

One group halfway, where the linear factor is 1 - 1.25 / 2; and the frames of 2:8:

    >>> import torch
    >>> from regrow.methods import create
    >>> from regrow.nn.transformed import LayerView, Moment
    >>> half = LayerView(torch.tensor([[5.0, -1.0, 2.0, -8.0]]), {}, Moment(50, 100), density=0.5, block_size=1)
    >>> pgf = create("pgf")
    >>> pgf.effective(half).tolist(), pgf.final(half).tolist()
    ([[5.0, -0.375, 0.75, -8.0]], [[5.0, -0.0, 0.0, -8.0]])
    >>> create("pgf", kind="structure", n=2, m=8).frames
    (7, 4, 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import register
from regrow.methods.nm import check_nm, nm_mask
from regrow.methods.transform import WeightTransform
from regrow.nn.transformed import LayerView

_RATES = {"linear": 1.25, "exponential": 10.0, "structure": 0.0}
"""Linear decay is over after 80 % of the training; of exponential decay .00005 is left at its end."""


@register("pgf")
@dataclass(frozen=True)
class ProgressiveGradientFlow(WeightTransform):
    """Weights outside the strongest n of every m fade out, or n comes down from m - 1 in frames."""

    paper = "Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers"
    year = 2024
    link = "https://arxiv.org/abs/2402.04744"

    kind: Literal["linear", "exponential", "structure"] = field(
        default="linear", metadata={"help": "mask decay, linear or exponential, or structure decay"}
    )
    n: int = field(default=2, metadata={"help": "weights that stay of every m; --density plays no part"})
    m: int = field(default=4, metadata={"help": "consecutive inputs of a group"})
    rate: float | None = field(
        default=None,
        metadata={"help": "of mask decay, for the whole training; by default 1.25 (linear) or 10 (exponential)"},
    )

    def __post_init__(self) -> None:
        check_nm(self.n, self.m)
        if self.kind not in _RATES:
            raise RegrowError(f"kind must be one of {', '.join(_RATES)}, got {self.kind!r}")
        if self.rate is not None and not self.rate > 0:
            raise RegrowError(f"rate must be positive, got {self.rate}")

    @property
    def pattern(self) -> tuple[int, int]:
        return self.n, self.m

    @property
    def frames(self) -> tuple[int, ...]:
        """How many of every ``m`` each frame of structure decay keeps."""
        halves = [self.m >> i for i in range(1, self.m.bit_length())]
        return tuple(dict.fromkeys([self.m - 1, *(kept for kept in halves if kept > self.n), self.n]))

    def factor(self, progress: float) -> float:
        """What is left of a weight outside the mask.

        Example:
            >>> [ProgressiveGradientFlow(rate=2.0).factor(p) for p in (0.0, 0.25, 0.5, 1.0)]
            [1.0, 0.5, 0.0, 0.0]
        """
        rate = _RATES[self.kind] if self.rate is None else self.rate
        return math.exp(-rate * progress) if self.kind == "exponential" else max(0.0, 1.0 - rate * progress)

    def effective(self, layer: LayerView) -> Tensor:
        progress = layer.moment.progress
        if self.kind == "structure":
            kept = self.frames[min(int(progress * len(self.frames)), len(self.frames) - 1)]
            return layer.weight * nm_mask(layer.weight, kept, self.m)
        mask = nm_mask(layer.weight, self.n, self.m)
        return layer.weight * torch.where(mask, 1.0, self.factor(progress)).to(layer.weight.dtype)

    def final(self, layer: LayerView) -> Tensor:
        return layer.weight * nm_mask(layer.weight, self.n, self.m)
