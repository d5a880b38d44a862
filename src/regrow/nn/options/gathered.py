"""Gathered blocks: every 16 outputs have a list of single inputs of their own. Always sparse.

G. Huang, H. Li, M. Qin, F. Sun, Y. Ding, Y. Xie, *Shfl-BW: Accelerating Deep Neural Network Inference with Tensor-Core
Aware Weight Pruning*, 2022, https://arxiv.org/abs/2203.05016; Y. Tan, K. Han, K. Zhao, X. Yu, Z. Du, Y. Chen, Y. Wang,
J. Yao, *Accelerating Sparse Convolution with Column Vector-Wise Sparsity*, NeurIPS 2022.

The papers prune for GPUs: blocks whose rows and columns are permuted, and vectors of several outputs and one input as
the unit, with similar rows brought together. Here rows stay where they are, and the vectors are what moves in
always-sparse training, by any method: blocks of 16 x 1, :class:`regrow.nn.GatheredLinear`. At equal density a layer has
the weights and the FLOPs of one of 16 x 16 blocks; the unit is 16 times as fine, and which inputs go together is not
fixed by their order. There are 16 times as many indices.

    >>> from torch import nn
    >>> from regrow import sparsify
    >>> sparsify(nn.Linear(32, 32), density=0.5, block_size=16, layer="gathered").values.shape
    torch.Size([32, 16, 1])
"""

from __future__ import annotations

from dataclasses import dataclass

from regrow.errors import RegrowError
from regrow.nn.gathered import GatheredLinear
from regrow.nn.options.base import LayerOption, Place, register_layer
from regrow.nn.shape import GATHERED_ROWS, BlockShape
from regrow.topology import blocks_at_density


@register_layer("gathered")
@dataclass(frozen=True)
class Gathered(LayerOption):
    """Blocks of 16 outputs and a single input."""

    paper = "Huang et al., Shfl-BW: Accelerating Deep Neural Network Inference with Tensor-Core Aware Weight Pruning"
    year = 2022
    link = "https://arxiv.org/abs/2203.05016"
    block_size = GATHERED_ROWS

    def build(self, place: Place) -> GatheredLinear:
        if place.block_size != GATHERED_ROWS:
            raise RegrowError(
                f"layer 'gathered' has blocks of {GATHERED_ROWS}x1; block_size must be {GATHERED_ROWS}, "
                f"got {place.block_size}"
            )
        return GatheredLinear(
            place.in_features,
            place.out_features,
            density=place.density,
            bias=place.bias,
            generator=place.generator,
            device=place.device,
            dtype=place.dtype,
        )

    def weights(self, place: Place) -> int:
        block = BlockShape(GATHERED_ROWS, 1)
        return blocks_at_density(*block.grid(place.in_features, place.out_features), place.density) * block.numbers
