"""Sparse-IFT, doped: a dense product of low rank with what the blocks save, and the blocks.

V. Thangarasa, S. Saxena, A. Gupta, S. Lie, *Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency*, 2023, https://arxiv.org/abs/2303.11525.

.. math:: W = V U + S, \\quad r = \\lfloor \\frac{(1 - \\rho)\\,in \\cdot out}{in + out} \\rfloor

By design it costs what a dense layer costs, so it is not "always sparse" in this library's sense. Unlike ``lowrank``
both ``U [r, in]`` and ``V [out, r]`` begin with random values, such that their product varies as a dense layer of
BERT's deviation 0.02 does.

    >>> from torch import nn
    >>> from regrow import sparsify
    >>> layer = sparsify(nn.Linear(64, 64), density=0.25, block_size=16, layer="doped")
    >>> layer.rank, layer.sparse.values.numel() + layer.down.weight.numel() + layer.up.weight.numel()
    (24, 4096)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from regrow.errors import RegrowError
from regrow.nn.init import STD
from regrow.nn.options import ift
from regrow.nn.options.base import LayerOption, Place, register_layer
from regrow.nn.options.lowrank import LowRankLinear


@register_layer("doped")
@dataclass(frozen=True)
class Doped(LayerOption):
    """Blocks, and a dense product whose rank makes up for the absent ones."""

    paper = ift.PAPER
    year = ift.YEAR
    link = ift.LINK
    always_sparse = False

    def build(self, place: Place) -> LowRankLinear:
        rank = self.rank(place)
        layer = LowRankLinear(place, rank, 1.0)
        if not place.is_meta:
            deviation = (STD**2 / rank) ** 0.25  # an element of the product sums so many products of two values
            for factor in (layer.down, layer.up):
                nn.init.normal_(factor.weight, std=deviation, generator=place.extra)
        return layer

    def rank(self, place: Place) -> int:
        """``r``.

        Raises:
            RegrowError: the density leaves none.
        """
        absent = place.in_features * place.out_features - super().weights(place)
        rank = absent // (place.in_features + place.out_features)
        if rank < 1:
            raise RegrowError(
                f"density {place.density:.4g} leaves no rank beside it; lower it, or choose layer 'blocks'"
            )
        return rank

    def weights(self, place: Place) -> int:
        return super().weights(place) + self.rank(place) * (place.in_features + place.out_features)
