"""Sparse-IFT, factorized: two sparse matrices in a row, with as many products as the dense one.

V. Thangarasa, S. Saxena, A. Gupta, S. Lie, *Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency*, 2023, https://arxiv.org/abs/2303.11525.

.. math:: y = S_2 S_1 x + b, \\quad S_1: in \\to inner, \\quad S_2: inner \\to out, \\quad
          inner = \\lceil \\frac{in \\cdot out}{(in + out)\\,\\rho} \\rceil

The inner width is rounded up to whole blocks and the density lowered to match. By design it costs what a dense layer
costs, so it is not "always sparse" in this library's sense: nothing is saved, all goes into another shape. Values begin
such that the product varies as a dense layer of BERT's deviation 0.02 does.

    >>> from torch import nn
    >>> from regrow import sparsify
    >>> layer = sparsify(nn.Linear(64, 64), density=0.25, block_size=16, layer="factorized")
    >>> layer.first.out_features, layer.first.values.numel() + layer.second.values.numel()
    (128, 4096)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regrow.nn.init import STD, TRUNCATED
from regrow.nn.options import ift
from regrow.nn.options.base import LayerOption, Place, dense_weight, register_layer
from regrow.nn.options.composite import Composite


class FactorizedLinear(Composite):
    """``y = second(first(x))``, both sparse."""

    inner = ("second",)

    def __init__(self, place: Place) -> None:
        super().__init__(place.in_features, place.out_features)
        first, second = ift.two_factors(place)
        self.first, self.second = first.blocks(), second.blocks()
        if not place.is_meta:
            # An element of the product sums so many products of two values; it is to have the deviation STD.
            terms = self.first.out_features * self.first.density * self.second.density
            for layer in (self.first, self.second):
                layer.values.data *= (STD**2 / terms) ** 0.25 / (TRUNCATED * STD)

    def compute(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def dense_weight(self) -> Tensor:
        return dense_weight(self.second) @ dense_weight(self.first)


@register_layer("factorized")
@dataclass(frozen=True)
class Factorized(LayerOption):
    """Two sparse matrices in a row that cost what the dense one did."""

    paper = ift.PAPER
    year = ift.YEAR
    link = ift.LINK
    always_sparse = False

    def build(self, place: Place) -> FactorizedLinear:
        return FactorizedLinear(place)

    def weights(self, place: Place) -> int:
        return sum(super(Factorized, self).weights(factor) for factor in ift.two_factors(place))
