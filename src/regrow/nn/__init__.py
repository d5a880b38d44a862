"""Sparse layers, and the conversion of models to and from them."""

from regrow.nn.linear import BLOCK_SIZES, BlockSparseLinear
from regrow.nn.sparsify import densify, named_sparse_layers, sparsify

__all__ = ["BLOCK_SIZES", "BlockSparseLinear", "densify", "named_sparse_layers", "sparsify"]
