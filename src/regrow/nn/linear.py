"""The drop-in sparse linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.errors import RegrowError
from regrow.nn.init import initialise_
from regrow.nn.precision import in_compute_dtype
from regrow.nn.shape import BLOCK_SIZES, BlockShape
from regrow.topology import BlockTopology, blocks_at_density

__all__ = ["BLOCK_SIZES", "BlockSparseLinear", "check_block_size"]

_PRODUCTS = {None: kernels.spmm, "gelu": kernels.spmm_gelu}  # by activation


class BlockSparseLinear(nn.Module):
    r"""``y = x W^T + bias`` where only the non-zero blocks of ``W`` exist.

    The parameter *is* the blocks: ``values[k]`` is the ``b x b`` block
    ``W[r*b:(r+1)*b, c*b:(c+1)*b]`` at the position ``(r, c)`` that ``topology`` gives slot ``k``. Gradient and
    optimizer state are therefore sparse by construction. Forward costs ``2 * tokens * n_blocks * b^2`` FLOPs, and so
    does each of the two gradients.

    Args:
        in_features, out_features: multiples of ``block_size``.
        block_size: edge ``b`` of a block, one of 1, 4, 8, 16, 32, 64.
        block_cols: inputs of a block, if it is not square: 1, with ``block_size`` 16; see
            :class:`regrow.nn.GatheredLinear`.
        density: share of blocks that exist, in (0, 1]; ``n_blocks = round(density * R * C)``, at least one.
        bias: add a learned ``[out_features]`` bias, zero at first.
        activation: ``"gelu"`` for ``y = gelu(x W^T + bias)`` (exact, as :func:`torch.nn.functional.gelu`) in the same
            pass over memory; its second derivative does not exist. It may be set later, as the attribute.
        generator: source of the random pattern and values; the global one if absent.

    Shape:
        input ``[..., in_features]`` -> output ``[..., out_features]``; any number of leading dimensions, also
        zero tokens.

    Under ``torch.autocast`` the layer computes in autocast's dtype on a GPU, and keeps its values in their own; on a
    CPU, which has no kernels for 16 bits, in the dtype of its values.

    Raises:
        RegrowError: the block does not divide a dimension, ``density`` is outside (0, 1], or the activation is unknown.

    Example:
        >>> layer = BlockSparseLinear(64, 32, block_size=16, density=0.25)
        >>> layer.values.shape, layer(torch.ones(3, 5, 64)).shape
        (torch.Size([2, 16, 16]), torch.Size([3, 5, 32]))

    Reference: Dietrich et al. 2021, arXiv 2108.06277, section 2.
    """

    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        block_cols: int | None = None,
        density: float,
        bias: bool = True,
        activation: str | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = BlockShape(block_size, block_size if block_cols is None else block_cols)
        rows, cols = shape.grid(in_features, out_features)
        if activation not in _PRODUCTS:
            raise RegrowError(f'activation must be None or "gelu", got {activation!r}')
        self.activation = activation
        self.in_features, self.out_features, self.block_size = in_features, out_features, block_size
        self.block_shape = shape
        n_blocks = blocks_at_density(rows, cols, density)
        self.values = nn.Parameter(torch.empty(n_blocks, *shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if self.values.is_meta:  # a skeleton whose indices and values a checkpoint will bring
            self.topology = BlockTopology(rows, cols, n_blocks, device="meta")
        else:
            self.topology = BlockTopology.random(rows, cols, n_blocks, generator).to(self.values.device)
            self.reset_parameters(generator)

    @property
    def density(self) -> float:
        """Share of block positions that hold a block."""
        return self.topology.density

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the blocks anew as the paper does and zero the bias; the pattern stays."""
        initialise_(self.values, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise RegrowError(
                f"BlockSparseLinear expects inputs of {self.in_features} features, got shape {list(x.shape)}"
            )
        arguments = in_compute_dtype(x.reshape(-1, self.in_features), self.values, self.bias)
        y = _PRODUCTS[self.activation](*arguments, *self.topology.indices())
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The weight as an ordinary ``[out_features, in_features]`` tensor, zero where no block is.

        For export and tests only: nothing in training calls it.
        """
        rows, cols = self.topology.coordinates()
        grid = self.values.new_zeros(self.topology.n_block_rows, self.topology.n_block_cols, *self.block_shape)
        grid[rows, cols] = self.values
        return grid.permute(0, 2, 1, 3).reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def load_dense_(self, weight: Tensor) -> None:
        """Copy the existing blocks out of a dense ``[out_features, in_features]`` weight; the rest is ignored."""
        if weight.shape != (self.out_features, self.in_features):
            raise RegrowError(f"weight must be [{self.out_features}, {self.in_features}], got {list(weight.shape)}")
        (height, width), (rows, cols) = self.block_shape, self.topology.coordinates()
        grid = weight.view(self.topology.n_block_rows, height, self.topology.n_block_cols, width)
        self.values.copy_(grid[rows, :, cols])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Take over the saved number of blocks, which a method with a moving density may have changed."""
        values, slot = state_dict.get(prefix + "values"), state_dict.get(prefix + "topology.slot")
        if values is not None and slot is not None and not self.values.is_meta:
            fits = values.shape[1:] == self.values.shape[1:] and values.shape[:1] == slot.shape
            if fits and slot.shape != self.topology.slot.shape:
                try:
                    self.topology.resize(len(slot))
                except RegrowError as error:
                    raise RegrowError(f"{prefix}topology: {error}") from None
                self.values.data = self.values.new_empty(values.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_shape}, "
            f"density={self.density:.4g}, bias={self.bias is not None}"
            + ("" if self.activation is None else f", activation={self.activation}")
        )


def check_block_size(in_features: int, out_features: int, block_size: int) -> None:
    """Raise unless ``block_size`` is supported and divides both dimensions."""
    BlockShape(block_size, block_size).grid(in_features, out_features)
