"""Guard against a training that has left the finite numbers: found before the step that would spread it."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from regrow.shards import whole

OnNonfinite = Literal["stop", "skip"]


def is_finite(norm: object) -> bool:
    """Whether the norm of all gradients together, which clipping computes anyway, is a finite number.

    Example:
        >>> is_finite(torch.tensor(1.0)), is_finite(float("nan"))
        (True, False)
    """
    return norm is None or math.isfinite(float(whole(norm) if isinstance(norm, Tensor) else norm))  # type: ignore[arg-type]


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
