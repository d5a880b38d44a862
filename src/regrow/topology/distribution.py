"""How many blocks each layer gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from regrow.errors import RegrowError

Shapes = Mapping[str, tuple[int, int]]
"""Layer name -> (block rows, block columns)."""


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density in every layer, as in the paper (section 2).

    Example:
        >>> uniform({"query": (4, 4), "up": (16, 4)}, 0.25)
        {'query': 0.25, 'up': 0.25}
    """
    return dict.fromkeys(shapes, density)


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"uniform": uniform}


def check_density(density: float) -> None:
    """Raise unless ``density`` lies in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise RegrowError(f"density must lie in (0, 1], got {density}; density 0.1 means 90 % sparsity")


def blocks_at_density(n_block_rows: int, n_block_cols: int, density: float) -> int:
    """``round(density * R * C)``, never less than one block.

    Example:
        >>> blocks_at_density(8, 8, 0.1), blocks_at_density(2, 2, 0.01)
        (6, 1)
    """
    check_density(density)
    return max(1, round(density * n_block_rows * n_block_cols))


def layer_densities(shapes: Shapes, density: float, distribution: str) -> dict[str, float]:
    """Density of every layer under a named distribution.

    Raises:
        RegrowError: unknown distribution, or density outside (0, 1].
    """
    check_density(density)
    if distribution not in DISTRIBUTIONS:
        raise RegrowError(f"unknown distribution {distribution!r}; choose one of {', '.join(DISTRIBUTIONS)}")
    return DISTRIBUTIONS[distribution](shapes, density)
