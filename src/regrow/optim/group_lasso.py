"""The paper's optional shrinkage of whole blocks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.nn.init import STD

BlockFactor = Literal["elements", "edge"]
_EPSILON = 1e-6


@torch.no_grad()
def group_lasso_(values: Tensor, *, lr: float, strength: float, factor: BlockFactor = "elements") -> Tensor:
    r"""Decoupled group-lasso step in place: every block shrinks towards zero by nearly constant length.

    .. math:: W_{ij} \leftarrow W_{ij} - \eta\,\lambda\,w_{std}\sqrt{B}\;
              \frac{W_{ij}}{\sqrt{\sum_{block} W^2 + 10^{-6}}}, \quad w_{std} = 0.02

    Args:
        values: [n, b, b] or [n, b, 1].
        lr: current learning rate (eta).
        strength: lambda.
        factor: ``B`` is the block's element count (default) or its edge ``b``; the paper leaves it open.

    Example:
        >>> group_lasso_(torch.full((1, 1, 1), 3.0), lr=0.1, strength=10.0)
        tensor([[[2.9800]]])

    Reference: Dietrich et al. 2021, arXiv 2108.06277, section 2 (regularization).
    """
    if factor not in ("elements", "edge"):
        raise RegrowError(f"group_lasso_factor must be 'elements' or 'edge', got {factor!r}")
    _, edge, width = values.shape
    size = edge * width if factor == "elements" else edge
    norm = (values.square().sum(dim=(1, 2), keepdim=True) + _EPSILON).sqrt()
    return values.sub_(values / norm * (lr * strength * STD * math.sqrt(size)))
