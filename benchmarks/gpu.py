"""What is to be known of a GPU, in one go of under ten minutes: is it right, how fast, and what would be faster.

    python benchmarks/gpu.py results/

Needs a CUDA GPU and no compiled CPU kernels: ``PYTHONPATH=src python benchmarks/gpu.py results/`` runs from a checkout.
Each part writes a file of its own and failures do not stop the others:

- ``correct.json``: the worst error of the three products against float64, beside that of dense products in the same
  dtype, for all shapes of BERT Mini to Large, all block sizes and dtypes.
- ``plans.json``: seconds of every product for many ways to cut it (:class:`regrow.kernels.gpu.Plan`), at the first
  shape of ``kernels.json``: the best ones are to become the defaults.
- ``kernels.json``: ``regrow bench kernels``, 16384 tokens, bf16, density .1, with PyTorch's own sparse layouts.
- ``step.json``: ``regrow bench step`` of BERT-Base at density .1 and blocks of 16, all models through torch.compile.
- ``pretrain.json``: ``regrow pretrain`` of the same model on made-up text, not compiled, and its steps alone
  (``step_uncompiled.json``): tokens a second of both, and in which share of pre-training kernels run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from regrow import BlockSparseLinear
from regrow.bench.kernels import bench_kernels, bench_peers, peer_table, table, write_json
from regrow.bench.place import Place
from regrow.bench.roofline import memory_bandwidth
from regrow.errors import RegrowError
from regrow.kernels import gpu, sddmm, spmm, spmm_t

HIDDEN = {"mini": 256, "small": 512, "base": 768, "large": 1024}
SHAPES = ((768, 3072), (1024, 4096))
BLOCKS = (1, 4, 8, 16, 32, 64)
TOKENS, DENSITY, STEPS = 16384, 0.1, 100


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--only", help="one of correct, kernels, step, pretrain, plans")
    parser.add_argument("--minutes", type=float, default=4.0, help="for the plans")
    asked = parser.parse_args()
    try:
        place = Place.named("cuda")
    except RegrowError as error:
        parser.error(str(error))
    asked.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[Path], None]] = {
        "correct": lambda path: correct(place, path),
        "kernels": lambda path: kernels(place, path),
        "step": step,
        "pretrain": pretraining,
        "plans": lambda path: plans(place, path, asked.minutes),
    }
    failed = 0
    for name, part in parts.items():
        if asked.only not in (None, name):
            continue
        started = time.perf_counter()
        try:
            part(asked.output / f"{name}.json")
        except Exception:
            failed += 1
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return failed


# ---- is it right ------------------------------------------------------------------------------------


def correct(place: Place, path: Path) -> None:
    """Worst errors as shares of the largest exact number, ours and dense ones in the same dtype."""
    rows = []
    shapes = sorted({shape for h in HIDDEN.values() for shape in ((h, h), (h, 4 * h), (4 * h, h))})
    cases = list(itertools.product(shapes, BLOCKS, gpu.DTYPES))
    for (inputs, outputs), b, dtype in tqdm(cases, "checking", unit="case", leave=False):
        row = {"in": inputs, "out": outputs, "block": b, "dtype": str(dtype).removeprefix("torch.")}
        rows.append(row | errors(Place(place.device, dtype), inputs, outputs, b))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    for name in ("y", "dx", "dvalues"):
        worst = max(rows, key=lambda row: row[name] / max(row[f"dense_{name}"], 1e-12))
        print(f"worst {name}: {worst[name]:.2e}, dense {worst[f'dense_{name}']:.2e} ({worst})")


def errors(place: Place, inputs: int, outputs: int, b: int, n: int = 777) -> dict[str, float]:
    layer = BlockSparseLinear(inputs, outputs, block_size=b, density=DENSITY, device=place.device, dtype=place.dtype)
    torch.nn.init.normal_(layer.values)
    x, g, index = place.randn(n, inputs), place.randn(n, outputs, seed=1), layer.topology.indices()
    rows, cols = layer.topology.coordinates()
    ours = {
        "y": spmm(x, layer.values, None, *index),
        "dx": spmm_t(g, layer.values, *index, inputs),
        "dvalues": sddmm(g, x, *index, b),
    }

    def dense(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        weight, tokens, gradients = layer.to_dense().to(dtype), x.to(dtype), g.to(dtype)
        whole = (gradients.T @ tokens).view(outputs // b, b, inputs // b, b)
        return {"y": tokens @ weight.T, "dx": gradients @ weight, "dvalues": whole[rows, :, cols]}

    exact, same = dense(torch.float64), dense(place.dtype)

    def error(value: torch.Tensor, truth: torch.Tensor) -> float:
        return ((value.double() - truth).abs().max() / truth.abs().max()).item()

    return {name: error(ours[name], exact[name]) for name in ours} | {
        f"dense_{name}": error(same[name], exact[name]) for name in ours
    }


# ---- how fast ---------------------------------------------------------------------------------------


def kernels(place: Place, path: Path) -> None:
    """Forward and backward of a layer against dense and PyTorch's sparse layouts."""
    common: dict[str, Any] = {"shapes": SHAPES, "rounds": 7, "place": place}
    rows = bench_kernels(blocks=BLOCKS, densities=[DENSITY], tokens=[TOKENS], **common)
    print(table(rows))
    bandwidth = memory_bandwidth(place)
    write_json(rows, path, place=place, bandwidth=bandwidth)
    peers = bench_peers(density=DENSITY, tokens=TOKENS, **common)
    print(peer_table(peers))
    write_json(rows, path, peers, place=place, bandwidth=bandwidth)


