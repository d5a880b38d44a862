"""Sparse layers, and the conversion of models to and from them."""

from regrow.nn.ffn import sparse_ffn
from regrow.nn.linear import BLOCK_SIZES, BlockSparseLinear
from regrow.nn.sparsify import densify, density_of, named_sparse_layers, sparsify

__all__ = ["BLOCK_SIZES", "BlockSparseLinear", "densify", "density_of", "named_sparse_layers", "sparse_ffn", "sparsify"]
