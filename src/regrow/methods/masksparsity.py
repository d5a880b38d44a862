"""MaskSparsity: first choose what is to go, then let only that decay, then prune it. Dense cost.

N. Jiang, X. Zhao, C. Zhao, Y. An, M. Tang, J. Wang, *Pruning-aware Sparse Regularization for Network Pruning*, 2022,
https://arxiv.org/abs/2201.06776.

Not always sparse: the weights, their gradients and the products are dense until the end. The paper chooses channels of
convolutions and lets the scales of their batch norms decay; here it is blocks. At ``begin`` the blocks of smallest L1
norm are doomed, in every layer the share 1 - ``density``. From then on their gradient has one term more,

    dL/dw + doomed_decay * sign(w)

and from ``end`` on they count as 0 and get no gradient. All others train as ever, without that term. Evaluation and
the saved model are without the doomed blocks; before any is, without those that would be.

Four single weights as blocks, half of them doomed at the beginning:

    >>> import torch
    >>> from regrow.methods import create
    >>> from regrow.nn import TransformedLinear
    >>> from regrow.nn.transformed import Moment
    >>> method = create("masksparsity", begin=0.0)
    >>> layer = TransformedLinear(torch.nn.Linear(4, 1, bias=False), method, density=0.5)
    >>> _ = layer.weight.data.copy_(torch.tensor([[5.0, -1.0, 2.0, -7.0]]))
    >>> method.advance_(layer.view), layer.doomed.tolist()
    (True, [[False, True, True, False]])
    >>> layer.effective().sum().backward()
    >>> (layer.weight.grad - 1).mul(1e4).round().tolist()
    [[0.0, -5.0, 5.0, 0.0]]
    >>> layer.moment = Moment(step=8, total_steps=10)
    >>> layer.effective().tolist()
    [[5.0, -0.0, 0.0, -7.0]]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import register
from regrow.methods.nm import strongest_mask
from regrow.methods.rules import check_window
from regrow.methods.transform import WeightTransform, straight_through
from regrow.nn.linear import check_block_size
from regrow.nn.transformed import LayerView
from regrow.topology import blocks_at_density


@register("masksparsity")
@dataclass(frozen=True)
class MaskSparsity(WeightTransform):
    """Doom the weakest blocks, let only those decay for a while, then prune them."""

    paper = "Jiang et al., Pruning-aware Sparse Regularization for Network Pruning"
    year = 2022
    link = "https://arxiv.org/abs/2201.06776"

    doomed_decay: float = field(default=5e-4, metadata={"help": "pull of doomed blocks to 0, times the sign"})
    begin: float = field(default=0.25, metadata={"help": "share of the training after which blocks are doomed"})
    end: float = field(default=0.75, metadata={"help": "share after which they are pruned"})

    def __post_init__(self) -> None:
        if not self.doomed_decay >= 0:
            raise RegrowError(f"doomed_decay must be >= 0, got {self.doomed_decay}")
        check_window(self.begin, self.end)

    def check_shape(self, name: str, out_features: int, in_features: int, block_size: int) -> None:
        try:
            check_block_size(in_features, out_features, block_size)
        except RegrowError as error:
            raise RegrowError(f"{name}: {error}") from None

    def initial_state(self, layer: LayerView, generator: torch.Generator) -> dict[str, Tensor]:
        rows, cols = (size // layer.block_size for size in layer.weight.shape)
        return {"doomed": torch.zeros(rows, cols, dtype=torch.bool, device=layer.weight.device)}

    def advance_(self, layer: LayerView) -> bool:
        doomed = layer.state["doomed"]
        if layer.moment.progress < self.begin or bool(doomed.any()):
            return False
        doomed.copy_(_weakest(layer))
        return True

    def wrong_state(self, layer: LayerView) -> str | None:
        found, doomed = int(layer.state["doomed"].sum()), layer.state["doomed"]
        rows, cols = doomed.shape
        kept = blocks_at_density(rows, cols, layer.density)
        expected = 0 if layer.moment.progress < self.begin else doomed.numel() - kept
        return None if found == expected else f"doomed must hold {expected} blocks, got {found}"

    def effective(self, layer: LayerView) -> Tensor:
        weight, doomed = layer.weight, _spread(layer.state["doomed"], layer)
        if layer.moment.progress >= self.end:
            return weight * ~doomed
        value = weight.detach()
        return straight_through(
            weight, value, value.sign() * doomed * (self.doomed_decay / layer.moment.backward_passes)
        )

    def final(self, layer: LayerView) -> Tensor:
        doomed = layer.state["doomed"]
        return layer.weight * ~_spread(doomed if bool(doomed.any()) else _weakest(layer), layer)


def _weakest(layer: LayerView) -> Tensor:
    rows, cols = layer.state["doomed"].shape
    b = layer.block_size
    norms = layer.weight.detach().abs().view(rows, b, cols, b).sum((1, 3))
    return ~strongest_mask(norms, blocks_at_density(rows, cols, layer.density))


def _spread(blocks: Tensor, layer: LayerView) -> Tensor:
    """A mask of blocks as one of weights."""
    return blocks.repeat_interleave(layer.block_size, 0).repeat_interleave(layer.block_size, 1)
