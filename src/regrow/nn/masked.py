"""A dense linear layer of which, for a time, only some blocks train: a control, not a way to save anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regrow.errors import RegrowError
from regrow.nn.linear import check_block_size
from regrow.nn.sparsify import Globs, Model, chosen_layers, replace_module
from regrow.topology import blocks_at_density
from regrow.topology.distribution import check_density


class MaskedLinear(nn.Linear):
    r"""``y = x W^T + bias`` with a dense ``W``; outside ``mask`` its blocks keep the value they have.

    Gradients outside the mask are zero, so clipping does not see them, and :meth:`hold_` undoes what momentum and
    weight decay did to them. Time and memory are those of ``nn.Linear``: nothing is saved.

    Attributes:
        mask: bool ``[out_features / b, in_features / b]``, saved with the weights; true where a block trains.
        n_active: how many blocks a sparse phase trains.

    Shape:
        as ``nn.Linear``.

    Raises:
        RegrowError: the block does not divide a dimension, or ``density`` is outside (0, 1].

    Example:
        >>> layer = MaskedLinear(32, 32, block_size=16, density=0.25)
        >>> layer.set_mask_(torch.tensor([[True, False], [False, False]]), unused="zero")
        >>> layer(torch.ones(1, 32)).sum().backward()
        >>> int((layer.weight != 0).sum()), int((layer.weight.grad != 0).sum())
        (256, 256)
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        density: float,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_block_size(in_features, out_features, block_size)
        check_density(density)
        super().__init__(in_features, out_features, bias, device, dtype)
        rows, cols = out_features // block_size, in_features // block_size
        self.block_size, self.n_active = block_size, blocks_at_density(rows, cols, density)
        self.register_buffer("mask", torch.ones(rows, cols, dtype=torch.bool, device=device))
        self._held: Tensor | None = None
        self.weight.register_post_accumulate_grad_hook(self._mask_gradient)

    @property
    def n_positions(self) -> int:
        """Number of blocks of the weight."""
        return self.mask.numel()

    @torch.no_grad()
    def set_mask_(self, mask: Tensor, *, unused: str) -> None:
        """Train only the blocks in ``mask`` from now on; the others become 0 (``unused="zero"``) or stay."""
        self.mask.copy_(mask)
        if unused == "zero":
            self._blocks(self.weight).mul_(self._spread())
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Take the present values outside the mask for those to hold, as after loading."""
        self._held = None if bool(self.mask.all()) else self.weight.detach().clone()

    @torch.no_grad()
    def hold_(self) -> None:
        """After an optimizer step: put the blocks outside the mask back, bitwise."""
        if self._held is not None:
            weight, held = self._blocks(self.weight), self._blocks(self._held)
            weight.copy_(torch.where(self._spread(), weight, held))

    @torch.no_grad()
    def block_sums(self) -> Tensor:
        """L1 norm of every block, as ``mask`` is laid out."""
        return self._blocks(self.weight).abs().sum((1, 3))

    def _mask_gradient(self, weight: Tensor) -> None:
        if self._held is not None and weight.grad is not None:
            self._blocks(weight.grad).mul_(self._spread())

    def _blocks(self, weight: Tensor) -> Tensor:
        """A view ``[rows, b, cols, b]``."""
        b, (rows, cols) = self.block_size, self.mask.shape
        return weight.detach().view(rows, b, cols, b)

    def _spread(self) -> Tensor:
        return self.mask[:, None, :, None]


def mask_linears(model: Model, *, density: float, block_size: int, include: Globs = "*") -> Model:
    """Replace the chosen ``nn.Linear`` modules by :class:`MaskedLinear`, in place; all blocks train at first.

    Args:
        density: share of the blocks that a sparse phase trains.
        block_size: edge of a block.
        include: one glob or several over qualified module names.

    Raises:
        RegrowError: nothing matches, or a block does not divide a layer.

    Example:
        >>> mask_linears(nn.Sequential(nn.Linear(32, 64)), density=0.25, block_size=16)[0].n_active
        2
    """
    chosen = chosen_layers(model, include)
    if not chosen:
        raise RegrowError(f"no nn.Linear matches include={include!r}; nothing to mask")
    for name, dense in chosen.items():
        layer = MaskedLinear(
            dense.in_features,
            dense.out_features,
            block_size=block_size,
            density=density,
            bias=dense.bias is not None,
            device="cpu" if dense.weight.is_meta else dense.weight.device,
            dtype=dense.weight.dtype,
        )
        if not dense.weight.is_meta:
            layer.load_state_dict(dense.state_dict(), strict=False)
        model = replace_module(model, name, layer.train(dense.training))
    return model
