"""S-STE: 2:4 sparsity by a continuous soft threshold, for feed-forward layers. Dense cost.

Y. Hu, J. Zhu, J. Chen, *S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training*, 2024,
https://arxiv.org/abs/2409.09099.

Not always sparse: the weights, their gradients and the products are dense. A hard mask jumps when two weights change
places. Here the magnitudes of every four lose ``t``, the second smallest among them, so that a weight is already 0
when it leaves:

    S(w) = sign(w) * max(|w| - t, 0),    effective = beta * S(w),    beta = <w, S(w)> / |S(w)|^2

``beta`` makes ``beta * S(w)`` the closest to ``w``. It is taken once per layer, when training begins, and stays. The
gradient goes straight through. Attention layers stay dense. The paper's low-precision products and its sampled sparse
gradients of activations, which are for GPUs, are left out.

One group: the second smallest magnitude is 2, and beta = (5 * 3 + 8 * 6) / (3^2 + 6^2) = 1.4.

    >>> import torch
    >>> from regrow.methods import create
    >>> from regrow.methods.sste import soft_threshold
    >>> from regrow.nn import TransformedLinear
    >>> dense = torch.nn.Linear(4, 1, bias=False)
    >>> _ = dense.weight.data.copy_(torch.tensor([[5.0, -1.0, 2.0, -8.0]]))
    >>> soft_threshold(dense.weight).tolist()
    [[3.0, -0.0, 0.0, -6.0]]
    >>> layer = TransformedLinear(dense, create("sste"), density=0.5)
    >>> print(f"{layer.beta:.4f}", [round(w, 4) for w in layer.effective().flatten().tolist()])
    1.4000 [4.2, -0.0, 0.0, -8.4]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.methods.base import register
from regrow.methods.transform import WeightTransform, straight_through
from regrow.nn.transformed import LayerView


@register("sste")
@dataclass(frozen=True)
class SSTE(WeightTransform):
    """Of every four weights of feed-forward layers the two weakest are 0, by a soft threshold."""

    paper = "Hu et al., S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training"
    year = 2024
    link = "https://arxiv.org/abs/2409.09099"

    leaves_out = ("*.attention.*",)

    @property
    def pattern(self) -> tuple[int, int]:
        return 2, 4

    def initial_state(self, layer: LayerView, generator: torch.Generator) -> dict[str, Tensor]:
        weight = layer.weight.detach()
        soft = soft_threshold(weight)
        square = soft.square().sum()
        # |w| >= |S(w)|, so it is never below 1; of a weight without any scale it is 1.
        beta = torch.where(square > 0, (weight * soft).sum() / square, torch.ones_like(square)).clamp_min(1.0)
        return {"beta": beta}

    def wrong_state(self, layer: LayerView) -> str | None:
        beta = float(layer.state["beta"])
        return None if beta >= 1 else f"beta must be at least 1, got {beta}"

    def effective(self, layer: LayerView) -> Tensor:
        return straight_through(layer.weight, self.final(layer).detach())

    def final(self, layer: LayerView) -> Tensor:
        return layer.state["beta"] * soft_threshold(layer.weight)


def soft_threshold(weight: Tensor) -> Tensor:
    """Take the second smallest magnitude of every four from all of them; what would change its sign is 0.

    Example:
        >>> soft_threshold(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist()
        [[0.0, 0.0, 1.0, 2.0]]
    """
    size = weight.abs().view(-1, 4)
    low, high = torch.minimum(size[:, :2], size[:, 2:]), torch.maximum(size[:, :2], size[:, 2:])
    second = torch.minimum(low.amax(1), high.amin(1))  # of two sorted pairs
    return weight.sign() * (size - second[:, None]).clamp_min(0).view_as(weight)