STEP = {"size": "base", "block_size": 16, "density": DENSITY, "batch_size": 128}


def step(path: Path, *, compiled: bool = True) -> dict[str, Any]:
    """A whole training step."""
    from regrow.bert import bench

    result = bench.bench_step(bench.StepConfig(**STEP, device="cuda", compile=compiled, rounds=3))
    print(bench.table(result))
    bench.write_json(result, path)
    return result


def pretraining(path: Path) -> None:
    """Pre-training beside its own steps, one after the other on the same batch."""
    from regrow.bert.pretrain import PretrainConfig, pretrain
    from regrow.methods import create

    alone = step(path.with_name("step_uncompiled.json"), compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        text, run = Path(folder) / "text.txt", Path(folder) / "run"
        text.write_text(made_up_text())
        more = {"steps": STEPS, "logging_steps": 20, "eval_steps": STEPS, "save_steps": STEPS, "precision": "bf16"}
        pretrain(PretrainConfig(**STEP, **more, data=str(text), output=str(run), workers=4), create("dynsparse"))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][-1]
    by_step = alone["tokens_per_second"]["sparse"]
    result = {"tokens_per_second": speed, "of_steps_alone": by_step, "busy": alone["busy"]["sparse"] * speed / by_step}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(result)


def made_up_text(documents: int = 4000) -> str:
    """Sentences of random words of which some are frequent."""
    draw = random.Random(0)
    words = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(5000)]

    def sentence() -> str:
        return " ".join(words[int(5000 * draw.random() ** 3)] for _ in range(draw.randint(5, 30))).capitalize() + "."

    return "\n\n".join(" ".join(sentence() for _ in range(12)) for _ in range(documents)) + "\n"


def plans(place: Place, path: Path, minutes: float) -> None:
    """Times of every product for many plans, best first; it stops when the time is over."""
    found: list[dict[str, Any]] = []
    until = time.perf_counter() + 60 * minutes
    ways = [gpu.Plan(*way) for way in itertools.product((64, 128), (32, 64), (1, 8, 48), (True, False), (4, 8), (1, 3))]
    jobs = list(itertools.product((16, 32, 8, 64, 4), SHAPES[:1], ways))
    default = gpu.plan
    try:
        for b, shape, way in tqdm(jobs, "trying plans", unit="plan", leave=False):
            if time.perf_counter() > until:
                break
            gpu.plan = lambda *_, way=way, b=b: replace(way, terms=max(way.terms, b))
            try:
                found.append({"block": b, "shape": shape, "plan": asdict(way), **products(place, b, *shape)})
            except Exception as error:  # a plan that needs more memory than there is
                found.append({"block": b, "shape": shape, "plan": asdict(way), "error": str(error)[:200]})
    finally:
        gpu.plan = default
    path.write_text(json.dumps(found, indent=1) + "\n")
    for b in dict.fromkeys(row["block"] for row in found):
        for name in ("y", "dx", "dvalues"):
            good = sorted((row for row in found if row["block"] == b and name in row), key=lambda row: row[name])
            for row in good[:3]:
                print(f"block {b:3} {name:8} {row[name] * 1e6:8.1f} us  {row['plan']}")


def products(place: Place, b: int, inputs: int, outputs: int) -> dict[str, float]:
    layer = BlockSparseLinear(inputs, outputs, block_size=b, density=DENSITY, device=place.device, dtype=place.dtype)
    x, g = place.randn(TOKENS, inputs), place.randn(TOKENS, outputs, seed=1)
    values, index = layer.values.detach(), layer.topology.indices()
    tasks = {
        "y": lambda: spmm(x, values, None, *index),
        "dx": lambda: spmm_t(g, values, *index, inputs),
        "dvalues": lambda: sddmm(g, x, *index, b),
    }
    return place.medians(tasks, rounds=3)


if __name__ == "__main__":
    sys.exit(main())
