"""How fast the sparse layer is against the dense one, on this machine or its GPU: ``regrow bench kernels``.

Both sides go through autograd and their public layer: ``BlockSparseLinear`` against ``torch.nn.Linear``, forward,
input gradient, weight gradient and bias gradient. ``eps`` is the sparse seconds per FLOP over the dense ones; a sparse
model trains faster at equal loss only if it is below a critical value (Dietrich et al. 2021, arXiv 2108.06277,
appendix A.3).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from regrow.bench.baseline import measured_machine
from regrow.bench.place import Place
from regrow.bench.timing import Task
from regrow.nn import BlockSparseLinear
from regrow.nn.gathered import sparse_linear
from regrow.nn.shape import BlockShape
from regrow.topology import TopologyUpdate

Shape = tuple[int, int]
Block = int | tuple[int, int]

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
    block_size: int | str
    """An edge, or ``"16x1"`` for gathered blocks."""
    dense_seconds: float
    sparse_seconds: float
    speedup: float
    eps: float
    forward_speedup: float
    sparse_gflops: float
    """10^9 FLOPs a second, counting non-zeros only."""
    dense_gflops: float
    index_seconds: float
    """Of rebuilding the index arrays, once per topology update."""


def bench_kernels(
    *,
    shapes: Sequence[Shape] = SHAPES,
    blocks: Sequence[Block] = (1, 4, 8, 16, 32),
    densities: Sequence[float] = (0.1,),
    tokens: Sequence[int] = (4096,),
    rounds: int = 7,
    progress: bool = False,
    place: Place | None = None,
) -> list[Row]:
    """Measure every combination; dense and all sparse variants of a shape take turns in one process.

    A block is an edge, or ``(16, 1)`` for gathered blocks.

    Example:
        >>> [row] = bench_kernels(shapes=[(64, 64)], blocks=[16], densities=[0.5], tokens=[8], rounds=1)
        >>> row.block_size, row.density, row.speedup == row.dense_seconds / row.sparse_seconds
        (16, 0.5, True)
    """
    rows, place = [], place or Place()
    cases = [(shape, n) for shape in shapes for n in tokens]
    for shape, n in tqdm(cases, "measuring", unit="shape", disable=not progress, leave=False):
        rows += _bench_shape(shape, n, blocks, densities, rounds, place)
    return rows


@dataclass(frozen=True)
class PeerRow:
    """Another implementation of the same layer; ``None`` where it has no such pass."""

    layout: str
    in_features: int
    out_features: int
    tokens: int
    density: float
    block_size: int
    forward_seconds: float | None
    seconds: float | None
    dense_seconds: float


def bench_peers(
    *,
    shapes: Sequence[Shape] = SHAPES,
    density: float = 0.1,
    tokens: int = 4096,
    rounds: int = 3,
    place: Place | None = None,
) -> list[PeerRow]:
    """PyTorch's CSR (single elements) and BSR (blocks of 16, on a GPU also 32 and 64) products on the same patterns,
    against dense.

    CSR's backward pass forms a dense weight gradient; BSR has none. The layers of sparseprop and sparselab, both of
    single elements, are measured where these packages are installed.

    Example:
        >>> [row.layout for row in bench_peers(shapes=[(32, 32)], density=0.5, tokens=4, rounds=1)][:2]
        ['torch csr', 'torch bsr']
    """
    rows, place = [], place or Place()
    on: dict[str, Any] = {"device": place.device, "dtype": place.dtype}
    others = [("torch bsr", 32), ("torch bsr", 64)] if place.is_gpu else [("sparseprop", 1), ("sparselab", 1)]
    for in_features, out_features in shapes:
        x, cotangent = place.randn(tokens, in_features), place.randn(tokens, out_features, seed=1)
        dense_step = _step(nn.Linear(in_features, out_features, **on), x, cotangent)
        for layout, b in [("torch csr", 1), ("torch bsr", 16), *others]:
            layer = BlockSparseLinear(in_features, out_features, block_size=b, density=density, **on)
            peer = _peer_layer(layout, layer)
            if peer is not None:
                forward, step = _forward(peer, x), _step(peer, x, cotangent)
            elif layout.startswith("torch"):
                forward, step = _peer_tasks(layout, layer, x, cotangent)
            else:  # not installed
                continue
            tasks = {name: task for name, task in (("forward", forward), ("step", step)) if _works(task)}
            seconds = place.medians({"dense": dense_step, **tasks}, rounds=rounds, recorded=False)
            rows.append(
                PeerRow(
                    layout=layout,
                    in_features=in_features,
                    out_features=out_features,
                    tokens=tokens,
                    density=layer.density,
                    block_size=b,
                    forward_seconds=seconds.get("forward"),
                    seconds=seconds.get("step"),
                    dense_seconds=seconds["dense"],
                )
            )
    return rows


def _peer_layer(layout: str, layer: BlockSparseLinear) -> nn.Module | None:
    """The layer of another package: sparseprop's has the same elements, sparselab's draws as many of its own."""
    shape = layer.in_features, layer.out_features
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore", UserWarning)
        if layout == "sparseprop":
            dense = nn.Linear(*shape)
            dense.weight.data.copy_(layer.to_dense())
            return import_module("sparseprop.modules").SparseLinear.from_dense(dense)
        if layout == "sparselab":
            return import_module("sparselab").SparseLinear(*shape, sparsity=1 - layer.density)
    return None


def _peer_tasks(layout: str, layer: BlockSparseLinear, x: Tensor, cotangent: Tensor) -> tuple[Task, Task]:
    b, dense = layer.block_size, layer.to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "sparse ... is in beta"
        weight = dense.to_sparse_csr() if layout == "torch csr" else dense.to_sparse_bsr((b, b))
    leaf, columns, x_leaf = weight.requires_grad_(), cotangent.t().contiguous(), x.t().contiguous().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return leaf @ x_leaf

    def step() -> None:
        leaf.grad = x_leaf.grad = None
        (leaf @ x_leaf).backward(columns)

    return forward, step


def _works(task: Task) -> bool:
    try:
        task()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _bench_shape(
    shape: Shape, n_tokens: int, blocks: Sequence[Block], densities: Sequence[float], rounds: int, place: Place
) -> list[Row]:
    in_features, out_features = shape
    generator = torch.Generator().manual_seed(0)
    x, cotangent = place.randn(n_tokens, in_features), place.randn(n_tokens, out_features, seed=1)
    on: dict[str, Any] = {"device": place.device, "dtype": place.dtype}
    dense = nn.Linear(in_features, out_features, **on)
    layers = {
        (b, density): sparse_linear(in_features, out_features, block=b, density=density, generator=generator, **on)
        for b in blocks
        for density in densities
    }
    tasks: dict[str, Task] = {}
    for name, layer in {"dense": dense, **{repr(key): layer for key, layer in layers.items()}}.items():
        tasks[f"{name} forward"] = _forward(layer, x)
        tasks[name] = _step(layer, x, cotangent)
    seconds = place.medians(tasks, rounds=rounds)
    updates = {f"{key!r} index": _update(layer) for key, layer in layers.items()}
    seconds |= place.medians(updates, rounds=rounds, recorded=False)
    flops = 6 * n_tokens * in_features * out_features
    dense_seconds = seconds["dense"]
    return [
        Row(
            in_features=in_features,
            out_features=out_features,
            tokens=n_tokens,
            density=layer.density,
            block_size=BlockShape.of(b).label,
            dense_seconds=dense_seconds,
            sparse_seconds=seconds[repr((b, density))],
            speedup=dense_seconds / seconds[repr((b, density))],
            eps=seconds[repr((b, density))] / (layer.density * dense_seconds),
            forward_speedup=seconds["dense forward"] / seconds[f"{(b, density)!r} forward"],
            sparse_gflops=flops * layer.density / seconds[repr((b, density))] / 1e9,
            dense_gflops=flops / dense_seconds / 1e9,
            index_seconds=seconds[f"{(b, density)!r} index"],
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


def _update(layer: BlockSparseLinear) -> Task:
    """A topology update that moves every block to where it is: what it costs does not depend on the moves."""
    rows, cols = layer.topology.coordinates()
    update = TopologyUpdate(torch.arange(rows.numel(), device=rows.device), rows, cols)
    return lambda: layer.topology.reallocate(update)


def write_json(
    rows: Sequence[Row], path: Path, peers: Sequence[PeerRow] = (), *, place: Place | None = None, bandwidth: float
) -> None:
    """The rows with the machine they were measured on, and its roofs.

    ``roofs`` are the highest dense speed that was seen (10^9 FLOPs a second) and the memory's (10^9 bytes a second).
    """
    place = place or Place()
    document = {
        "machine": measured_machine(place),
        "dtype": str(place.dtype).removeprefix("torch."),
        "roofs": {"gflops": max((row.dense_gflops for row in rows), default=0.0), "gigabytes": bandwidth},
        "rows": [asdict(row) for row in rows],
    }
    if peers:
        document["peers"] = [asdict(row) for row in peers]
    path.write_text(json.dumps(document, indent=1) + "\n")


def peer_table(peers: Sequence[PeerRow]) -> str:
    """Speed-ups of other implementations over dense, a line each."""
    lines = ["   in   out tokens density layout      forward + backward over dense"]
    for r in peers:
        speedup = "no backward pass" if r.seconds is None else f"{r.dense_seconds / r.seconds:.2f}x"
        lines.append(f"{r.in_features:5} {r.out_features:5} {r.tokens:6} {r.density:7.3g} {r.layout:11} {speedup}")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """A line per row, and the median of each block size and density over the shapes.

    ``step`` is a forward and backward pass, ``index`` the rebuilding of the indices once per topology update.
    """
    lines = ["   in   out tokens density block speed-up    eps  forward   GF/s  step ms  index ms"]
    lines += [
        f"{r.in_features:5} {r.out_features:5} {r.tokens:6} {r.density:7.3g} {r.block_size:5} {r.speedup:7.2f}x "
        f"{r.eps:6.2f} {r.forward_speedup:7.2f}x {r.sparse_gflops:6.0f} "
        f"{r.sparse_seconds * 1e3:8.2f} {r.index_seconds * 1e3:9.2f}"
        for r in rows
    ]
    lines += ["", "median over shapes (the paper's critical eps: below 2.0 at block 1, below 1.2 at block 16)"]
    for key in dict.fromkeys((round(r.density, 2), r.block_size) for r in rows):
        group = [r for r in rows if (round(r.density, 2), r.block_size) == key]
        speedup, eps = _median(group, lambda r: r.speedup), _median(group, lambda r: r.eps)
        critical = CRITICAL_EPS.get(key[1]) if isinstance(key[1], int) else None
        verdict = "" if critical is None else f"  ({'below' if eps < critical else 'above'} critical {critical})"
        lines.append(f"density {key[0]:<5} block {key[1]:<4} speed-up {speedup:5.2f}x  eps {eps:5.2f}{verdict}")
    return "\n".join(lines)


def _median(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return median(value(row) for row in rows)
