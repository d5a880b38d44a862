"""Block-sparse matrix products on raw tensors: three operations, closed under differentiation.

A weight ``W`` of shape ``[out, in] = [R * b, C * b]`` is kept as its non-zero blocks,
``values [n_blocks, b, b]`` (output by input inside a block), and their coordinates, all int32, contiguous and 1-D:

======================  ================================================================================
``row_ptr [R + 1]``     block row ``r`` owns positions ``row_ptr[r]`` to ``row_ptr[r + 1]`` of the next two
                        (PyTorch calls this ``crow_indices``)
``col_idx [n_blocks]``  block column at a position, ascending within a row
``slot [n_blocks]``     which row of ``values`` is at that position
======================  ================================================================================

:func:`spmm` is ``y = x W^T + bias``, :func:`spmm_t` is ``dx = g W`` and :func:`sddmm` is ``g^T x`` at the
blocks only; :func:`spmm_gelu` is ``gelu(x W^T + bias)`` in one pass. These four also take *gathered* blocks, ``values
[n_blocks, b, 1]``, of ``b`` outputs and a single input: a block column is then a feature, and ``W`` is
``[R * b, C]``. Compiled they are for ``b = 16``. Nothing of the size of ``W`` is ever allocated.

Beside them is what a transformer layer has between its products: :func:`attention` over packed sequences;
:func:`dropout_add_norm`, which is dropout, residual sum and LayerNorm in one pass; dropout by a seed alone, in
:mod:`regrow.kernels.dropout`; and both halves of a layer as one operation, whose activations in between never leave the
caches: :func:`ffn` and :func:`sparse_attention`. :func:`spark_ffn` is a feed-forward half of dense weights of which
each token uses a few hidden units.
"""

from regrow.kernels.attention import attention
from regrow.kernels.ffn import ffn
from regrow.kernels.norm import dropout_add_norm
from regrow.kernels.ops import sddmm, spmm, spmm_gelu, spmm_t
from regrow.kernels.spark import spark_ffn
from regrow.kernels.sparse_attention import sparse_attention

__all__ = [
    "attention",
    "dropout_add_norm",
    "ffn",
    "sddmm",
    "spark_ffn",
    "sparse_attention",
    "spmm",
    "spmm_gelu",
    "spmm_t",
]
