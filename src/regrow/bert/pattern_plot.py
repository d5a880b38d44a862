"""Pictures of where the blocks of saved layers are: a panel a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from regrow.bench.picture import new_figure
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear

EDGE = 64
"""Most cells of a panel along a side; larger layers are binned."""
FORMATS = (".png", ".svg", ".pdf")

_PLACES = {  # of a layer's weights in the encoders of the BERT family, in the order of the forward pass
    "attention.self.query": "Q",
    "attention.self.key": "K",
    "attention.self.value": "V",
    "attention.output.dense": "O",
    "intermediate.dense": "FFN1",
    "output.dense": "FFN2",
}
_WRAP = 6  # panels side by side, of models whose layers have other names
_PANEL = 1.75  # inches
_PATIENCE = 2  # seconds before a progress bar appears


@torch.no_grad()
def pattern(layer: BlockSparseLinear, edge: int = EDGE) -> Tensor:
    r"""Root mean square of the weight in each cell of a grid of at most ``edge x edge``, absent blocks being zeros.

    :math:`\sqrt{\sum w^2 / n}` over the ``n`` elements of the weight in a cell; where a cell is one block, its
    Frobenius norm over ``b``. So cells of all sizes compare.

    Returns:
        float64 ``[rows, columns]``; NaN where there is no block, infinity where one holds NaN.

    Example:
        >>> layer = BlockSparseLinear(32, 16, block_size=16, density=0.5)
        >>> layer.topology.set_coordinates(torch.tensor([0]), torch.tensor([1]))
        >>> _ = layer.values.data.fill_(-2)
        >>> pattern(layer).tolist()
        [[nan, 2.0]]
    """
    topology = layer.topology
    shape = topology.n_block_rows, topology.n_block_cols
    n_rows, n_cols = (min(edge, n) for n in shape)
    rows, cols = (index.cpu() for index in topology.coordinates())
    cells = (rows * n_rows // shape[0]) * n_cols + cols * n_cols // shape[1]
    squares = torch.linalg.vector_norm(layer.values.cpu(), dim=(1, 2), dtype=torch.float64).square()
    sums = torch.bincount(cells, weights=squares, minlength=n_rows * n_cols).view(n_rows, n_cols)
    blocks = torch.bincount(cells, minlength=n_rows * n_cols).view(n_rows, n_cols)
    height, width = (
        torch.bincount(torch.arange(n) * cut // n, minlength=cut)
        for n, cut in zip(shape, (n_rows, n_cols), strict=True)
    )
    rms = (sums / (height[:, None] * width * layer.block_shape.numbers)).sqrt()
    return torch.where(blocks == 0, torch.nan, torch.where(rms.isnan(), torch.inf, rms))


def grid_of(names: Sequence[str]) -> tuple[list[list[str | None]], bool]:
    """Where each layer's panel goes, and whether rows and columns have a meaning.

    Encoders of the BERT family get a row per layer and the columns Q, K, V, O, FFN1, FFN2, as far as chosen; other
    models are wrapped in their own order.

    Example:
        >>> grid_of(["bert.encoder.layer.3.output.dense", "bert.encoder.layer.3.attention.self.query"])
        ([['bert.encoder.layer.3.attention.self.query', 'bert.encoder.layer.3.output.dense']], True)
        >>> grid_of(["head", "body"])
        ([['head', 'body']], False)
    """
    places = {name: place for name in names if (place := _place(name)) is not None}
    if len(places) < len(names):
        width = min(len(names), max(_WRAP, math.isqrt(len(names))))
        padded = [*names, *[None] * (-len(names) % width)]
        return [padded[start : start + width] for start in range(0, len(padded), width)], False
    by_place = {place: name for name, place in places.items()}
    rows = sorted({row for row, _ in by_place})
    columns = [column for column in _PLACES.values() if any(other == column for _, other in by_place)]
    return [[by_place.get((row, column)) for column in columns] for row in rows], True


def check_can_draw(path: Path) -> None:
    """Raise before long work what :func:`plot_patterns` would raise after it.

    Raises:
        RegrowError: matplotlib is not installed, or the name has not the ending of a picture.
    """
    if path.suffix.lower() not in FORMATS:
        raise RegrowError(f"{path}: a picture ends in one of {', '.join(FORMATS)}")
    new_figure(1, 1)


def plot_patterns(layers: Mapping[str, BlockSparseLinear], path: Path, *, title: str = "") -> None:
    """Draw every layer: outputs downwards, inputs to the right, white where no block is, darker for larger weights.

    All panels share one scale, which ends at the 99th percentile of the cells.

    Args:
        layers: by qualified name.
        path: a ``.png``, ``.svg`` or ``.pdf`` file.
        title: of the whole picture.

    Raises:
        RegrowError: as :func:`check_can_draw`.
    """
    check_can_draw(path)
    grid, is_encoder = grid_of(list(layers))
    figure = new_figure(max(_PANEL * len(grid[0]), 4) + 0.9, _PANEL * len(grid) + 0.9)
    panels = figure.subplots(len(grid), len(grid[0]), squeeze=False)
    named = tqdm(layers.items(), desc="reading patterns", leave=False, delay=_PATIENCE)
    pictures = {name: pattern(layer) for name, layer in named}
    largest = _largest(list(pictures.values()))
    image = None
    cells = [(axes, name) for row, line in zip(panels, grid, strict=True) for axes, name in zip(row, line, strict=True)]
    for axes, name in tqdm(cells, desc="drawing", leave=False, delay=_PATIENCE):
        axes.set(xticks=[], yticks=[])
        if name is None:
            axes.set_frame_on(False)
            continue
        options = {"vmin": 0, "vmax": largest, "cmap": "viridis_r", "aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(pictures[name].numpy(), **options)
        axes.set_title(_title(name, layers[name], is_encoder), fontsize=8, parse_math=False)
    if is_encoder:
        for row, line in zip(panels, grid, strict=True):
            number = next(place[0][1] for name in line if name is not None and (place := _place(name)))
            row[0].set_ylabel(f"layer {number}", fontsize=9)
    figure.colorbar(image, ax=panels, label="root mean square of the weights in a cell", shrink=min(1, 3 / len(grid)))
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.supxlabel("inputs to the right, outputs downwards; white: no block", fontsize=8)
    figure.savefig(path, dpi=120)


def _place(name: str) -> tuple[tuple[str, int], str] | None:
    """``((what comes before the number, number of the layer), column)`` in an encoder of the BERT family."""
    match = re.fullmatch(r"(.*\.|)layer\.(\d{1,9})\.(.+)", name)
    if match is None or match[3] not in _PLACES:
        return None
    return (match[1], int(match[2])), _PLACES[match[3]]


def _title(name: str, layer: BlockSparseLinear, is_encoder: bool) -> str:
    place = _place(name)
    label = place[1] if is_encoder and place else ".".join(name.split(".")[-3:])[-28:]
    return f"{label}  {layer.out_features} x {layer.in_features}"


def _largest(pictures: Sequence[Tensor]) -> float:
    cells = torch.cat([picture.flatten() for picture in pictures])
    cells = cells[cells.isfinite()].sort().values
    return float(cells[int(0.99 * (len(cells) - 1))]) or 1.0 if len(cells) else 1.0
