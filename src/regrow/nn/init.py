"""How new weights are drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STD = 0.02
"""BERT's standard deviation of initial weights; also ``w_std`` of the group lasso."""
TRUNCATED = 0.8796
"""Deviation of a normal truncated at two deviations, as a share of the normal's."""


def initialise_(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill with a normal of standard deviation 0.02 truncated at two deviations, in place.

    The paper found no rescaling for the sparsity to be better than variance-preserving ones (its Fig. 9).

    Example:
        >>> bool(initialise_(torch.empty(4, 16, 16)).abs().max() <= 0.04)
        True
    """
    return nn.init.trunc_normal_(values, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
