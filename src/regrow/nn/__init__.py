"""Sparse layers, the conversion of models to and from them, and the operations between them."""

from regrow.nn.attention import attention
from regrow.nn.ffn import sparse_ffn
from regrow.nn.gathered import GatheredLinear
from regrow.nn.linear import BLOCK_SIZES, BlockSparseLinear
from regrow.nn.loss import linear_cross_entropy
from regrow.nn.masked import MaskedLinear, mask_linears
from regrow.nn.merged import merged_linear
from regrow.nn.norm import DropoutAddNorm, dropout, dropout_add_norm
from regrow.nn.spark import SparkFFN, statistical_top_k
from regrow.nn.sparse_attention import sparse_attention
from regrow.nn.sparsify import densify, density_of, named_sparse_layers, sparsify
from regrow.nn.transformed import TransformedLinear, harden, named_transformed_layers, transform_linears

__all__ = [
    "BLOCK_SIZES",
    "BlockSparseLinear",
    "DropoutAddNorm",
    "GatheredLinear",
    "MaskedLinear",
    "SparkFFN",
    "TransformedLinear",
    "attention",
    "densify",
    "density_of",
    "dropout",
    "dropout_add_norm",
    "harden",
    "linear_cross_entropy",
    "mask_linears",
    "merged_linear",
    "named_sparse_layers",
    "named_transformed_layers",
    "sparse_attention",
    "sparse_ffn",
    "sparsify",
    "statistical_top_k",
    "transform_linears",
]
