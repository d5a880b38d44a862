"""How fast the sparse layer is against the dense one, on this machine: ``regrow bench kernels``.

Both sides go through autograd and their public layer: ``BlockSparseLinear`` against ``torch.nn.Linear``, forward,
input gradient, weight gradient and bias gradient. ``eps`` is the sparse seconds per FLOP over the dense ones; a sparse
model trains faster at equal loss only if it is below a critical value (Dietrich et al. 2021, arXiv 2108.06277,
appendix A.3).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from regrow.bench.timing import Task, interleaved_medians
from regrow.kernels.machine import describe_machine
from regrow.nn import BlockSparseLinear

Shape = tuple[int, int]

SHAPES: tuple[Shape, ...] = ((512, 512), (512, 2048), (2048, 512), (768, 768), (768, 3072), (3072, 768))
"""(in_features, out_features) of BERT-Small's and BERT-Base's encoder layers."""

CRITICAL_EPS = {1: 2.0, 16: 1.2}
"""Below these BERT-Base trains faster sparse than dense at equal loss (the paper's appendix A.3)."""


@dataclass(frozen=True)
class Row:
    """One layer measured; seconds are medians of a forward and backward pass."""

    in_features: int
    out_features: int
    tokens: int
    density: float
    block_size: int
    dense_seconds: float
    sparse_seconds: float
    speedup: float
    eps: float
    forward_speedup: float
    sparse_gflops: float
    """10^9 FLOPs a second, counting non-zeros only."""
    dense_gflops: float


def bench_kernels(
    *,
    shapes: Sequence[Shape] = SHAPES,
    blocks: Sequence[int] = (1, 4, 8, 16, 32),
    densities: Sequence[float] = (0.1,),
    tokens: Sequence[int] = (4096,),
    rounds: int = 7,
    progress: bool = False,
) -> list[Row]:
    """Measure every combination; dense and all sparse variants of a shape take turns in one process.

    Example:
        >>> [row] = bench_kernels(shapes=[(64, 64)], blocks=[16], densities=[0.5], tokens=[8], rounds=1)
        >>> row.block_size, row.density, row.speedup == row.dense_seconds / row.sparse_seconds
        (16, 0.5, True)
    """
    rows = []
    cases = [(shape, n) for shape in shapes for n in tokens]
    for shape, n in tqdm(cases, "measuring", unit="shape", disable=not progress, leave=False):
        rows += _bench_shape(shape, n, blocks, densities, rounds)
    return rows


def _bench_shape(
    shape: Shape, n_tokens: int, blocks: Sequence[int], densities: Sequence[float], rounds: int
) -> list[Row]:
    in_features, out_features = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, in_features, generator=generator)
    cotangent = torch.randn(n_tokens, out_features, generator=generator)
    dense = nn.Linear(in_features, out_features)
    layers = {
        (b, density): BlockSparseLinear(in_features, out_features, block_size=b, density=density, generator=generator)
        for b in blocks
        for density in densities
    }
    tasks: dict[str, Task] = {}
    for name, layer in {"dense": dense, **{repr(key): layer for key, layer in layers.items()}}.items():
        tasks[f"{name} forward"] = _forward(layer, x)
        tasks[name] = _step(layer, x, cotangent)
    seconds = interleaved_medians(tasks, rounds=rounds)
    flops = 6 * n_tokens * in_features * out_features
    dense_seconds = seconds["dense"]
    return [
        Row(
            in_features=in_features,
            out_features=out_features,
            tokens=n_tokens,
            density=layer.density,
            block_size=b,
            dense_seconds=dense_seconds,
            sparse_seconds=seconds[repr((b, density))],
            speedup=dense_seconds / seconds[repr((b, density))],
            eps=seconds[repr((b, density))] / (layer.density * dense_seconds),
            forward_speedup=seconds["dense forward"] / seconds[f"{(b, density)!r} forward"],
            sparse_gflops=flops * layer.density / seconds[repr((b, density))] / 1e9,
            dense_gflops=flops / dense_seconds / 1e9,
        )
        for (b, density), layer in layers.items()
    ]


def _forward(layer: nn.Module, x: Tensor) -> Task:
    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def _step(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Task:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        layer.zero_grad(set_to_none=True)
        layer(leaf).backward(cotangent)

    return run


def write_json(rows: Sequence[Row], path: Path) -> None:
    """The rows with the machine they were measured on."""
    path.write_text(json.dumps({"machine": describe_machine(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """A line per row, and the median of each block size and density over the shapes."""
    lines = ["   in   out tokens density block speed-up    eps  forward   GF/s"]
    lines += [
        f"{r.in_features:5} {r.out_features:5} {r.tokens:6} {r.density:7.3g} {r.block_size:5} {r.speedup:7.2f}x "
        f"{r.eps:6.2f} {r.forward_speedup:7.2f}x {r.sparse_gflops:6.0f}"
        for r in rows
    ]
    lines += ["", "median over shapes (the paper's critical eps: below 2.0 at block 1, below 1.2 at block 16)"]
    for key in dict.fromkeys((round(r.density, 2), r.block_size) for r in rows):
        group = [r for r in rows if (round(r.density, 2), r.block_size) == key]
        speedup, eps = _median(group, lambda r: r.speedup), _median(group, lambda r: r.eps)
        critical = CRITICAL_EPS.get(key[1])
        verdict = "" if critical is None else f"  ({'below' if eps < critical else 'above'} critical {critical})"
        lines.append(f"density {key[0]:<5} block {key[1]:<3} speed-up {speedup:5.2f}x  eps {eps:5.2f}{verdict}")
    return "\n".join(lines)


def _median(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return median(value(row) for row in rows)
