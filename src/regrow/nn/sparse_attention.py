"""The attention half of a transformer layer from four sparse layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regrow import kernels
from regrow.errors import RegrowError
from regrow.kernels.sparse_attention import supports
from regrow.nn.attention import attention
from regrow.nn.ffn import hooked
from regrow.nn.linear import BlockSparseLinear
from regrow.nn.merged import merged, merged_linear
from regrow.nn.precision import compute_dtype
from regrow.nn.random import draw_dropout

_SHARES = 4
"""So many sequences a thread are shared out evenly enough."""

_CACHED, _CACHED_INFERENCE = 200_000, 320_000
"""Queries, keys and values of one sequence, as numbers, with and without a gradient. With more, blocks below 16, which
do less with each, wait for them longer than the separate operations take."""


def sparse_attention(
    query: BlockSparseLinear,
    key: BlockSparseLinear,
    value: BlockSparseLinear,
    output: BlockSparseLinear,
    x: Tensor,
    offsets: Tensor,
    heads: int,
    *,
    p: float = 0.0,
    training: bool = True,
    scale: float | None = None,
) -> Tensor:
    r"""Multi-head self-attention with the products before and after it, a sequence at a time.

    The same as ``output(attention(merged_linear([query, key, value], x), offsets, heads, ...))``; see
    :func:`regrow.nn.attention` for the formula and the mask of dropout, which is the same for the same seed. But
    queries, keys and values are neither written to memory nor kept: the backward pass computes them again.
    Differentiable once.

    The separate functions are called where this one cannot stand in for them, or would be slower: block sizes differ,
    a layer has an activation, or a hook, which is to see what goes in and out, heads are of a width that the compiled
    kernel does not know, there are too few sequences for the threads, or blocks are below 16 and sequences long, or
    blocks are single elements and there is a gradient.

    Args:
        query, key, value: ``in -> heads * d``.
        output: ``heads * d -> out``.
        x: ``[N, in]``, sequences one after the other.
        offsets: int32 ``[B + 1]``, from 0 to ``N``: sequence ``s`` is the tokens ``offsets[s]`` to ``offsets[s + 1]``.
        heads: how many.
        p: share of probabilities that are dropped, in [0, 1).
        training: whether anything is dropped.
        scale: of the scores; ``1 / sqrt(d)`` if absent.

    Returns:
        ``[N, out]``. Under ``torch.autocast`` it is computed in the dtype of the layers' values.

    Raises:
        RegrowError: widths, devices or dtypes disagree, ``offsets`` does not rise from 0 to ``N``, or ``p`` is out of
            range.

    Example:
        >>> layers = [BlockSparseLinear(32, 32, block_size=16, density=0.5) for _ in range(4)]
        >>> x, offsets = torch.randn(60, 32), torch.arange(0, 61, 3, dtype=torch.int32)  # 20 sequences of 3 tokens
        >>> y = sparse_attention(*layers, x, offsets, heads=2)
        >>> torch.allclose(y, layers[3](attention(merged_linear(layers[:3], x), offsets, 2)), atol=1e-5)
        True

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2; Chen et al. 2016, arXiv 1604.06174, for computing
    activations again.
    """
    inner = query, key, value
    layers = *inner, output
    hidden = query.out_features
    if heads < 1 or hidden % heads:
        raise RegrowError(f"heads is {heads}; it must be positive and divide {hidden}")
    for name, width, expected in (
        ("key", key.out_features, hidden),
        ("value", value.out_features, hidden),
        ("output", output.in_features, hidden),
        ("x", x.shape[-1], query.in_features),
    ):
        if width != expected:
            raise RegrowError(f"{name} has {width} features; query has {query.in_features} -> {hidden}")
    if not _fused(layers, x, offsets, hidden // heads):
        alike = all((part.block_shape, part.activation) == (query.block_shape, None) for part in inner)
        alike = alike and not any(hooked(part) for part in inner)
        qkv = merged_linear(inner, x) if alike else torch.cat([layer(x) for layer in inner], -1)
        return output(attention(qkv, offsets, heads, p=p, training=training, scale=scale))
    if scale is None:
        scale = 1 / math.sqrt(hidden // heads)
    x = x.to(compute_dtype(x, output.values))
    second = output.values, output.bias, *output.topology.indices()
    return kernels.sparse_attention(x, offsets, *merged(inner), *second, heads, scale, *draw_dropout(p, training))[0]


def _fused(layers: Sequence[BlockSparseLinear], x: Tensor, offsets: Tensor, width: int) -> bool:
    """Whether the one operation can do it, and is faster: a thread takes whole sequences through its caches."""
    output = layers[-1]
    b, n_sequences = output.block_size, offsets.shape[0] - 1
    if any(layer.block_shape != (b, b) or layer.activation is not None or hooked(layer) for layer in layers):
        return False
    if x.dim() != 2 or not supports(output.values, width, b):
        return False
    if b < 16:
        training = torch.is_grad_enabled()
        if training and b == 1:  # making them again costs more than reading them
            return False
        limit = _CACHED if training else _CACHED_INFERENCE
        if 3 * output.in_features * x.shape[0] > limit * n_sequences:
            return False
    return n_sequences >= _SHARES * torch.get_num_threads()
