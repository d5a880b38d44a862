"""Dropout, residual sum and LayerNorm: what closes each half of a transformer layer, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.errors import RegrowError
from regrow.kernels import dropout as by_seed
from regrow.nn.random import draw_dropout, draw_seed


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero a share ``p`` of the elements and divide the others by what remains, in training; else ``x`` itself.

    As :func:`torch.nn.functional.dropout`, but no mask is stored: it follows from a seed, one draw from torch's default
    CPU generator. Nothing is drawn where nothing is dropped.

    Args:
        x: ``[..., H]``, floating point.
        p: share of elements that are dropped, in [0, 1); in steps of ``2^-16``.
        training: whether anything is dropped.

    Raises:
        RegrowError: ``p`` is out of range, or ``x`` is not floating point.

    >>> dropout(torch.ones(2, 3), 0.5, training=False)
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    >>> dropout(torch.ones(1000), 0.5).unique()
    tensor([0., 2.])

    Source: Srivastava et al. 2014, "Dropout", JMLR 15; the mask: :mod:`regrow.kernels.dropout`.
    """
    by_seed.dropout_threshold(p)
    return by_seed.dropout(x, p, draw_seed()) if training and p else x


def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y = LayerNorm(residual + dropout(x))`` over the last dimension, in one pass over memory.

    Only ``x``, ``residual`` and two numbers per row are kept for the backward pass. The mask follows from a seed, one
    draw from torch's default CPU generator; nothing is drawn where nothing is dropped. Differentiable once. Under
    ``torch.autocast`` it computes in the dtype of ``weight``.

    Args:
        x: ``[..., H]``.
        residual: of the shape of ``x``, or None for zero.
        weight, bias: ``[H]``.
        eps: added to the variance.
        p: share of elements of ``x`` that are dropped, in [0, 1).
        training: whether anything is dropped.

    Returns:
        ``y``, of the shape of ``x``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or ``p`` is out of range.

    >>> ones, zeros = torch.ones(2), torch.zeros(2)
    >>> dropout_add_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), ones, zeros)
    tensor([[-1.,  1.]])

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 5.4; Ba et al. 2016, arXiv 1607.06450.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, residual = x.to(weight.dtype), None if residual is None else residual.to(weight.dtype)
    if residual is not None and residual.shape != x.shape:
        raise RegrowError(f"residual is {list(residual.shape)} and x is {list(x.shape)}; they must agree")
    if weight.dim() != 1 or not x.dim() or x.shape[-1] != weight.shape[0]:
        raise RegrowError(f"x is {list(x.shape)} and weight is {list(weight.shape)}; they must be [..., H] and [H]")
    rows = x.reshape(-1, weight.shape[0])
    to_add = None if residual is None else residual.reshape(rows.shape)
    y = kernels.dropout_add_norm(rows, to_add, weight, bias, eps, *draw_dropout(p, training))
    return y if x.dim() == 2 else y.view(x.shape)  # FSDP warns of layers that return a view


class DropoutAddNorm(nn.LayerNorm):
    """``y = LayerNorm(residual + dropout(x))``, in one pass over memory: see :func:`dropout_add_norm`.

    Its parameters are those of :class:`torch.nn.LayerNorm`, under the same names.

    Args:
        features: ``H``.
        eps: added to the variance.
        p: share of elements of ``x`` that are dropped in training, in [0, 1).

    Shape:
        ``x`` and ``residual`` ``[..., H]`` -> ``y [..., H]``; without ``residual`` it is LayerNorm of dropout.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or ``p`` is out of range.

    >>> layer = DropoutAddNorm(8, p=0.1)
    >>> sorted(layer.state_dict()), layer(torch.randn(2, 3, 8), torch.randn(2, 3, 8)).shape
    (['bias', 'weight'], torch.Size([2, 3, 8]))

    Source: see :func:`dropout_add_norm`.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        features: int,
        eps: float = 1e-12,
        p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        by_seed.dropout_threshold(p)
        super().__init__(features, eps, device=device, dtype=dtype)
        self.p = p

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return dropout_add_norm(x, residual, self.weight, self.bias, self.eps, self.p, self.training)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, p={self.p}"
