"""GraNet: gradual pruning that regrows a part by gradient. Dense at first, and its gradient too: not always sparse.

S. Liu, T. Chen, X. Chen, Z. Atashgahi, L. Yin, H. Kou, L. Shen, M. Pechenizkiy, Z. Wang, D. C. Mocanu, *Sparse Training
via Boosting Pruning Plasticity with Neuroregeneration*, NeurIPS 2021, https://arxiv.org/abs/2106.10404. There: from a
density of .5 or 1, an update every 100 (ImageNet: 4,000) steps, a share of .5, cosine.

At an update the weakest blocks of the whole model go until its density is that of GMP's cubic
(:mod:`regrow.methods.gmp`); each layer keeps at least one block. Then every layer prunes the schedule's fraction of
what it has left, again the weakest, and grows as many blocks where the gradient is largest, at zero. One that is
dropped and grown again stays as it is. When the density has arrived, this is RigL. The gradient is seen as with
``rigl``: in pieces, and on update steps only.

Six blocks on 2 x 3 positions at the middle of the pruning time, ``final_density=3/7``: three stay,
``round((3/7 + 4/7 * 1/8) * 6)``. Of magnitudes 5, 1, 4, 2, 6, 3 these are 5, 4 and 6. A share of 1/3 is one block more,
the 4 in slot 2. Of the positions that are free now, 1, 2, 3 and 5, the gradient is largest at 1: the block in slot 1
was to go and is grown again, so it just stays. Slots 2, 3 and 5 go:

    >>> import torch
    >>> from dataclasses import replace
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Gradient, Signals, create
    >>> rows, cols = [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]
    >>> topology = BlockTopology.from_coordinates(rows, cols, n_block_rows=2, n_block_cols=3)
    >>> values = torch.tensor([5.0, -1.0, -4.0, 2.0, 6.0, 3.0]).view(6, 1, 1)
    >>> gradient = Gradient(torch.tensor([[0.0, 9.0, 1.0], [7.0, 0.0, 3.0]]), torch.eye(2), block_size=1)
    >>> signals = Signals(values, topology, 1 / 3, torch.Generator(), progress=0.375)
    >>> granet = create("granet", final_density=3 / 7)
    >>> granet.allocate({"layer": signals})
    {'layer': 3}
    >>> update = granet.propose(replace(signals, target=3, gradient=gradient))
    >>> sorted(update.slots.tolist()), update.rows.tolist()
    ([2, 3, 5], [])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regrow.methods.base import LayerSize, Method, register
from regrow.methods.density import by_norm, check_model_starts_denser, cubic, way
from regrow.methods.rules import check_window, exchange_keeping, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, weakest
from regrow.methods.signals import Signals
from regrow.topology import BlockTopology, TopologyUpdate
from regrow.topology.distribution import check_density


@register("granet")
@dataclass(frozen=True)
class GraNet(Method):
    """Prune along a cubic, and at each update exchange weak blocks for those of the largest dense gradient."""

    paper = "Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration"
    year = 2021
    link = "https://arxiv.org/abs/2106.10404"
    always_sparse = False
    needs_gradient = True

    final_density: float = field(default=0.1, metadata={"help": "density at the end; --density is that of the start"})
    begin: float = field(default=0.0, metadata={"help": "share of the training after which pruning begins"})
    end: float = field(default=0.75, metadata={"help": "share of the training after which it is complete"})
    norm: Norm = field(default="l1", metadata={"help": "block norm of values and gradients"})

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_density(self.final_density, "final_density")
        check_window(self.begin, self.end)

    def check_layers(self, layers: Mapping[str, BlockTopology]) -> None:
        check_model_starts_denser(layers, self.final_density, self.name)

    def density_at(self, progress: float, start: float) -> float:
        return cubic(start, self.final_density, way(progress, self.begin, self.end))

    def allocate(self, layers: Mapping[str, Signals]) -> dict[str, int]:
        return by_norm(layers, self.density_at, self.norm)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        assert signals.gradient is not None
        topology, exchanged = signals.topology, round(signals.fraction * signals.n_after)
        n_dropped = topology.n_blocks - signals.n_after + exchanged
        dropped = weakest(block_norm(signals.values, self.norm), n_dropped)
        kept = keys_without(topology, dropped)
        positions = signals.gradient.strongest(exchanged, excluded=kept, norm=self.norm)
        return exchange_keeping(topology, dropped, positions)

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        return layer.dense_gradient_flops(tokens)
