"""How strong a block is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError

Norm = Literal["l1", "l2", "linf"]
_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


def check_norm(norm: str) -> None:
    """Raise unless ``norm`` names a block norm."""
    if norm not in _ORDERS:
        raise RegrowError(f"norm must be one of {', '.join(_ORDERS)}, got {norm!r}")


def block_norm(values: Tensor, norm: Norm = "l1") -> Tensor:
    """Entry-wise vector norm of every block: ``[n, b, b] -> [n]``.

    Example:
        >>> block_norm(torch.tensor([[[3.0, -4.0], [0.0, 0.0]]]), "l2")
        tensor([5.])
    """
    check_norm(norm)
    return torch.linalg.vector_norm(values.detach().flatten(1), _ORDERS[norm], dim=1)


def weakest(scores: Tensor, k: int) -> Tensor:
    """Slots of the ``k`` smallest scores; ties go to the lower slot, so every machine agrees.

    Example:
        >>> weakest(torch.tensor([2.0, 1.0, 1.0, 3.0]), 2)
        tensor([1, 2])
    """
    return torch.argsort(scores, stable=True)[:k]
