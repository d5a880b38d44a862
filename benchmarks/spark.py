"""How fast chosen rows are multiplied: Spark's feed-forward half, and dense layers that skip columns of their input.

    OMP_NUM_THREADS=1 python benchmarks/spark.py

One thread. What is compared takes turns; medians of the thread's own CPU time, which others on the machine disturb less
than the clock on the wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.allocator import keep_freed_memory
from regrow.kernels.gather import copy_table, gather_sum, top_columns
from regrow.nn import SparkFFN

TOKENS = 2048
ROUNDS = 21


def medians(jobs: Mapping[str, Callable[[], object]], calls: int = 1) -> dict[str, float]:
    """Milliseconds of a call."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            job()
            begin = time.thread_time()
            for _ in range(calls):
                job()
            times[name].append((time.thread_time() - begin) / calls * 1e3)
    return {name: median(found) for name, found in times.items()}


def spark(hidden: int, intermediate: int) -> None:
    """A half against two dense layers with a GELU between."""
    first, second = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)
    half, x, g = SparkFFN(hidden, intermediate), torch.randn(TOKENS, hidden, requires_grad=True), torch.randn(TOKENS, 1)
    dense = nn.Sequential(first, nn.GELU(), second)

    @torch.no_grad()
    def forward(layer: nn.Module) -> None:
        layer(x)

    def training(layer: nn.Module) -> None:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], g.expand(-1, hidden).contiguous())

    found = medians(
        {
            f"{work.__name__} {kind}": partial(work, layer)
            for work in (forward, training)
            for kind, layer in (("dense", dense), ("spark", half))
        }
    )
    flops = half.flops(TOKENS)
    whole = 4 * TOKENS * hidden * intermediate
    for name, ratio in (
        ("forward", whole / flops[0]),
        ("training", 3 * whole / (sum(flops) + half.recomputed_flops(TOKENS))),
    ):
        ours, theirs = found[f"{name} spark"], found[f"{name} dense"]
        print(
            f"{hidden}/{intermediate} {name}: dense {theirs:.1f} ms, spark {ours:.1f} ms, "
            f"FLOPs {ratio:.2f}x, time {theirs / ours:.2f}x"
        )


@torch.inference_mode()
def skipping(in_features: int, out_features: int, tokens: int) -> None:
    """A dense layer against the columns that WINA keeps, their choice included."""
    layer, x = nn.Linear(in_features, out_features), torch.randn(tokens, in_features)
    norms, table = layer.weight.norm(dim=0), layer.weight.T.contiguous()
    copied = copy_table(table)

    def skipped(keep: float) -> Tensor:
        lists, numbers = top_columns(x, norms, round(keep * in_features))
        return gather_sum(lists, numbers, table, copied=copied, start=layer.bias)

    jobs = {
        "dense": partial(F.linear, x, layer.weight, layer.bias),
        "0.3": partial(skipped, 0.3),
        "0.5": partial(skipped, 0.5),
    }
    found = medians(jobs, calls=max(1, 2_000_000_000 // (in_features * out_features * tokens * 100)))
    cells = [f"{found[keep] * 1e3:.0f} us ({found['dense'] / found[keep]:.2f}x)" for keep in ("0.3", "0.5")]
    print(
        f"{in_features}x{out_features}, 1x{tokens}: dense {found['dense'] * 1e3:.0f} us, "
        f"keep .3 {cells[0]}, .5 {cells[1]}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    for shape in ((768, 3072), (512, 2048)):
        spark(*shape)
    for shape in ((768, 768), (768, 3072), (3072, 768)):
        for tokens in (1, 16, 64, 128):
            skipping(*shape, tokens)
