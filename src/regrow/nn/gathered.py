"""The sparse linear layer whose blocks are single columns of 16 weights."""

from __future__ import annotations

from typing import Any

from regrow.nn.linear import BlockSparseLinear
from regrow.nn.shape import GATHERED_ROWS, BlockShape


class GatheredLinear(BlockSparseLinear):
    r"""``y = x W^T + bias`` where every 16 outputs read a list of single inputs of their own.

    .. math:: y_{16r + i} = b_{16r + i} + \sum_{k \in K_r} w_{k,i}\, x_{c_k}, \qquad 0 \le i < 16

    A :class:`BlockSparseLinear` of blocks of 16 outputs and one input: ``values [n_blocks, 16, 1]``, block row ``r``
    and block column ``c``, which is input ``c``. At equal density it has as many weights as one of 16 x 16 blocks, in
    16 times as many units, so which inputs are read together is not fixed by where they happen to lie. The register
    tiles of the compiled kernels are those of 16 x 16 blocks. Methods, checkpoints and optimizers take it as any other
    sparse layer; operations that fuse two products (:func:`regrow.nn.sparse_ffn`) call the layers one by one.

    Args:
        in_features: any number; out_features: a multiple of 16.
        options: ``density``, ``bias``, ``activation``, ``generator``, ``device`` and ``dtype`` of
            :class:`BlockSparseLinear`.

    Raises:
        RegrowError: 16 does not divide ``out_features``, or as :class:`BlockSparseLinear` does.

    Example:
        >>> import torch
        >>> layer = GatheredLinear(10, 32, density=0.25)
        >>> layer.values.shape, layer(torch.ones(3, 10)).shape
        (torch.Size([5, 16, 1]), torch.Size([3, 32]))
    """

    def __init__(self, in_features: int, out_features: int, *, density: float, **options: Any) -> None:
        super().__init__(in_features, out_features, block_size=GATHERED_ROWS, block_cols=1, density=density, **options)


def sparse_linear(
    in_features: int, out_features: int, *, block: int | tuple[int, int], **options: Any
) -> BlockSparseLinear:
    """The layer of an edge ``b`` or of a shape ``(outputs, inputs)`` of its blocks.

    >>> type(sparse_linear(32, 32, block=(16, 1), density=0.5)).__name__
    'GatheredLinear'
    """
    shape = BlockShape.of(block)
    shape.grid(in_features, out_features)
    if shape.rows != shape.cols:
        return GatheredLinear(in_features, out_features, **options)
    return BlockSparseLinear(in_features, out_features, block_size=shape.rows, **options)
