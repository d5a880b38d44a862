"""Guard against a training that has left the finite numbers: found before the step that would spread it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from regrow.shards import whole

OnNonfinite = Literal["stop", "skip"]
_LONG_ROW = 64


def is_finite(norm: object) -> bool:
    """Whether the norm of all gradients together, which clipping computes anyway, is a finite number.

    Example:
        >>> is_finite(torch.tensor(1.0)), is_finite(float("nan"))
        (True, False)
    """
    return norm is None or math.isfinite(float(whole(norm) if isinstance(norm, Tensor) else norm))  # type: ignore[arg-type]


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    r"""Euclidean norm of all gradients together, added up row by row where rows are long.

    :math:`\sqrt{\sum_g \sum_{ij} g_{ij}^2}`. On a CPU torch adds up the squares of a whole tensor in few float32 sums:
    for the word embedding of BERT-Base the norm is off by 0.1%, and two halves of it do not make the same whole.

    Example:
        >>> gradient_norm([torch.full((2, 128), 1.0), torch.tensor([12.0])])
        tensor(20.)
    """
    return nn.utils.get_total_norm([_by_row(g) if g.device.type == "cpu" and g.dim() > 1 else g for g in gradients])


def _by_row(gradient: Tensor) -> Tensor:
    rows = gradient.flatten(1)
    return torch.linalg.vector_norm(rows, dim=1) if rows.shape[1] >= _LONG_ROW else rows


def first_nonfinite_gradient(model: nn.Module) -> str:
    """The name of the first parameter whose gradient is not finite.

    Clipping by an infinite norm leaves NaN everywhere, so ask before it where the norm says so.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> (layer(torch.tensor([[1.0, float("inf")]])) * 0).sum().backward()
        >>> first_nonfinite_gradient(layer)
        'weight'
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(nn.utils.get_total_norm([parameter.grad])):
            return name.removeprefix("module.")
    return "the loss"
