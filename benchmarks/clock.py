"""Losses on this machine's clock: seconds of sparse over seconds of dense at equal loss.

    python benchmarks/clock.py benchmarks/step-*.json
    python benchmarks/clock.py --records studies/cpu benchmarks/step-2-*.json

Seconds per training step come from ``regrow bench step --size SIZE --blocks 4,1 --json FILE``; losses from Dietrich et
al. 2021 (arXiv 2108.06277, Fig. 8 and appendix A), or from records of runs. All models of a comparison train for the
same number of steps, so the ratio of step times is that of trainings. The dense family is interpolated between its
sizes, in the logarithm of the seconds; "fused" is the same family with this library's fused operations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from regrow.study.analysis import configurations
from regrow.study.pareto import reduction_at_equal_loss
from regrow.study.runs import read_runs

DENSE_LOSS = {"mini": 2.606, "small": 2.310, "medium": 2.115, "base": 1.843}
SPARSE_LOSS = {  # by size and block edge, 90% sparse
    "medium": {16: 2.621, 4: 2.546, 1: 2.408},
    "base": {16: 2.311, 4: 2.272, 1: 2.160},
}


Losses = tuple[dict[str, float], dict[str, dict[int, float]]]
"""Of dense models by size, of sparse ones by size and block edge."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", type=Path, help="files of regrow bench step")
    parser.add_argument("--records", type=Path, help="folder of runs to take losses from, instead of the paper's")
    asked = parser.parse_args()
    dense, sparse = (DENSE_LOSS, SPARSE_LOSS) if asked.records is None else losses_of(asked.records)
    of = {(step := json.loads(path.read_text()))["config"]["size"]: step for path in asked.steps if _whole(path)}
    families = {
        name: [(of[size][f"{name}_seconds"], loss) for size, loss in dense.items() if size in of]
        for name in ("dense", "dense_fused")
    }
    print("| size | block | loss | seconds a step | over dense at equal loss | over dense, fused |")
    print("|---" * 6 + "|")
    for size in (size for size in sparse if size in of):
        seconds = {of[size]["config"]["block_size"]: of[size]["sparse_seconds"]}
        seconds |= {int(block): value for block, value in of[size].get("by_block", {}).items()}
        for block, loss in sorted(sparse[size].items(), reverse=True):
            if block in seconds:
                ratios = [
                    _shown(reduction_at_equal_loss((seconds[block], loss), family)) for family in families.values()
                ]
                print(f"| {size} | {block} | {loss:.3f} | {seconds[block]:.4f} | {' | '.join(ratios)} |")


def losses_of(folder: Path) -> Losses:
    """Mean held-out losses of dense runs, and of DynSparse at 90% sparsity with the options a study has by default."""
    dense: dict[str, float] = {}
    sparse: dict[str, dict[int, float]] = {}
    plain = {"n_updates": 40, "drop_fraction": 0.5, "lr_scale": 0.5, "norm": "l1", "group_lasso": 0.0}
    for c in configurations(read_runs([folder])[0]):
        if c.loss is None or any(c.get(name) not in (value, None) for name, value in plain.items()):
            continue
        if c.first.dense:
            dense[c.get("size")] = c.loss.mean
        elif c.get("method") == "dynsparse" and c.sparsity == 0.9:
            sparse.setdefault(c.get("size"), {})[c.get("block_size")] = c.loss.mean
    return dense, sparse


def _whole(path: Path) -> bool:
    """A whole step of one size."""
    config = json.loads(path.read_text())["config"]
    return config["dense_size"] is None and not config["encoder_only"]


def _shown(ratio: float | None) -> str:
    return "no dense model at hand is as bad" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    main()
