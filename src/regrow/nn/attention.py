"""Self-attention over packed sequences."""

from __future__ import annotations

import math

from torch import Tensor

from regrow import kernels
from regrow.errors import RegrowError
from regrow.nn.random import draw_dropout


def attention(
    qkv: Tensor,
    offsets: Tensor,
    heads: int,
    *,
    p: float = 0.0,
    training: bool = True,
    scale: float | None = None,
) -> Tensor:
    r"""Multi-head self-attention between its two products: every token looks at all tokens of its own sequence.

    For each sequence and head, with queries, keys and values ``Q``, ``K``, ``V`` ``[length, d]``:

    .. math:: out = \mathrm{dropout}(\mathrm{softmax}(scale \cdot Q K^T)) V

    Sequences lie one after the other without padding, so there is no mask. Scores are made anew in the backward pass,
    and dropout's mask follows from a seed, one draw from torch's default CPU generator; nothing is drawn where nothing
    is dropped. Differentiable once.

    Args:
        qkv: ``[N, 3 * heads * d]``, queries, keys and values of each token side by side, as one product makes them.
        offsets: int32 ``[B + 1]``, from 0 to ``N``: sequence ``s`` is the tokens ``offsets[s]`` to ``offsets[s + 1]``.
        heads: how many.
        p: share of probabilities that are dropped, in [0, 1).
        training: whether anything is dropped.
        scale: of the scores; ``1 / sqrt(d)`` if absent.

    Returns:
        ``[N, heads * d]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, ``offsets`` does not rise from 0 to ``N``, or ``p`` is out of
            range.

    Example:
        >>> import torch
        >>> offsets = torch.tensor([0, 3, 7], dtype=torch.int32)  # sequences of 3 and 4 tokens
        >>> attention(torch.ones(7, 3 * 16), offsets, heads=2, p=0.1, training=False).shape
        torch.Size([7, 16])

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.
    """
    if heads < 1:
        raise RegrowError(f"heads is {heads}; it must be positive")
    if scale is None:
        scale = 1 / math.sqrt(max(1, qkv.shape[-1] // (3 * heads)))
    return kernels.attention(qkv, offsets, heads, scale, *draw_dropout(p, training))[0]
