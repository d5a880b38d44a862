"""What the transformations of Sparse-IFT share: as many products as the dense layer, in another shape."""

from __future__ import annotations

from dataclasses import replace

from regrow.errors import RegrowError
from regrow.nn.options.base import Place

PAPER = "Thangarasa et al., Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency"
YEAR = 2023
LINK = "https://arxiv.org/abs/2303.11525"
_WIDEST = 64
"""Times a width is multiplied at most; a file that asks for more is not believed."""


def widened(features: int, place: Place) -> tuple[int, float]:
    """A width of about ``features / density``, a multiple of the block, and the density of equal products there.

    Raises:
        RegrowError: it would be more than 64 times as wide.

    Example:
        >>> widened(3072, Place(768, 3072, True, 16, 0.1))
        (30720, 0.1)
        >>> widened(64, Place(64, 64, True, 16, 0.3))
        (224, 0.2857142857142857)
    """
    if place.density * _WIDEST < 1:
        raise RegrowError(f"density {place.density:.4g} makes a layer more than {_WIDEST} times as wide; raise it")
    b = place.block_size
    width = -(-round(features / place.density) // b) * b
    return width, features / width


def two_factors(place: Place) -> tuple[Place, Place]:
    """Two sparse matrices in a row with as many products as one dense matrix: ``in -> inner -> out``.

    .. math:: inner = \\lceil \\frac{in \\cdot out}{(in + out)\\,\\rho} \\rceil

    rounded up to blocks, and the density such that the products are those of the dense layer.

    Example:
        >>> [(p.in_features, p.out_features, round(p.density, 3)) for p in two_factors(Place(64, 64, True, 16, 0.25))]
        [(64, 128, 0.25), (128, 64, 0.25)]
    """
    joint = place.in_features * place.out_features / (place.in_features + place.out_features)
    b = place.block_size
    inner = max(b, -(-round(joint / max(place.density, 1 / _WIDEST)) // b) * b)
    if place.density * _WIDEST < 1:
        raise RegrowError(f"density {place.density:.4g} makes the inner width more than {_WIDEST} times; raise it")
    density = min(joint / inner, 1.0)
    first = replace(place, out_features=inner, density=density, bias=False)
    return first, replace(place, in_features=inner, density=density)
