"""Spark: feed-forward halves of which each token uses a few hidden units. The weights are dense, and all of them train.

C. You, K. Wu, Z. Jia, L. Chen, S. Bhojanapalli, J. Guo, U. Evci, J. Wassenberg, P. Netrapalli, J. J. Willcock,
S. Subramanian, F. Chern, A. Andreev, S. Pathak, F. Yu, P. Jain, D. E. Culler, H. M. Levy, S. Kumar, *Spark Transformer:
Reactivating Sparsity in FFN and Attention*, 2025, https://arxiv.org/abs/2506.06644.

.. math:: y = V^T \\big( \\text{gelu}(\\max(z - \\theta, 0)) \\cdot K_2 x_{r:} \\big) + b_2, \\quad
          z = K_1 x_{:r} + b_1, \\quad
          \\theta = \\text{mean}(z) + \\text{std}(z) \\, \\Phi^{-1}(1 - keep)

What is sparse here is not the weights but what a token does with them: ``regrow.nn.SparkFFN`` has the details.
Each half keeps as many parameters as its two linear layers had, whatever the density; ``--density`` and the method are
for the layers around it, the four of attention, which become plain blocks (at ``--density 1`` they are all there). The
predictor of the paper's attention is not part of this option.

A half of 64 features and 256 units in the place of two layers and their activation:

    >>> from torch import nn
    >>> from regrow import sparsify
    >>> half = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    >>> [type(part).__name__ for part in sparsify(half, density=0.5, block_size=16, layer="spark")]
    ['SparkFFN', 'Identity', 'Identity']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from regrow.errors import RegrowError
from regrow.nn.options.base import LayerOption, Pair, Place, register_layer
from regrow.nn.spark import SparkFFN, quantile_of, statistical_top_k


@register_layer("spark")
@dataclass(frozen=True)
class Spark(LayerOption):
    """Feed-forward halves that use a few hidden units for each token; attention in blocks."""

    paper = "You et al., Spark Transformer: Reactivating Sparsity in FFN and Attention"
    year = 2025
    link = "https://arxiv.org/abs/2506.06644"
    always_sparse = False
    pairs = True

    keep: float = field(default=0.08, metadata={"help": "share of the hidden units a token activates, on average"})
    decide: float = field(
        default=0.5, metadata={"help": "share of the input's features that decide which hidden units are active"}
    )

    def __post_init__(self) -> None:
        quantile_of(self.keep)
        if not 0 < self.decide < 1:
            raise RegrowError(f"decide must lie between 0 and 1, got {self.decide}")

    def build_pair(self, first: Place, activation: nn.Module, second: Place) -> Pair:
        if first.in_features != second.out_features:
            raise RegrowError(
                f"layer 'spark' needs a feed-forward half as wide at its end as at its beginning, "
                f"not {first.in_features} -> {first.out_features} -> {second.out_features}"
            )
        half = SparkFFN(
            first.in_features,
            first.out_features,
            self.keep,
            self._r(first),
            first.bias,
            generator=first.extra,
            device=first.device,
            dtype=first.dtype,
        )
        return Pair(half, nn.Identity(), nn.Identity())

    def _r(self, first: Place) -> int:
        return min(max(round(self.decide * first.in_features), 1), first.in_features - 1)

    def pair_weights(self, first: Place, second: Place) -> int:
        active, r = round(self.keep * first.out_features), self._r(first)
        return r * first.out_features + active * (first.in_features - r + second.out_features)

    def reference(self, modules: Sequence[Any], x: Tensor) -> Tensor:
        half: SparkFFN = modules[0]
        gates = statistical_top_k(F.linear(x[:, : half.r], half.gate, half.gate_bias), half.keep)
        return F.linear(F.gelu(gates) * F.linear(x[:, half.r :], half.up), half.down.T, half.down_bias)
