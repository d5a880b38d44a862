"""Journey, pruning for the best average: weak blocks of all layers go, geometrically. Starts dense, not always sparse.

T. Jin, A. I. Humayun, U. Evci, S. Subramanian, A. Yazdanbakhsh, D. Alistarh, G. K. Dziugaite, *The Journey Matters:
Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws*, ICLR 2025,
https://arxiv.org/abs/2501.12486. The ``n`` prunings of a dense model lie 100 steps apart there, and after the ``k``-th
the density is ``rho_f ** (k / n)``.

.. math:: \\rho(t) = \\rho_i\\,(\\rho_f / \\rho_i)^p, \\quad
          p = \\text{clip}\\Big(\\frac{t - t_0}{t_1 - t_0}, 0, 1\\Big)

At an update the weakest blocks of the whole model go, so layers end with different densities (each keeps at least one
block); none come. ``begin`` and ``end`` are shares of the training's *compute*, in which a step counts as much as the
model is dense: with the paper's quarter and three quarters the dense quarter of the compute takes less than a quarter
of the steps. :func:`window` says where in the steps ``t_0`` and ``t_1`` lie. After its last update nothing
goes any more, so let updates go on until then. Blocks that go are freed, as with ``gmp``; the schedule's drop fraction
plays no part.

The paper's law of the loss counts a model's parameters as their mean over training: :func:`mean_density`, and
``regrow study fit``.

Two layers of 2 x 2 positions, dense. At the middle of the way to ``final_density=1/4`` half of the eight blocks stay:
those of norms 9, 8, 7 and 6, of which three lie in the first layer:

    >>> import torch
    >>> from dataclasses import replace
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> journey = create("journey", final_density=1 / 4)
    >>> def layer(*values):
    ...     blocks = torch.tensor(values).view(4, 1, 1)
    ...     return Signals(blocks, BlockTopology.random(2, 2, 4), 0.5, torch.Generator(), progress=middle)
    >>> middle = sum(window(1.0, 1 / 4)) / 2
    >>> layers = {"a": layer(9.0, -8.0, 1.0, 7.0), "b": layer(2.0, 3.0, -6.0, 0.5)}
    >>> journey.allocate(layers)
    {'a': 3, 'b': 1}
    >>> journey.propose(replace(layers["b"], target=1)).slots.tolist()
    [3, 0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from regrow.methods.base import Method, register
from regrow.methods.density import by_norm, check_model_starts_denser, geometric, way
from regrow.methods.rules import check_window, exchange
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Signals
from regrow.topology import BlockTopology, TopologyUpdate
from regrow.topology.distribution import check_density


@register("journey")
@dataclass(frozen=True)
class Journey(Method):
    """Prune the model's weakest blocks, wherever they are, while the density falls geometrically; grow none."""

    paper = "Jin et al., The Journey Matters"
    year = 2025
    link = "https://arxiv.org/abs/2501.12486"
    always_sparse = False

    final_density: float = field(default=0.1, metadata={"help": "density at the end; --density is that of the start"})
    begin: float = field(default=0.25, metadata={"help": "share of the training's compute before pruning begins"})
    end: float = field(default=0.75, metadata={"help": "share of the training's compute until it is complete"})
    norm: Norm = field(default="l1", metadata={"help": "block norm that ranks blocks for removal"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_density(self.final_density, "final_density")
        check_window(self.begin, self.end)

    def check_layers(self, layers: Mapping[str, BlockTopology]) -> None:
        check_model_starts_denser(layers, self.final_density, self.name)

    def density_at(self, progress: float, start: float) -> float:
        first, last = window(start, self.final_density, self.begin, self.end)
        return geometric(start, self.final_density, way(progress, first, last))

    def allocate(self, layers: Mapping[str, Signals]) -> dict[str, int]:
        return by_norm(layers, self.density_at, self.norm)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology = signals.topology
        dropped = weakest(block_norm(signals.values, self.norm), topology.n_blocks - signals.n_after)
        return exchange(topology, dropped, dropped.new_empty(0))


def window(start: float, final: float, begin: float = 0.25, end: float = 0.75) -> tuple[float, float]:
    r"""Shares of the *steps* at which pruning begins and ends, from those of the *compute*.

    A step costs its density. Before pruning that is :math:`\rho_i`, after it :math:`\rho_f`, and during it the mean
    of the geometric curve :math:`m = (\rho_i - \rho_f) / \ln(\rho_i / \rho_f)`. So compute :math:`C` takes

    .. math:: T = C \Big(\frac{begin}{\rho_i} + \frac{end - begin}{m} + \frac{1 - end}{\rho_f}\Big)

    steps, of which the first term lies before the pruning and the last one after it.

    Example:
        >>> [round(share * 13050) for share in window(1.0, 0.6)]  # the paper: 2500 and 8875
        [2500, 8884]
        >>> window(0.5, 0.5)  # nothing to prune: steps cost the same
        (0.25, 0.75)
    """
    before, during, after = _steps(start, final, begin, end)
    total = before + during + after
    return before / total, 1 - after / total


def mean_density(start: float, final: float, begin: float = 0.25, end: float = 0.75) -> float:
    r"""Mean density over the steps, :math:`\bar\rho = C / T`: see :func:`window`.

    Times the prunable parameters this is the :math:`\bar N` of the paper's law. (Of prunings at finitely many steps;
    :func:`regrow.training.mean_density` counts those of a schedule.)

    Example:
        >>> round(mean_density(1.0, 0.6), 3), round(mean_density(1.0, 0.8), 3)  # final sparsities of 40 % and 20 %
        (0.766, 0.893)
    """
    return 1 / sum(_steps(start, final, begin, end))


def _steps(start: float, final: float, begin: float, end: float) -> tuple[float, float, float]:
    """Steps before, during and after pruning, for a compute of one dense step."""
    ratio = math.log(final / start)
    mean = start * (math.expm1(ratio) / ratio if ratio else 1.0)  # (final - start) / ratio, but does not cancel
    return begin / start, (end - begin) / mean, (1 - end) / final
