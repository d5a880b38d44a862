"""CHTss: CHTs while the density falls along a sigmoid. Denser at first than at the end, so not always sparse.

Y. Zhang, D. Cerretti, J. Zhao, W. Wu, Z. Liao, U. Michieli, C. V. Cannistraci, *Brain network science modelling of
sparse neural networks enables Transformers and LLMs to perform as fully connected*, 2025,
https://arxiv.org/abs/2501.19107. There: from a density of .5, a steepness of 6.

.. math:: \\rho_t = \\rho_i + (\\rho_f - \\rho_i)\\,
          \\frac{\\sigma(k(p - 1/2)) - \\sigma(-k/2)}{\\sigma(k/2) - \\sigma(-k/2)}, \\quad
          p = \\text{clip}\\Big(\\frac{t - t_0}{t_1 - t_0}, 0, 1\\Big)

with ``sigma`` the logistic function and ``k`` the ``steepness``; the fraction lets the curve begin and end
exactly at its ends. The blocks that an update leaves are a sample as in :mod:`regrow.methods.chts`, fewer from update
to update, and a share of them is exchanged by the same rule. The paper removes surplus links by their relative
importance; here the weight's magnitude decides, as it does for those exchanged.

The 3 x 3 example of ``cht`` once more, halfway from 6/9 to ``final_density=4/9``: five blocks stay, none is exchanged.
The sixth, at (2, 2), has norm zero:

    >>> import torch
    >>> from dataclasses import replace
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> rows, cols = [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 1, 2]
    >>> topology = BlockTopology.from_coordinates(rows, cols, n_block_rows=3, n_block_cols=3)
    >>> values = torch.tensor([5.0, 4.0, 3.0, 6.0, 7.0, 0.0]).view(6, 1, 1)
    >>> signals = Signals(values, topology, 0.0, torch.Generator().manual_seed(0), progress=0.4)
    >>> chtss = create("chtss", final_density=4 / 9)
    >>> chtss.allocate({"layer": signals})
    {'layer': 5}
    >>> update = chtss.propose(replace(signals, target=5))
    >>> update.slots.tolist(), update.rows.tolist()
    ([5], [])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regrow.errors import RegrowError
from regrow.methods.base import register
from regrow.methods.chts import CHTs
from regrow.methods.density import by_layer, check_starts_denser, sigmoid, way
from regrow.methods.rules import check_window
from regrow.methods.signals import Signals
from regrow.topology import BlockTopology
from regrow.topology.distribution import check_density


@register("chtss")
@dataclass(frozen=True)
class CHTss(CHTs):
    """CHTs with fewer and fewer blocks: what stays is sampled by magnitude, what comes by the network's shape."""

    always_sparse = False

    final_density: float = field(default=0.1, metadata={"help": "density at the end; --density is that of the start"})
    begin: float = field(default=0.0, metadata={"help": "share of the training after which the density falls"})
    end: float = field(default=0.8, metadata={"help": "share of the training after which it has arrived"})
    steepness: float = field(default=6.0, metadata={"help": "of the sigmoid in the middle"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.final_density, "final_density")
        check_window(self.begin, self.end)
        if not self.steepness > 0:
            raise RegrowError(f"steepness must be positive, got {self.steepness}")

    def check_layer(self, name: str, topology: BlockTopology) -> None:
        check_starts_denser(name, topology, self.final_density, self.name)

    def density_at(self, progress: float, start: float) -> float:
        return sigmoid(start, self.final_density, way(progress, self.begin, self.end), self.steepness)

    def allocate(self, layers: Mapping[str, Signals]) -> dict[str, int]:
        return by_layer(layers, self.density_at)
