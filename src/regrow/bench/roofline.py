"""Where the measured layers stand between the memory and the arithmetic of the machine.

A training step of a sparse layer with density ``d`` takes ``6 * tokens * d * in * out`` FLOPs and must move, at least,
the activations three times (forward, input gradient, weight gradient): ``3 * 4 * tokens * (in + out)`` bytes in
float32. At a tenth of the density it moves the same bytes for a tenth of the arithmetic; that is why it meets the
memory's roof where a dense layer does not (S. Williams, A. Waterman, D. Patterson, *Roofline*, CACM 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from regrow.bench.kernels import Row
from regrow.bench.picture import new_figure
from regrow.bench.place import Place
from regrow.nn.shape import BlockShape


def intensity(row: Row, size: int = 4) -> float:
    """FLOPs per byte of a training step that moves the activations three times and the weights not at all.

    Args:
        size: bytes of a number.

    Example:
        >>> row = Row(512, 512, 4096, 0.5, 16, *[1.0] * 8)
        >>> intensity(row)
        64.0
    """
    return 2 * row.density * row.in_features * row.out_features / (size * (row.in_features + row.out_features))


def memory_bandwidth(place: Place | None = None) -> float:
    """10^9 bytes a second, read and written, of PyTorch copying an array that fits no private cache."""
    place = place or Place()
    source = torch.ones((_GPU_BYTES if place.is_gpu else _CPU_BYTES) // 4, device=place.device)
    target = torch.empty_like(source)
    seconds = place.medians({"copy": lambda: target.copy_(source)}, rounds=7)["copy"]
    return 2 * source.numel() * source.element_size() / seconds / 1e9


_CPU_BYTES, _GPU_BYTES = 1 << 26, 1 << 30


def plot(rows: Sequence[Row], bandwidth: float, path: Path, *, size: int = 4) -> None:
    """Draw the roofline: measured speed over FLOPs per byte, a colour per block size, dense in black.

    Raises:
        RegrowError: matplotlib is not installed.
    """
    figure = new_figure(7, 4.5)
    peak = max(row.dense_gflops for row in rows)
    axes = figure.subplots()
    grid = [1.0, peak / bandwidth, 1000.0]
    axes.plot(
        grid, [min(peak, bandwidth * x) for x in grid], color="grey", label=f"{bandwidth:.0f} GB/s, {peak:.0f} GF/s"
    )
    dense = [(intensity(row, size) / row.density, row.dense_gflops) for row in rows]
    axes.scatter(*zip(*dense, strict=True), color="black", marker="s", s=18, label="dense")
    for b in sorted({row.block_size for row in rows}, key=lambda b: BlockShape.parse(str(b))):
        points = [(intensity(row, size), row.sparse_gflops) for row in rows if row.block_size == b]
        axes.scatter(*zip(*points, strict=True), s=22, label=f"block {b}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="10^9 FLOPs a second (non-zeros)")
    axes.set_title("Forward + backward of one layer")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
