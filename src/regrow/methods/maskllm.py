"""MaskLLM: the weights stay, and which two of every four count is learned. Dense cost.

G. Fang, H. Yin, S. Muralidharan, G. Heinrich, J. Pool, J. Kautz, P. Molchanov, X. Wang, *MaskLLM: Learnable
Semi-Structured Sparsity for Large Language Models*, 2024, https://arxiv.org/abs/2409.17481.

Not always sparse: weights and products are dense, and there are six logits for every four weights besides. The
weights are frozen; it is meant for models that have been trained (``regrow finetune --sparsify maskllm``). Every group
of four has a logit ``p`` for each of the six masks that keep two. Training multiplies by a mixture of the masks, drawn
anew in every step with Gumbel noise ``g``, and the gradient goes to the logits:

    y = softmax((scale * p + g) / temperature),    effective = w * sum_i y_i M_i

Over the training the temperature falls linearly from 4 to .05 and the scale of the logits rises from 100 to 500.
Evaluation and the saved model use the mask of the greatest logit. The logits begin as noise of standard deviation .01,
raised by ``prior`` times as much for each weight that a mask shares with the two greatest magnitudes, beyond one.

The masks; the one that an undisturbed group begins with; and a mixture that keeps two weights' worth of four:

    >>> import torch
    >>> from regrow.methods import create
    >>> from regrow.methods.maskllm import masks
    >>> from regrow.nn import TransformedLinear
    >>> masks(2, 4).int().tolist()
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    >>> dense = torch.nn.Linear(4, 1, bias=False)
    >>> _ = dense.weight.data.copy_(torch.tensor([[5.0, -1.0, 2.0, -7.0]]))
    >>> layer = TransformedLinear(dense, create("maskllm", prior=10.0), density=0.5)
    >>> layer.eval().effective().tolist(), layer.weight.requires_grad
    ([[5.0, -0.0, 0.0, -7.0]], False)
    >>> round((layer.train().effective() / layer.weight).sum().item(), 4)
    2.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import register
from regrow.methods.nm import check_nm, nm_mask
from regrow.methods.transform import WeightTransform
from regrow.nn.transformed import LayerView

_STD = 0.01
_MOST = 70  # masks of a group, those of 4:8


@register("maskllm")
@dataclass(frozen=True)
class MaskLLM(WeightTransform):
    """Learn which n of every m frozen weights count, by logits of the possible masks."""

    paper = "Fang et al., MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models"
    year = 2024
    link = "https://arxiv.org/abs/2409.17481"

    trained = ("logits",)
    frozen = True

    n: int = field(default=2, metadata={"help": "weights that stay of every m; --density plays no part"})
    m: int = field(default=4, metadata={"help": "consecutive inputs of a group"})
    prior: float = field(default=3.0, metadata={"help": "how much the logits begin in favour of great magnitudes"})
    temperature: float = field(default=4.0, metadata={"help": "of the draws, at first"})
    final_temperature: float = field(default=0.05, metadata={"help": "at the end"})
    scale: float = field(default=100.0, metadata={"help": "of the logits, at first"})
    final_scale: float = field(default=500.0, metadata={"help": "at the end"})

    def __post_init__(self) -> None:
        check_nm(self.n, self.m)
        if math.comb(self.m, self.n) > _MOST:
            raise RegrowError(
                f"{self.n}:{self.m} has {math.comb(self.m, self.n)} masks, each with a logit for every group; choose n "
                f"and m with at most {_MOST}"
            )
        for name in ("temperature", "final_temperature", "scale", "final_scale"):
            if not getattr(self, name) > 0:
                raise RegrowError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.prior >= 0:
            raise RegrowError(f"prior must be >= 0, got {self.prior}")

    @property
    def pattern(self) -> tuple[int, int]:
        return self.n, self.m

    def initial_state(self, layer: LayerView, generator: torch.Generator) -> dict[str, Tensor]:
        kept = nm_mask(layer.weight, self.n, self.m).view(-1, self.m)
        choices = masks(self.n, self.m).to(layer.weight)
        noise = torch.randn(len(kept), len(choices), generator=generator).to(layer.weight)
        shared = kept.to(layer.weight) @ choices.T
        return {"logits": _STD * (noise + self.prior * (shared - self.n / 2))}

    def effective(self, layer: LayerView) -> Tensor:
        logits, progress = layer.state["logits"], layer.moment.progress
        uniform = torch.rand(logits.shape, generator=layer.moment.generator()).clamp_min(1e-30).to(logits)
        scale = self.scale + (self.final_scale - self.scale) * progress
        temperature = self.temperature + (self.final_temperature - self.temperature) * progress
        mixture = torch.softmax((scale * logits - (-uniform.log()).log()) / temperature, dim=1)
        return layer.weight * (mixture @ masks(self.n, self.m).to(logits)).view_as(layer.weight)

    def final(self, layer: LayerView) -> Tensor:
        choices = masks(self.n, self.m).to(layer.weight)
        return layer.weight * choices[layer.state["logits"].argmax(1)].view_as(layer.weight)


def masks(n: int, m: int) -> Tensor:
    """``[C(m, n), m]``: every way to keep ``n`` of ``m``, in lexical order.

    Example:
        >>> masks(1, 2).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    kept = torch.tensor(list(combinations(range(m), n)))
    return torch.zeros(len(kept), m).scatter_(1, kept, 1.0)
