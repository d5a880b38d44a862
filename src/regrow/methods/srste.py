"""SR-STE: N:M sparsity from scratch, a straight-through gradient and a pull on what is pruned. Dense cost.

A. Zhou, Y. Ma, J. Zhu, J. Liu, Z. Zhang, K. Yuan, W. Sun, H. Li, *Learning N:M Fine-grained Structured Sparse Neural
Networks From Scratch*, 2021, https://arxiv.org/abs/2102.04010.

Not always sparse: the weights, their gradients and the products are dense. Of every ``m`` consecutive inputs of an
output the ``n`` weights of greatest magnitude multiply, by a mask ``M`` that is taken anew in every step. The gradient
of the effective weight goes to all weights, and those outside the mask are pulled to zero besides, so that the mask
comes to rest:

    w <- w - lr * (dL/d(M w) + pruned_decay * (1 - M) * w)

The pull is part of the gradient, so Adam scales it and clipping counts it. With several backward passes a step
(gradient accumulation) each brings its share.

2:4 on one group. The gradient of the sum is 1 everywhere, and the pruned weights get .0002 times themselves more:

    >>> import torch
    >>> from regrow.methods import create
    >>> from regrow.nn import TransformedLinear
    >>> layer = TransformedLinear(torch.nn.Linear(4, 1, bias=False), create("srste"), density=0.5)
    >>> _ = layer.weight.data.copy_(torch.tensor([[5.0, -1.0, 2.0, -7.0]]))
    >>> layer.effective().tolist()
    [[5.0, -0.0, 0.0, -7.0]]
    >>> layer.effective().sum().backward()
    >>> (layer.weight.grad - 1).mul(1e4).round().tolist()
    [[0.0, -2.0, 4.0, 0.0]]
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import register
from regrow.methods.nm import check_nm, nm_mask
from regrow.methods.transform import WeightTransform, straight_through
from regrow.nn.transformed import LayerView


@register("srste")
@dataclass(frozen=True)
class SRSTE(WeightTransform):
    """Multiply by the strongest n of every m weights; all get gradients, the others shrink."""

    paper = "Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch"
    year = 2021
    link = "https://arxiv.org/abs/2102.04010"

    n: int = field(default=2, metadata={"help": "weights that stay of every m; --density plays no part"})
    m: int = field(default=4, metadata={"help": "consecutive inputs of a group"})
    pruned_decay: float = field(default=2e-4, metadata={"help": "pull of pruned weights to 0, in their gradient"})

    def __post_init__(self) -> None:
        check_nm(self.n, self.m)
        if not self.pruned_decay >= 0:
            raise RegrowError(f"pruned_decay must be >= 0, got {self.pruned_decay}")

    @property
    def pattern(self) -> tuple[int, int]:
        return self.n, self.m

    def effective(self, layer: LayerView) -> Tensor:
        mask, weight = nm_mask(layer.weight, self.n, self.m), layer.weight.detach()
        pull = weight * ~mask * (self.pruned_decay / layer.moment.backward_passes)
        return straight_through(layer.weight, weight * mask, pull)

    def final(self, layer: LayerView) -> Tensor:
        return layer.weight * nm_mask(layer.weight, self.n, self.m)
