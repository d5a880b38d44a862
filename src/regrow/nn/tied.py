"""One gradient for a weight that is both a word embedding and the classifier over the same words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regrow.kernels import cpu


class SharedGradient:
    """Where a loss leaves its gradient of a tied weight, for the embedding to add its own to.

    The two gradients are of the size of the vocabulary, the embedding's nearly all zeros; autograd would make both and
    add them. Make one of these for every forward pass, and give it to :func:`tied_embedding` and to
    :func:`regrow.nn.linear_cross_entropy` of whatever was computed from that embedding.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def take(self) -> Tensor | None:
        """The gradient that was left here, if any; it is the caller's from now on."""
        gradient, self.gradient = self.gradient, None
        return gradient


def tied_embedding(ids: Tensor, weight: Tensor, shared: SharedGradient, padding_idx: int | None = None) -> Tensor:
    """``weight[ids]``, whose backward pass adds its rows to the gradient that is in ``shared``. Differentiable once.

    Args:
        ids: ``[n]`` int64.
        weight: ``[words, width]``.
        padding_idx: a word that gets no gradient from here.

    Returns:
        ``[n, width]``.

    Example:
        >>> from regrow.nn import linear_cross_entropy
        >>> weight = torch.eye(3, requires_grad=True)
        >>> shared, ids = SharedGradient(), torch.tensor([0, 1])
        >>> x = tied_embedding(ids, weight, shared)
        >>> linear_cross_entropy(x, weight, None, ids, shared=shared).backward()
        >>> tied = weight.grad
        >>> weight.grad = None
        >>> torch.nn.functional.cross_entropy(weight[ids] @ weight.t(), ids).backward()
        >>> torch.allclose(weight.grad, tied)
        True
    """
    return _TiedEmbedding.apply(ids, weight, shared, padding_idx)


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, shared: SharedGradient, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shared, ctx.padding_idx, ctx.shape = shared, padding_idx, weight.shape
        return weight.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), gradient = ctx.saved_tensors, ctx.shared.take()
        if gradient is None:
            gradient = g.new_zeros(ctx.shape)
        if ctx.padding_idx is not None and g.is_cuda:  # where to look for the others would be to wait
            g = g * (ids != ctx.padding_idx)[:, None]
        elif ctx.padding_idx is not None:
            kept = (ids != ctx.padding_idx).nonzero().squeeze(1)
            if kept.numel() < ids.numel():
                ids, g = ids[kept], g[kept]
        if cpu.supports_dense(gradient) and g.dtype is gradient.dtype:
            cpu.add_rows_(gradient, ids, g)
        else:
            gradient.index_add_(0, ids, g.to(gradient.dtype))
        return None, gradient, None, None
