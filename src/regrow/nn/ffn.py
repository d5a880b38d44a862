"""The feed-forward half of a transformer layer from two sparse layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from regrow import kernels
from regrow.errors import RegrowError
from regrow.kernels import gpu
from regrow.nn.linear import BlockSparseLinear
from regrow.nn.precision import compute_dtype, in_compute_dtype


def sparse_ffn(first: BlockSparseLinear, second: BlockSparseLinear, x: Tensor) -> Tensor:
    r"""``y = gelu(x W1^T + bias1) W2^T + bias2`` in one pass over tiles of tokens.

    The same as ``second(gelu(first(x)))``, with the exact (erf) GELU, applied once whether or not ``first`` has it as
    its activation. But nothing of the hidden width is written to memory or kept: the backward pass computes the hidden
    activations again, for a sixth more multiplications. Differentiable once.

    Two products stand in for it, one after the other, where the fused pass cannot: block sizes differ, ``second`` has
    an activation, a hook is registered on either, which is to see what goes in and out, or ``x`` is on a GPU, whose
    kernels have no such pass.

    Args:
        first: ``in -> hidden``.
        second: ``hidden -> out``.
        x: ``[..., in]``, any number of leading dimensions, also zero tokens.

    Returns:
        ``y [..., out]``. Under ``torch.autocast`` it is computed in the dtype of the layers' values.

    Raises:
        RegrowError: the widths do not fit together.

    >>> import torch
    >>> first = BlockSparseLinear(64, 128, block_size=16, density=0.25)
    >>> second = BlockSparseLinear(128, 32, block_size=16, density=0.25)
    >>> x = torch.ones(3, 5, 64)
    >>> torch.allclose(sparse_ffn(first, second, x), second(gelu(first(x))), atol=1e-5)
    True

    Reference: Vaswani et al. 2017, arXiv 1706.03762, section 3.3; Chen et al. 2016, arXiv 1604.06174, for computing
    activations again.
    """
    for name, width, features in (
        ("x", x.shape[-1], first.in_features),
        ("second", second.in_features, first.out_features),
    ):
        if width != features:
            raise RegrowError(
                f"{name} has {width} input features; first has {first.in_features} -> {first.out_features}"
            )
    alike = first.block_shape == second.block_shape and first.block_shape.is_square
    if not alike or second.activation is not None or hooked(first) or hooked(second) or gpu.handles(x.device):
        return second(_with_gelu(first, x))
    tokens = x.to(compute_dtype(x, first.values)).reshape(-1, first.in_features)
    index1, index2 = first.topology.indices(), second.topology.indices()
    y = kernels.ffn(tokens, first.values, first.bias, *index1, second.values, second.bias, *index2)
    return y.view(*x.shape[:-1], second.out_features)


def _with_gelu(layer: BlockSparseLinear, x: Tensor) -> Tensor:
    """``gelu(layer(x))``, in one product where nobody is to see what the layer alone gives."""
    if layer.activation == "gelu":
        return layer(x)
    if hooked(layer):
        return gelu(layer(x))
    tokens = in_compute_dtype(x.reshape(-1, layer.in_features), layer.values, layer.bias)
    return kernels.spmm_gelu(*tokens, *layer.topology.indices()).view(*x.shape[:-1], layer.out_features)


def hooked(layer: BlockSparseLinear) -> bool:
    """Whether someone is to see what goes in or out of it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
