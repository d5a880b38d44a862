"""GMP, gradual magnitude pruning: density falls along a cubic. Starts dense (or denser), so not always sparse.

M. Zhu, S. Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model compression*, 2017,
https://arxiv.org/abs/1710.01878.

.. math:: s_t = s_f + (s_i - s_f)\\,(1 - p)^3, \\quad p = \\text{clip}\\Big(\\frac{t - t_0}{t_1 - t_0}, 0, 1\\Big)

with ``s_i`` the sparsity the layer starts with (``--density``), ``s_f`` from ``final_density``. At an update the
weakest blocks go until the layer is as sparse as that; none come. Blocks that go are freed: values, optimizer state
and indices shrink, and the survivors keep theirs. The schedule's drop fraction plays no part.

Six blocks on 2 x 3 positions, ``final_density=1/3``, half of the pruning time over: the sparsity is 2/3 - 2/3 * 1/8 =
7/12, so ``round(5/12 * 6) = 2`` blocks stay:

    >>> import torch
    >>> from dataclasses import replace
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> topology = BlockTopology.random(2, 3, 6)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0, 6.0, 3.0]).view(6, 1, 1)
    >>> signals = Signals(values, topology, 0.5, torch.Generator(), progress=0.375)
    >>> gmp = create("gmp", final_density=1 / 3)
    >>> gmp.allocate({"layer": signals})
    {'layer': 2}
    >>> gmp.propose(replace(signals, target=2)).slots.tolist()
    [1, 3, 5, 2]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regrow.methods.base import Method, register
from regrow.methods.density import by_layer, check_starts_denser, cubic, way
from regrow.methods.rules import check_window, exchange
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Signals
from regrow.topology import BlockTopology, TopologyUpdate
from regrow.topology.distribution import check_density


@register("gmp")
@dataclass(frozen=True)
class GMP(Method):
    """Prune the weakest blocks until the density of a cubic schedule is reached; grow none."""

    paper = "Zhu and Gupta, To prune, or not to prune"
    year = 2017
    link = "https://arxiv.org/abs/1710.01878"
    always_sparse = False

    final_density: float = field(default=0.1, metadata={"help": "density at the end; --density is that of the start"})
    begin: float = field(default=0.0, metadata={"help": "share of the training after which pruning begins"})
    end: float = field(default=0.75, metadata={"help": "share of the training after which it is complete"})
    norm: Norm = field(default="l1", metadata={"help": "block norm that ranks blocks for removal"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_density(self.final_density, "final_density")
        check_window(self.begin, self.end)

    def check_layer(self, name: str, topology: BlockTopology) -> None:
        check_starts_denser(name, topology, self.final_density, self.name)

    def density_at(self, progress: float, start: float) -> float:
        return cubic(start, self.final_density, way(progress, self.begin, self.end))

    def allocate(self, layers: Mapping[str, Signals]) -> dict[str, int]:
        return by_layer(layers, self.density_at)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology = signals.topology
        dropped = weakest(block_norm(signals.values, self.norm), topology.n_blocks - signals.n_after)
        return exchange(topology, dropped, dropped.new_empty(0))
