"""How many blocks each layer gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from regrow.entries import listed
from regrow.errors import RegrowError

Shapes = Mapping[str, tuple[int, int]]
"""Layer name -> (block rows, block columns). Q, K and V are layers of their own."""
Distribution = str | Mapping[str, float]
"""A name of :data:`DISTRIBUTIONS`, or ``{glob: density}``."""


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density in every layer, as in the paper (section 2).

    Example:
        >>> uniform({"query": (4, 4), "up": (16, 4)}, 0.25)
        {'query': 0.25, 'up': 0.25}
    """
    return dict.fromkeys(shapes, density)


@listed(
    "rule",
    "erk",
    paper="Evci et al., Rigging the Lottery: Making All Tickets Winners",
    year=2020,
    link="https://arxiv.org/abs/1911.11134",
    always_sparse=True,
    command="regrow pretrain --distribution erk",
    does="Small layers get a higher density than large ones; the whole keeps the one that was asked for.",
)
def erdos_renyi(shapes: Shapes, density: float) -> dict[str, float]:
    r"""A layer's number of blocks grows with the *sum* of its dimensions, not their product.

    .. math:: \rho_l = \min(1, \epsilon\,\frac{R_l + C_l}{R_l C_l}), \quad
              \epsilon \text{ such that } \sum_l \rho_l R_l C_l = \rho \sum_l R_l C_l

    Layers that would exceed 1 are dense, and the others share what is left.

    Example, a BERT layer: attention gets 4/3 of the density, the feed-forward layers 5/6.
        >>> bert = {"q": (4, 4), "k": (4, 4), "v": (4, 4), "o": (4, 4), "up": (16, 4), "down": (4, 16)}
        >>> {name: round(d, 4) for name, d in erdos_renyi(bert, 0.12).items() if name in ("q", "up")}
        {'q': 0.16, 'up': 0.1}

    Reference: D. C. Mocanu et al. 2018, Nature Communications 9, 2383 (ER); U. Evci et al. 2020, arXiv 1911.11134
    (ERK: the same with the kernel's dimensions, which a linear layer does not have).
    """
    raw = {name: (rows + cols) / (rows * cols) for name, (rows, cols) in shapes.items()}
    size = {name: rows * cols for name, (rows, cols) in shapes.items()}
    dense: set[str] = set()
    while True:
        budget = density * sum(size.values()) - sum(size[name] for name in dense)
        rest = sum(raw[name] * size[name] for name in shapes if name not in dense)
        epsilon = budget / rest if rest else 0.0
        full = {name for name in shapes if name not in dense and epsilon * raw[name] > 1.0}
        if not full:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense |= full


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "er": erdos_renyi,
    "erk": erdos_renyi,
}


def by_glob(shapes: Shapes, density: float, given: Mapping[str, float]) -> dict[str, float]:
    """The first glob that matches a layer's name gives its density; others get ``density``.

    Raises:
        RegrowError: a density is outside (0, 1], or a glob matches no layer.

    Example:
        >>> by_glob({"0.query": (4, 4), "0.up": (16, 4)}, 0.1, {"*.query": 0.25})
        {'0.query': 0.25, '0.up': 0.1}
    """
    for glob, value in given.items():
        check_density(value, f"distribution[{glob!r}]")
        if not any(fnmatchcase(name, glob) for name in shapes):
            raise RegrowError(f"distribution names {glob!r}, which matches no sparse layer")
    return {name: next((d for glob, d in given.items() if fnmatchcase(name, glob)), density) for name in shapes}


def check_density(density: float, name: str = "density") -> None:
    """Raise unless ``density`` lies in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise RegrowError(f"{name} must lie in (0, 1], got {density}; density 0.1 means 90 % sparsity")


def blocks_at_density(n_block_rows: int, n_block_cols: int, density: float) -> int:
    """``round(density * R * C)``, never less than one block.

    Example:
        >>> blocks_at_density(8, 8, 0.1), blocks_at_density(2, 2, 0.01)
        (6, 1)
    """
    check_density(density)
    return max(1, round(density * n_block_rows * n_block_cols))


def layer_densities(shapes: Shapes, density: float, distribution: Distribution) -> dict[str, float]:
    """Density of every layer under a named distribution, or under explicit densities by glob.

    Raises:
        RegrowError: unknown distribution, density outside (0, 1], or a glob that matches nothing.
    """
    check_density(density)
    if not isinstance(distribution, str):
        return by_glob(shapes, density, distribution)
    if distribution not in DISTRIBUTIONS:
        raise RegrowError(
            f"unknown distribution {distribution!r}; choose one of {', '.join(DISTRIBUTIONS)}, or map globs of layer "
            "names to densities"
        )
    return DISTRIBUTIONS[distribution](shapes, density)
