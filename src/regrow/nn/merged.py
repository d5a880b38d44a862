"""Several sparse layers over the same input as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regrow import kernels
from regrow.errors import RegrowError
from regrow.nn.ffn import hooked
from regrow.nn.linear import BlockSparseLinear
from regrow.nn.precision import in_compute_dtype


def merged_linear(layers: Sequence[BlockSparseLinear], x: Tensor) -> Tensor:
    r"""``cat([layer(x) for layer in layers], -1)`` in one product: query, key and value of an attention, say.

    The input is read and laid out once instead of once a layer, and the backward pass adds up the gradients of ``x``
    while it computes them. The layers keep their parameters; only their few blocks and indices are put side by side.

    Args:
        layers: of equal ``in_features`` and block size, without an activation. If a layer carries a hook, all
            are called one by one.
        x: ``[..., in_features]``.

    Returns:
        ``[..., sum of out_features]``.

    Raises:
        RegrowError: the layers differ in ``in_features`` or block size, or have an activation.

    Example:
        >>> layers = [BlockSparseLinear(32, out, block_size=16, density=0.5) for out in (16, 48)]
        >>> x = torch.randn(5, 32)
        >>> torch.equal(merged_linear(layers, x), torch.cat([layer(x) for layer in layers], -1))
        True
    """
    first = layers[0]
    for layer in layers:
        if (layer.in_features, layer.block_shape, layer.activation) != (first.in_features, first.block_shape, None):
            raise RegrowError("merged_linear needs layers of equal in_features and block size, without activation")
    if any(hooked(layer) for layer in layers):
        return torch.cat([layer(x) for layer in layers], -1)
    if x.shape[-1] != first.in_features:
        raise RegrowError(f"merged_linear expects inputs of {first.in_features} features, got shape {list(x.shape)}")
    values, bias, *index = merged(layers)
    y = kernels.spmm(*in_compute_dtype(x.reshape(-1, first.in_features), values, bias), *index)
    return y.view(*x.shape[:-1], y.shape[-1])


def merged(layers: Sequence[BlockSparseLinear]) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Values, bias, ``row_ptr``, ``col_idx`` and ``slot`` of the layers' weights on top of each other."""
    return torch.cat([layer.values for layer in layers]), _biases(layers), *_indices(layers)


def _biases(layers: Sequence[BlockSparseLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [layer.values.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    )


def _indices(layers: Sequence[BlockSparseLinear]) -> tuple[Tensor, Tensor, Tensor]:
    row_ptr, col_idx, slot = zip(*(layer.topology.indices() for layer in layers), strict=True)
    before = [0]
    for part in slot:
        before.append(before[-1] + part.shape[0])
    ends = [part[1:] + n for part, n in zip(row_ptr, before, strict=False)]
    slots = [part + n for part, n in zip(slot, before, strict=False)]
    return torch.cat([row_ptr[0][:1], *ends]), torch.cat(col_idx), torch.cat(slots)
