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
blocks only; :func:`spmm_gelu` is ``gelu(x W^T + bias)`` in one pass, and :func:`ffn` is two
products with a GELU between them. Nothing of the size of ``W`` is ever allocated.
"""

from regrow.kernels.ffn import ffn
from regrow.kernels.ops import sddmm, spmm, spmm_gelu, spmm_t

__all__ = ["ffn", "sddmm", "spmm", "spmm_gelu", "spmm_t"]
