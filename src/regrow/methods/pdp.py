"""PDP: soft masks that are a function of the weights alone, without parameters of their own. Dense cost.

M. Cho, S. Adya, D. Naik, *PDP: Parameter-free Differentiable Pruning is All You Need*, 2023,
https://arxiv.org/abs/2305.11203.

Not always sparse: the weights, their gradients and the products are dense. For a target sparsity ``s`` of a layer,
``t`` lies midway between the greatest magnitude that is to go and the smallest that is to stay:

    m(w) = 1 / (1 + exp(-(w^2 - t^2) / tau)),    effective = m(w) * w

The gradient goes through ``m`` too, which drives weights near ``t`` to one side or the other. After a warm-up without
pruning (``begin``) the target grows linearly to 1 - ``density``, which it reaches at ``end``. Every layer has the same
target; the paper shares a global one out by magnitude. Evaluation and the saved model keep exactly the share
``density`` of single weights, the strongest of each layer.

Half of the weights, one of them just at ``t`` = 3, where the mask is one half:

    >>> import torch
    >>> from regrow.methods import create
    >>> from regrow.methods.pdp import soft_mask, threshold
    >>> weight = torch.tensor([[0.1, -2.0, 4.0, -5.0]])
    >>> t = threshold(weight, kept=2)
    >>> float(t), soft_mask(torch.tensor([0.0, 3.0, 6.0]), t, tau=1e-4).tolist()
    (3.0, [0.0, 0.5, 1.0])
    >>> [round(create("pdp", begin=0.2, end=0.7).target(p, density=0.1), 3) for p in (0.1, 0.45, 0.7, 1.0)]
    [0.0, 0.45, 0.9, 0.9]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import register
from regrow.methods.density import way
from regrow.methods.nm import strongest_mask
from regrow.methods.rules import check_window
from regrow.methods.transform import WeightTransform
from regrow.nn.transformed import LayerView


@register("pdp")
@dataclass(frozen=True)
class PDP(WeightTransform):
    """Scale each weight by a sigmoid of its square around a threshold that prunes more and more."""

    paper = "Cho et al., PDP: Parameter-free Differentiable Pruning is All You Need"
    year = 2023
    link = "https://arxiv.org/abs/2305.11203"

    tau: float = field(default=1e-4, metadata={"help": "temperature of the mask, in squares of weights"})
    begin: float = field(default=0.2, metadata={"help": "share of the training after which pruning begins"})
    end: float = field(default=0.7, metadata={"help": "share after which the target is 1 - density"})

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise RegrowError(f"tau must be positive, got {self.tau}")
        check_window(self.begin, self.end)

    def target(self, progress: float, density: float) -> float:
        """The sparsity at a share of the training."""
        return (1 - density) * way(progress, self.begin, self.end)

    def effective(self, layer: LayerView) -> Tensor:
        weight, kept = layer.weight, _kept(layer, 1 - self.target(layer.moment.progress, layer.density))
        if kept == weight.numel():
            return weight
        return weight * soft_mask(weight, threshold(weight, kept), self.tau)

    def final(self, layer: LayerView) -> Tensor:
        return layer.weight * strongest_mask(layer.weight.detach().abs(), _kept(layer, layer.density))


def _kept(layer: LayerView, density: float) -> int:
    return max(1, round(density * layer.weight.numel()))


@torch.no_grad()
def threshold(weight: Tensor, kept: int) -> Tensor:
    """A magnitude midway between the ``kept`` greatest and the rest, ``1 <= kept < numel``."""
    size = weight.abs().flatten()
    pruned = size.numel() - kept
    return (size.kthvalue(pruned).values + size.kthvalue(pruned + 1).values) / 2


def soft_mask(weight: Tensor, t: Tensor, tau: float) -> Tensor:
    """The mask: below one half where ``|weight| < t``, above where it is greater."""
    return torch.sigmoid((weight.square() - t.square()) / tau)
