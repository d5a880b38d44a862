"""Sparse-IFT, wide: feed-forward halves of more hidden units, with as many products as the dense ones.

V. Thangarasa, S. Saxena, A. Gupta, S. Lie, *Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency*, 2023, https://arxiv.org/abs/2303.11525.

.. math:: y = S_2\\,\\sigma(S_1 x + b_1) + b_2, \\quad \\text{hidden} = \\lceil h / \\rho \\rceil

**This differs from the paper's form.** There every layer of a network is sqrt(k) times as wide on both sides, with k
= 1 / density, so that its weight has k times the elements. Here widths outside stay what they are, so that the layers
drop into a finished architecture, and the hidden width alone is k times as large: the same number of products, too.
The layers outside feed-forward halves get plain blocks and cost less than dense ones.

By design it costs what a dense feed-forward half costs, so it is not "always sparse" in this library's sense. The
layers are plain :class:`~regrow.BlockSparseLinear`, and fused operations work on them.

    >>> from torch import nn
    >>> from regrow import sparsify
    >>> half = sparsify(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), density=0.25, block_size=16,
    ...     layer="wide")
    >>> half[0].out_features, half[0].values.numel() + half[2].values.numel()
    (512, 16384)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from regrow.nn.options import ift
from regrow.nn.options.base import LayerOption, Pair, Place, dense_weight, register_layer


@register_layer("wide")
@dataclass(frozen=True)
class Wide(LayerOption):
    """Feed-forward halves with 1 / density times the hidden units."""

    paper = ift.PAPER
    year = ift.YEAR
    link = ift.LINK
    always_sparse = False
    pairs = True

    def build_pair(self, first: Place, activation: nn.Module, second: Place) -> Pair:
        up, down = self._places(first, second)
        return Pair(up.blocks(), activation, down.blocks())

    def pair_weights(self, first: Place, second: Place) -> int:
        return sum(self.weights(place) for place in self._places(first, second))

    def reference(self, modules: Sequence[Any], x: Tensor) -> Tensor:
        first, activation, second = modules
        hidden = activation(F.linear(x, dense_weight(first), first.bias))
        return F.linear(hidden, dense_weight(second), second.bias)

    def _places(self, first: Place, second: Place) -> tuple[Place, Place]:
        width, density = ift.widened(first.out_features, first)
        return (
            first.of(first.in_features, width, density=density),
            second.of(width, second.out_features, density=density),
        )
