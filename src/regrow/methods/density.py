r"""How dense a model is while its density falls: curves that several methods share.

A curve takes the densities at both ends and the share ``p`` of the way that lies behind, in [0, 1]:

* :func:`cubic`, fast at first: Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878;
* :func:`sigmoid`, slow at both ends: Zhang et al. 2025, https://arxiv.org/abs/2501.19107;
* :func:`geometric`, the same share of what is left at every update: Jin et al. 2025, https://arxiv.org/abs/2501.12486.

How many blocks that leaves to each layer: as many as its own curve says (:func:`by_layer`), or as many of the model's
strongest blocks as lie in it (:func:`by_norm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch

from regrow.errors import RegrowError
from regrow.methods.scores import Norm, block_norm
from regrow.methods.signals import Signals
from regrow.topology import BlockTopology, blocks_at_density

Curve = Callable[[float, float], float]
"""``(progress, density at the start) -> density``, both shares in [0, 1]."""


def cubic(start: float, final: float, p: float) -> float:
    r""":math:`\rho = \rho_f + (\rho_i - \rho_f)\,(1 - p)^3`.

    Example:
        >>> [round(cubic(1.0, 0.2, p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.3, 0.2]
    """
    return final + (start - final) * (1 - p) ** 3


def sigmoid(start: float, final: float, p: float, steepness: float = 6.0) -> float:
    r""":math:`\rho = \rho_i + (\rho_f - \rho_i)\, q`, with a logistic function :math:`\sigma` in `q`.

    .. math:: q = \frac{\sigma(k(p - 1/2)) - \sigma(-k/2)}{\sigma(k/2) - \sigma(-k/2)}

    The fraction stretches it so that the curve begins and ends exactly at its ends;
    ``steepness`` is :math:`k`.

    Example:
        >>> [round(sigmoid(0.5, 0.1, p), 3) for p in (0.0, 0.1, 0.5, 1.0)]
        [0.5, 0.484, 0.3, 0.1]
    """
    # (tanh(k(p - 1/2) / 2) / tanh(k / 4) + 1) / 2 is the same fraction, and does not overflow
    way = (math.tanh(steepness * (p - 0.5) / 2) / math.tanh(steepness / 4) + 1) / 2
    return start + (final - start) * way


def geometric(start: float, final: float, p: float) -> float:
    r""":math:`\rho = \rho_i\,(\rho_f / \rho_i)^p`.

    Example:
        >>> [round(geometric(1.0, 0.25, p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.25]
    """
    return start * (final / start) ** p


def way(progress: float, begin: float, end: float) -> float:
    """The share ``p`` of the way from ``begin`` to ``end`` that lies behind: 0 before, 1 after.

    Example:
        >>> [way(progress, 0.25, 0.75) for progress in (0.1, 0.5, 0.9)]
        [0.0, 0.5, 1.0]
    """
    return min(max((progress - begin) / (end - begin), 0.0), 1.0)


def by_layer(layers: Mapping[str, Signals], curve: Curve) -> dict[str, int]:
    """Blocks of each layer when each follows the curve from its own density at the start; none grows."""
    return {name: min(s.topology.n_blocks, _planned([s], curve)) for name, s in layers.items()}


def by_norm(layers: Mapping[str, Signals], curve: Curve, norm: Norm) -> dict[str, int]:
    """Blocks of each layer when the model follows the curve and its strongest blocks stay, wherever they are.

    Every layer keeps at least one block. Of blocks of equal norm at the threshold those of the first layers stay.

    Raises:
        RegrowError: the layers have blocks of different sizes, whose norms say nothing of each other.

    Example:
        >>> topology = BlockTopology.random(1, 4, 4)
        >>> def layer(*values):
        ...     return Signals(torch.tensor(values).view(4, 1, 1), topology, 0.0, torch.Generator())
        >>> layers = {"a": layer(9.0, 8.0, 7.0, 6.0), "b": layer(8.5, 1.0, 2.0, 3.0), "c": layer(0.1, 0.2, 0.3, 0.4)}
        >>> by_norm(layers, lambda progress, start: 0.5, "l1")
        {'a': 4, 'b': 1, 'c': 1}
    """
    sizes = sorted({"x".join(map(str, s.values.shape[1:])) for s in layers.values()})
    if len(sizes) > 1:
        raise RegrowError(f"all blocks are ranked together, so they must have one size, got {', '.join(sizes)}")
    now = {name: s.topology.n_blocks for name, s in layers.items()}
    wanted = _planned(layers.values(), curve)
    rest = max(wanted, len(layers)) - len(layers)  # beyond the one that every layer keeps
    if rest >= sum(now.values()) - len(layers):
        return now
    if rest == 0:
        return dict.fromkeys(layers, 1)
    others = {name: _without_strongest(block_norm(s.values, norm)) for name, s in layers.items()}
    every = torch.cat(list(others.values()))
    threshold = every.kthvalue(every.numel() - rest + 1).values
    above = {name: int((norms > threshold).sum()) for name, norms in others.items()}
    left = rest - sum(above.values())
    blocks = {}
    for name, norms in others.items():
        tied = min(left, int((norms == threshold).sum()))
        blocks[name], left = 1 + above[name] + tied, left - tied
    return blocks


def _without_strongest(norms: torch.Tensor) -> torch.Tensor:
    strongest = int(norms.argmax())
    return torch.cat([norms[:strongest], norms[strongest + 1 :]])


def _planned(layers: Collection[Signals], curve: Curve) -> int:
    """Blocks that the curve gives to some layers together."""
    n_positions = sum(s.topology.n_positions for s in layers)
    start = sum(s.topology.n_blocks if s.start_blocks is None else s.start_blocks for s in layers)
    density = curve(max(s.progress for s in layers), start / n_positions)
    return blocks_at_density(1, n_positions, min(density, 1.0))


def check_starts_denser(name: str, topology: BlockTopology, final_density: float, method: str) -> None:
    """Raise :class:`RegrowError` if a layer has fewer blocks at the start than ``method`` is to leave it."""
    if topology.n_blocks < blocks_at_density(topology.n_block_rows, topology.n_block_cols, final_density):
        raise RegrowError(
            f"{name} starts at density {topology.density:.3g}, below final_density={final_density}; {method} only lets "
            "the density fall, so start denser"
        )


def check_model_starts_denser(layers: Mapping[str, BlockTopology], final_density: float, method: str) -> None:
    """The same of all layers together, for methods that share out blocks: one layer may end with few."""
    positions = sum(topology.n_positions for topology in layers.values())
    density = sum(topology.n_blocks for topology in layers.values()) / positions
    if density * positions < round(final_density * positions):
        raise RegrowError(
            f"the model starts at density {density:.3g}, below final_density={final_density}; {method} only lets the "
            "density fall, so start denser"
        )
