"""Sparse layers, the conversion of models to and from them, and the layers between them."""

from regrow.nn.linear import BLOCK_SIZES, BlockSparseLinear
from regrow.nn.norm import DropoutAddNorm, dropout, dropout_add_norm
from regrow.nn.sparsify import densify, density_of, named_sparse_layers, sparsify

__all__ = [
    "BLOCK_SIZES",
    "BlockSparseLinear",
    "DropoutAddNorm",
    "densify",
    "density_of",
    "dropout",
    "dropout_add_norm",
    "named_sparse_layers",
    "sparsify",
]
