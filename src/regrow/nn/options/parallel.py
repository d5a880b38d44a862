"""Sparse-IFT, parallel: several sparse branches, each with its activation, summed.

V. Thangarasa, S. Saxena, A. Gupta, S. Lie, *Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency*, 2023, https://arxiv.org/abs/2303.11525.

.. math:: \\text{hidden} = \\sum_{j=1}^{k} \\sigma(S_j x + b_j), \\quad k = \\text{round}(1 / \\rho)

for the first layer of a feed-forward half, which an activation follows. A branch's density is ``1 / k``, so the k
branches have as many products as the dense layer: by design it costs what that costs, and is not "always sparse" in
this library's sense. The second layer gets plain blocks, since no activation follows it and a sum of branches would be
one matrix; so do the layers outside. The branches are the rows of one sparse layer of ``k * hidden`` outputs, so that
they are one product; a method may move blocks from one to another.

    >>> from torch import nn
    >>> from regrow import sparsify
    >>> half = sparsify(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), density=0.25, block_size=16,
    ...     layer="parallel")
    >>> half[0].k, half[0].branches.out_features, half[0].branches.values.numel(), type(half[1]).__name__
    (4, 512, 8192, 'Identity')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from regrow.nn.options import ift
from regrow.nn.options.base import LayerOption, Pair, Place, dense_weight, register_layer
from regrow.nn.options.composite import Composite


class ParallelBranches(Composite):
    """``y = sum over j of activation(S_j x + bias_j)``.

    Args:
        place: the layer that an activation followed.
        k: branches.
        activation: without parameters.

    Attributes:
        branches: ``[k * out]`` outputs, branch after branch.
    """

    def __init__(self, place: Place, k: int, activation: nn.Module) -> None:
        super().__init__(place.in_features, place.out_features)
        self.k, self.activation = k, activation
        self.branches = place.of(place.in_features, k * place.out_features, density=1 / k).blocks()
        self.fused = _is_gelu(activation)
        if self.fused:  # in the product's own pass over memory
            self.branches.activation = "gelu"

    def compute(self, x: Tensor) -> Tensor:
        y = self.branches(x)
        y = y if self.fused else self.activation(y)
        return y.view(-1, self.k, self.out_features).sum(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"


def _is_gelu(activation: nn.Module) -> bool:
    """Whether it is the exact one: torch's, or transformers', which holds torch's function."""
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return getattr(activation, "act", None) is F.gelu


@register_layer("parallel")
@dataclass(frozen=True)
class Parallel(LayerOption):
    """Sparse branches with an activation each, summed, for the first layer of a feed-forward half."""

    paper = ift.PAPER
    year = ift.YEAR
    link = ift.LINK
    always_sparse = False
    pairs = True

    def build_pair(self, first: Place, activation: nn.Module, second: Place) -> Pair:
        return Pair(ParallelBranches(first, self.k(first), activation), nn.Identity(), second.blocks())

    def pair_weights(self, first: Place, second: Place) -> int:
        k = self.k(first)
        return self.weights(first.of(first.in_features, k * first.out_features, density=1 / k)) + self.weights(second)

    def k(self, place: Place) -> int:
        """Branches of a layer.

        Raises:
            RegrowError: they would be more than can be.
        """
        ift.widened(place.out_features, place)
        return round(1 / place.density)

    def reference(self, modules: Sequence[Any], x: Tensor) -> Tensor:
        first, _, second = modules
        hidden = first.activation(F.linear(x, dense_weight(first.branches), first.branches.bias))
        summed = hidden.view(len(x), first.k, first.out_features).sum(1)
        return F.linear(summed, dense_weight(second), second.bias)
