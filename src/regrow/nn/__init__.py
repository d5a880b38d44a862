"""Sparse layers, attention, and the conversion of models to and from sparse ones."""

from regrow.nn.attention import attention
from regrow.nn.linear import BLOCK_SIZES, BlockSparseLinear
from regrow.nn.sparsify import densify, density_of, named_sparse_layers, sparsify

__all__ = ["BLOCK_SIZES", "BlockSparseLinear", "attention", "densify", "density_of", "named_sparse_layers", "sparsify"]
