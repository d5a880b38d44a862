"""How strong a block is, and which are the weakest and the strongest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.topology.fixed_size import is_among

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


def strongest(pieces: Iterable[tuple[Tensor, Tensor]], k: int, *, excluded: Tensor) -> Tensor:
    """Positions of the ``k`` largest scores of ``(positions, scores)`` pieces in ascending order; ties go to the lower.

    Memory is that of one piece and the result, whose size follows from theirs: ``excluded`` must be distinct and
    each in a piece.

    Example:
        >>> low, high = torch.tensor([0, 1]), torch.tensor([2, 3])
        >>> pieces = [(low, torch.tensor([5.0, 1.0])), (high, torch.tensor([1.0, 9.0]))]
        >>> strongest(pieces, 2, excluded=torch.tensor([0])).tolist()
        [3, 1]
    """
    best = excluded.new_empty(0)
    best_scores = torch.empty(0, device=excluded.device)
    n_allowed = -excluded.numel()
    for positions, scores in pieces:
        n_allowed += positions.numel()
        scores = scores.masked_fill(is_among(positions, excluded), float("-inf"))
        positions = torch.cat([best, positions])
        scores = torch.cat([best_scores.to(scores.dtype), scores])
        order = torch.argsort(scores, descending=True, stable=True)[:k]
        best, best_scores = positions[order], scores[order]
    return best[: max(n_allowed, 0)]


def random_keys(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Keys whose ``k`` largest are a sample without replacement with probability proportional to ``weights``.

    ``log w + Gumbel noise`` (Efraimidis and Spirakis 2006 in logarithms). Weight 0 is drawn only when nothing else is
    left, then uniformly.

    Example:
        >>> keys = random_keys(torch.tensor([0.0, 1.0, 0.0]), torch.Generator().manual_seed(0))
        >>> int(keys.argmax())
        1
    """
    uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300).to(weights.device)
    tiny = -1e6  # below the logarithm of every positive weight
    return torch.where(weights > 0, weights.double().log(), tiny) - (-uniform.log()).log()
