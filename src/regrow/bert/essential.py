"""How many weights of a trained model can be pruned at once, without training, before it breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from regrow.bench.picture import new_figure
from regrow.bert.model import ENCODER
from regrow.bert.output import new_output
from regrow.entries import listed
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, named_sparse_layers
from regrow.nn.linear import check_block_size
from regrow.nn.sparsify import chosen_layers

STEPS = tuple(step / 10 for step in range(10))
"""Sparsities of the sweep: none, .1, .2, ..., .9."""
_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class EssentialSparsity:
    """A sweep of one-shot pruning.

    Args:
        metric: what ``values`` are.
        sparsity: shares of the weights that exist which were pruned.
        density: share of all positions of these weights that is left.
        values: the metric at each.
        knee: see :func:`knee_of`; None where the curve has none.
    """

    metric: str
    sparsity: tuple[float, ...]
    density: tuple[float, ...]
    values: tuple[float, ...]
    knee: float | None

    def __str__(self) -> str:
        lines = [f"{'pruned':>6}  {'density':>7}  held-out {self.metric}"]
        for sparsity, density, value in zip(self.sparsity, self.density, self.values, strict=True):
            knee = "  <- the knee" if sparsity == self.knee else ""
            lines.append(f"{sparsity:6.2f}  {density:7.4f}  {value:.4f}{knee}")
        end = "there is no knee" if self.knee is None else f"essential sparsity (the knee): {self.knee:g}"
        return "\n".join([*lines, end])


@listed(
    "tool",
    "essential",
    paper="Jaiswal et al., The Emergence of Essential Sparsity in Large Pre-trained Models",
    year=2023,
    link="https://arxiv.org/abs/2306.03805",
    always_sparse=True,
    command="regrow evaluate MODEL --essential",
)
@torch.no_grad()
def essential_sparsity(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    *,
    metric: str,
    lower_is_better: bool,
    block_size: int | None = None,
    sparsities: Sequence[float] = STEPS,
    progress: bool = False,
) -> EssentialSparsity:
    r"""Prune the weakest weights of an encoder at once, more and more of them, and find where it begins to hurt.

    The units that are pruned are ranked together over all linear layers of the encoder by the sum of their absolute
    values: the blocks of sparse layers, and single weights of dense ones, or blocks of ``block_size``. At sparsity
    ``s`` the ``round(s * n)`` weakest of ``n`` are zero; there is no training in between. The paper fine-tunes
    after pruning; this measures the pruned model as it is.

    The knee is that of Satopaa et al. 2011 (*Finding a "Kneedle" in a Haystack*): with sparsities ``s`` and what was
    lost ``d`` both scaled to [0, 1], the ``s`` with the greatest ``s - d``, so the point that lies farthest below the
    straight line from the first to the last. There is none if no point does.

    Args:
        model: with a BERT encoder; **its weights are pruned in place**.
        score: of the model, on held-out data.
        metric: its name.
        lower_is_better: whether a lower score is better, as for a loss.
        block_size: edge of the blocks of dense layers that are pruned as one; by default single weights.
        sparsities: ascending, in [0, 1).

    Raises:
        RegrowError: there is no encoder, its layers are of several kinds or block sizes, or an argument is no use.
    """
    if list(sparsities) != sorted(set(sparsities)) or not all(0 <= s < 1 for s in sparsities):
        raise RegrowError(f"sparsities must ascend in [0, 1), got {list(sparsities)}")
    units = _Units(model, block_size)
    values, densities = [], []
    for sparsity in tqdm(sparsities, "pruning", unit="step", leave=False, disable=not progress):
        densities.append(units.prune_(sparsity))
        values.append(score(model))
    lost = [value - values[0] if lower_is_better else values[0] - value for value in values]
    return EssentialSparsity(metric, tuple(sparsities), tuple(densities), tuple(values), knee_of(sparsities, lost))


def knee_of(x: Sequence[float], lost: Sequence[float]) -> float | None:
    """Where a loss that grows with ``x`` begins to grow fast; see :func:`essential_sparsity`.

    Example:
        >>> knee_of([0.0, 0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.1, 1.0, 2.0])
        0.2
        >>> knee_of([0.0, 0.5, 1.0], [0.0, 1.0, 2.0]) is None  # a straight line
        True
    """
    width, height = x[-1] - x[0], lost[-1] - lost[0]
    if not (width > 0 and height > 0):  # NaN, too
        return None
    below = [(a - x[0]) / width - (b - lost[0]) / height for a, b in zip(x, lost, strict=True)]
    best = max(range(len(below)), key=below.__getitem__)
    return x[best] if below[best] > 1e-9 else None


def plot_sweep(found: EssentialSparsity, path: Path) -> None:
    """A picture of the sweep, with the knee.

    Raises:
        RegrowError: matplotlib is not installed, the file exists, or its format is unknown.
    """
    check_format(path)
    figure = new_figure(6, 4)
    axes = figure.add_subplot(xlabel="share of the weights pruned at once", ylabel=f"held-out {found.metric}")
    axes.plot(found.sparsity, found.values, marker="o")
    if found.knee is not None:
        axes.axvline(found.knee, color="grey", linestyle="--")
        axes.annotate(f" knee {found.knee:g}", (found.knee, max(found.values)), va="top")
    with new_output(path) as aside:
        figure.savefig(aside, format=path.suffix[1:])


def check_format(path: Path) -> None:
    """Raise :class:`RegrowError` unless a picture can be written in the format of that name."""
    if path.suffix not in _FORMATS:
        raise RegrowError(f"--plot {path} must end with {', '.join(_FORMATS)}")


class _Units:
    """The units of a model that are pruned, as one ranking from the weakest to the strongest."""

    def __init__(self, model: nn.Module, block_size: int | None) -> None:
        sparse = dict(named_sparse_layers(model))
        if sparse and block_size is not None:
            raise RegrowError("a sparse model is pruned by its own blocks; leave the block size out")
        dense = {} if sparse else chosen_layers(model, f"*{ENCODER.removeprefix('bert.')}")
        self.layers: list[nn.Module] = list((sparse or dense).values())
        if not self.layers:
            raise RegrowError("there is no encoder with linear layers in the model")
        self.block = block_size or 1
        for layer in dense.values():
            check_block_size(layer.in_features, layer.out_features, self.block)
        if len({layer.block_size for layer in sparse.values()}) > 1:
            raise RegrowError("blocks of several sizes cannot be ranked together")
        norms = [norms.flatten() for norms in self._norms()]
        self.sizes = [len(of_layer) for of_layer in norms]
        self.order = torch.argsort(torch.cat(norms), stable=True)
        self.positions = sum(self._positions(layer) for layer in self.layers)

    def prune_(self, sparsity: float) -> float:
        """Zero so many that this share is zero; more than before, never fewer. Returns the density that is left."""
        count = round(sparsity * len(self.order))
        doomed = torch.zeros(len(self.order), dtype=torch.bool)
        doomed[self.order[:count]] = True
        for layer, part in zip(self.layers, doomed.split(self.sizes), strict=True):
            if isinstance(layer, BlockSparseLinear):
                layer.values.data[part.to(layer.values.device)] = 0
            else:
                grid = self._grid(layer)
                grid.masked_fill_(part.view(grid.shape[0], 1, grid.shape[2], 1).to(grid.device), 0.0)
        return (len(self.order) - count) / self.positions

    def _norms(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, BlockSparseLinear):
                yield layer.values.data.abs().sum((1, 2)).cpu()
            else:
                yield self._grid(layer).abs().sum((1, 3)).cpu()

    def _grid(self, layer: nn.Module) -> Tensor:
        """A view ``[rows, b, cols, b]`` of a dense weight."""
        weight, b = layer.get_parameter("weight").data, self.block
        return weight.view(weight.shape[0] // b, b, weight.shape[1] // b, b)

    def _positions(self, layer: nn.Module) -> int:
        if isinstance(layer, BlockSparseLinear):
            return layer.topology.n_positions
        grid = self._grid(layer)
        return grid.shape[0] * grid.shape[2]
