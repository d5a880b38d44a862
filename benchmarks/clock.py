"""The paper's losses on this machine's clock: seconds of sparse over seconds of dense at equal loss.

    python benchmarks/clock.py benchmarks/step-*.json

Loss per model from Dietrich et al. 2021 (arXiv 2108.06277, Fig. 8 and appendix A), seconds per training step from
``regrow bench step --size SIZE --blocks 4,1 --json FILE``. All models of the paper train for the same number of steps,
so the ratio of step times is that of trainings. The dense family is interpolated between its sizes, in the logarithm of
the seconds; "fused" is the same family with this library's fused operations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from regrow.study.pareto import reduction_at_equal_loss

DENSE_LOSS = {"mini": 2.606, "small": 2.310, "medium": 2.115, "base": 1.843}
SPARSE_LOSS = {  # by size and block edge, 90% sparse
    "medium": {16: 2.621, 4: 2.546, 1: 2.408},
    "base": {16: 2.311, 4: 2.272, 1: 2.160},
}


def main(paths: list[str]) -> None:
    """Print the table."""
    steps = [json.loads(Path(path).read_text()) for path in paths]
    of = {step["config"]["size"]: step for step in steps if _whole(step["config"])}
    families = {
        name: [(of[size][f"{name}_seconds"], loss) for size, loss in DENSE_LOSS.items() if size in of]
        for name in ("dense", "dense_fused")
    }
    print("| size | block | seconds a step | over dense at equal loss | over dense, fused |\n|---|---|---|---|---|")
    for size, losses in SPARSE_LOSS.items():
        if size not in of:
            continue
        seconds = {16: of[size]["sparse_seconds"], **{int(b): s for b, s in of[size]["by_block"].items()}}
        for block, loss in losses.items():
            point = seconds[block], loss
            ratios = [reduction_at_equal_loss(point, families[name]) for name in families]
            print(f"| {size} | {block} | {point[0]:.3f} | {' | '.join(map(_shown, ratios))} |")


def _whole(config: dict) -> bool:
    """A whole step of one size, as the paper trains it."""
    return config["dense_size"] is None and not config["encoder_only"] and config["block_size"] == 16


def _shown(ratio: float | None) -> str:
    return "no dense model at hand is as bad" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
