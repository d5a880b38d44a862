"""Which block size and density pay off on this machine: ``regrow advise``."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from regrow.bench.kernels import Shape, bench_kernels
from regrow.nn.speed import LayerSpeed, known_speeds, store_speeds

_LOW, _HIGH = 0.05, 0.4
"""The two densities a line is drawn through."""


def advise(
    shapes: Sequence[Shape],
    *,
    blocks: Sequence[int] = (1, 4, 8, 16, 32),
    tokens: int = 4096,
    rounds: int = 5,
    progress: bool = False,
) -> list[LayerSpeed]:
    """Speeds of the shapes at the block sizes that divide them; measures what is not known yet and stores it."""
    known = {(s.in_features, s.out_features, s.block_size): s for s in known_speeds() if s.tokens == tokens}
    wanted = [(shape, b) for shape in dict.fromkeys(shapes) for b in blocks if not (shape[0] % b or shape[1] % b)]
    missing: dict[Shape, list[int]] = {}
    for shape, b in wanted:
        if (*shape, b) not in known:
            missing.setdefault(shape, []).append(b)
    for shape, sizes in tqdm(missing.items(), "measuring", unit="shape", disable=not progress, leave=False):
        measured = _measure(shape, sizes, tokens, rounds)
        store_speeds(measured)
        known |= {(s.in_features, s.out_features, s.block_size): s for s in measured}
    return [known[(*shape, b)] for shape, b in wanted]


def _measure(shape: Shape, blocks: Sequence[int], tokens: int, rounds: int) -> list[LayerSpeed]:
    rows = bench_kernels(shapes=[shape], blocks=blocks, densities=[_LOW, _HIGH], tokens=[tokens], rounds=rounds)
    speeds = []
    for b in blocks:
        low, high = sorted((row for row in rows if row.block_size == b), key=lambda row: row.density)
        slope = (high.sparse_seconds - low.sparse_seconds) / (high.density - low.density)
        fixed = low.sparse_seconds - slope * low.density
        speeds.append(LayerSpeed(*shape, b, tokens, low.dense_seconds, fixed, slope))
    return speeds


def table(speeds: Sequence[LayerSpeed], densities: Sequence[float] = (0.5, 0.25, 0.1, 0.05)) -> str:
    """A line per layer shape and block size: break-even sparsity and the expected speed-up at some densities."""
    head = f"{'in':>5} {'out':>5} {'block':>5} {'break-even sparsity':>20}" + "".join(
        f" {f'at {d}':>8}" for d in densities
    )
    lines = [head]
    for s in speeds:
        wins = f"{1 - s.break_even_density:.0%}" if s.break_even_density > 0 else "never"
        lines.append(
            f"{s.in_features:5} {s.out_features:5} {s.block_size:5} {wins:>20}"
            + "".join(f" {s.speedup(density):7.2f}x" for density in densities)
        )
    return "\n".join([*lines, "(expected speed-up of a layer's training step over dense, by density of blocks)"])
