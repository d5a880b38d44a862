"""SLTrain: a sparse matrix beside one of low rank. Always sparse.

A. Han, J. Li, W. Huang, M. Hong, A. Takeda, P. Jawanpuria, B. Mishra, *SLTrain: a sparse plus low-rank approach for
parameter and memory efficient pretraining*, 2024, https://arxiv.org/abs/2406.02214.

.. math:: W = \\frac{\\alpha}{r} B A + S

with ``A [r, in]`` drawn as Kaiming et al. do, ``B [out, r]`` zero at first and ``S`` the blocks. So training begins as
that of the blocks alone: pattern and values are those of ``--layer blocks`` with the same seed. A token costs
``r (in + out)`` multiplications more; ``A`` and ``B`` learn at the rate of dense weights. In the paper ``S`` has a
fixed random support of 3 % (here ``--method static --density 0.03``), r = 128 to 512 and alpha = 32 to 8, falling as
models grow. Here blocks of ``S`` may move, by any method.

A layer whose four blocks of 1x1 are all there, with rank 1: ``W = S + 2 * [3, 0]^T [1, 1]``:

    >>> import torch
    >>> from torch import nn
    >>> from regrow import sparsify
    >>> from regrow.nn.options import create
    >>> layer = sparsify(nn.Linear(2, 2), density=1.0, block_size=1, layer=create("lowrank", rank=1, alpha=2.0))
    >>> bool(torch.equal(layer.to_dense(), layer.sparse.to_dense()))
    True
    >>> for part, numbers in ((layer.sparse.values, 0.0), (layer.down.weight, 1.0), (layer.up.weight, 3.0)):
    ...     _ = part.data.fill_(numbers)
    >>> layer.up.weight.data[1] = 0
    >>> layer.to_dense().tolist()
    [[6.0, 6.0], [0.0, 0.0]]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regrow.errors import RegrowError
from regrow.nn.options.base import LayerOption, Place, dense_weight, register_layer
from regrow.nn.options.composite import Composite


class LowRankLinear(Composite):
    r"""``y = S x + bias + scale * B A x``.

    Args:
        place: the layer.
        rank: ``r``.
        scale: factor of the product of low rank.

    Attributes:
        sparse: ``S`` and the bias.
        down, up: ``A [r, in]`` and ``B [out, r]``.
    """

    inner = ("up",)

    def __init__(self, place: Place, rank: int, scale: float) -> None:
        super().__init__(place.in_features, place.out_features)
        self.rank, self.scale = rank, scale
        self.sparse = place.blocks()
        self.down, self.up = place.of(self.in_features, rank).factor(), place.of(rank, self.out_features).factor()
        if not place.is_meta:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=place.extra)

    def compute(self, x: Tensor) -> Tensor:
        # The last product adds itself to what the blocks gave: y is not read and written once more for a sum.
        return torch.addmm(self.sparse(x), self.down(x), self.up.weight.t(), alpha=self.scale)

    def dense_weight(self) -> Tensor:
        return dense_weight(self.sparse) + self.scale * (self.up.weight @ self.down.weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


@register_layer("lowrank")
@dataclass(frozen=True)
class LowRank(LayerOption):
    """Blocks, and beside them a product of two narrow dense matrices."""

    paper = "Han et al., SLTrain: a sparse plus low-rank approach for pretraining"
    year = 2024
    link = "https://arxiv.org/abs/2406.02214"

    rank: int = field(default=16, metadata={"help": "width r of the narrow matrices"})
    alpha: float = field(default=16.0, metadata={"help": "their product counts alpha / rank times"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RegrowError(f"rank must be at least 1, got {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise RegrowError(f"alpha must be positive, got {self.alpha}")

    def build(self, place: Place) -> LowRankLinear:
        if self.rank > min(place.in_features, place.out_features):
            raise RegrowError(
                f"rank {self.rank} is more than a layer {place.in_features} -> {place.out_features} can have; lower it"
            )
        return LowRankLinear(place, self.rank, self.alpha / self.rank)

    def weights(self, place: Place) -> int:
        return super().weights(place) + self.rank * (place.in_features + place.out_features)
