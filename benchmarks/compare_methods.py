"""Every method under the same conditions: model, data, steps, seeds, density, schedule.

    python benchmarks/compare_methods.py run --data corpus.txt.xz --output benchmarks/methods.json
    python benchmarks/compare_methods.py page benchmarks/methods.json > docs/methods-compared.md

Each run is one ``regrow pretrain`` on one thread, several at a time. A finished run is a row of the JSON file and is
never done again, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev

import torch

from regrow import TopologyUpdater, UpdateSchedule
from regrow.bert.model import build_model
from regrow.bert.sizes import bert_config
from regrow.kernels.machine import describe_machine
from regrow.methods import LayerSize, available, create
from regrow.nn import named_sparse_layers
from regrow.optim import AdamW, parameter_groups

SIZE, SMALL_DENSE = "2/256/4", "2/86/2"
"""The second, dense, has the encoder FLOPs of the first at density 0.1, attention products included (1 % less)."""
DENSITY, BLOCKS, SEEDS = 0.1, (1, 16), (0, 1, 2)
LENGTH, BATCH = 32, 64
COMMON = {
    "max-documents": 8000,
    "size": SIZE,
    "density": DENSITY,
    "max-length": LENGTH,
    "batch-size": BATCH,
    "vocab-size": 4096,
    "drop-fraction": 0.5,
    "warmup": 0.1,
    "eval-sequences": 1024,
    "heldout-fraction": 0.05,
    "save-steps": 10**6,
    "logging-steps": 50,
}
VARIANTS = {
    "gmp": {"density": 1.0, "final-density": DENSITY},
    "dynsparse, global steps": {"method": "dynsparse", "no-block-steps": None},
    "dynsparse, quota": {"method": "dynsparse", "quota-rows": 1},
    "dynsparse, unexplored": {"method": "dynsparse", "growth": "unexplored"},
    "gse, norms": {"method": "gse", "sampling": "norms"},
}
"""What differs from ``--method NAME`` and the common flags."""
RATES = {
    f"{rule}, {scope}": {"method": "dynsparse", "lr-rule": rule, "lr-scope": scope}
    for rule in ("eq3", "inverse", "supar")
    for scope in ("sparse", "all")
}
"""Learning-rate rules, for the default of ``--lr-scope``."""


def specifications(which: str) -> Iterator[dict]:
    """Label, block size, seed and flags of every run, in the order in which they are done."""
    if which == "rates":
        for label, flags in RATES.items():
            for block in BLOCKS:
                yield {"label": label, "block_size": block, "seed": 0, "flags": flags}
        return
    for seed in SEEDS:
        for label in available():
            for block in BLOCKS:
                flags = {"method": label} | VARIANTS.get(label, {})
                yield {"label": label, "block_size": block, "seed": seed, "flags": flags}
    for seed in SEEDS:
        for label, size in (("dense", SIZE), ("dense, equal FLOPs", SMALL_DENSE)):
            flags = {"dense": None, "size": size}
            yield {"label": label, "block_size": None, "seed": seed, "flags": flags}
    for label in (label for label in VARIANTS if label not in available()):
        for seed in SEEDS:
            for block in BLOCKS:
                yield {"label": label, "block_size": block, "seed": seed, "flags": VARIANTS[label]}


def run(which: str, data: str, output: Path, steps: int, updates: int, workers: int) -> None:
    """Do what is not in ``output`` yet."""
    document = json.loads(output.read_text()) if output.exists() else {"rows": []}
    document |= {"machine": describe_machine(), "common": COMMON}
    document |= {"steps": steps, "updates": updates, "data": Path(data).name}
    done = {(row["label"], row["block_size"], row["seed"]) for row in document["rows"]}
    todo = [s for s in specifications(which) if (s["label"], s["block_size"], s["seed"]) not in done]
    lock = threading.Lock()

    def finish(specification: dict) -> None:
        row = train(specification, data, steps, updates)
        with lock:
            document["rows"].append(row)
            output.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{len(document['rows'])}: {row}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(finish, todo))


def train(specification: dict, data: str, steps: int, updates: int) -> dict:
    """One run; its row."""
    flags = COMMON | {"block-size": specification["block_size"] or 16, "seed": specification["seed"], "data": data}
    flags |= {"steps": steps, "n-updates": updates} | specification["flags"]
    with tempfile.TemporaryDirectory() as folder:
        argv = [f"--{k}" if v is None else f"--{k}={v}" for k, v in (flags | {"output": f"{folder}/run"}).items()]
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "regrow", "pretrain", *argv],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        seconds = time.perf_counter() - started
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if "eval_mlm_loss" in line][-1]
    coverage = [line["coverage"] for line in lines if "coverage" in line]
    return {
        **{name: specification[name] for name in ("label", "block_size", "seed")},
        "mlm_loss": round(final["eval_mlm_loss"], 5),
        "nsp_loss": round(final["eval_nsp_loss"], 5),
        "coverage": round(coverage[-1], 4) if coverage else None,
        "seconds": round(seconds, 1),
    }


def update_costs(output: Path, rounds: int = 9) -> None:
    """Add FLOPs and seconds of one update of every method, beyond an ordinary step, to the file."""
    document = json.loads(output.read_text())
    document["updates_cost"] = [
        {"method": name, "block_size": block, "flops": update_flops(name, block), "seconds": seconds}
        for block in BLOCKS
        for name, seconds in update_seconds(block, rounds).items()
    ]
    output.write_text(json.dumps(document, indent=1) + "\n")


def update_flops(name: str, block: int) -> int:
    """Of one update of the whole model."""
    model = build_model(configuration(), density=DENSITY, block_size=block)
    sizes = (
        LayerSize(layer.in_features, layer.out_features, block, layer.topology.n_blocks)
        for _, layer in named_sparse_layers(model)
    )
    return sum(create(name).update_flops(size, LENGTH * BATCH) for size in sizes)


def update_seconds(block: int, rounds: int) -> dict[str, float]:
    """Median seconds by which a step with an update is longer than one without; steps of all methods take turns."""
    batch = {
        "input_ids": torch.randint(5, 4096, (BATCH, LENGTH)),
        "labels": torch.where(torch.rand(BATCH, LENGTH) < 0.15, 7, -100),
        "next_sentence_label": torch.randint(2, (BATCH,)),
    }
    runs, times = {}, {}
    for name in available():
        model = build_model(configuration(), density=DENSITY, block_size=block)
        optimizer = AdamW(parameter_groups(model, 0.01), lr=1e-4)
        schedule = UpdateSchedule(100 * rounds, 100 * rounds, 0.3, "constant")
        runs[name] = model, optimizer, TopologyUpdater(model, optimizer, create(name), schedule=schedule)
        times[name] = []
    for round_ in range(rounds + 1):
        for name, (model, optimizer, updater) in runs.items():
            started = time.perf_counter()
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            updater.step()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - started)
    return {name: round(median(t) - median(times["static"]), 5) for name, t in times.items()}


def configuration():
    """The model of the comparison."""
    return bert_config(SIZE, vocab_size=4096, max_length=LENGTH)


def page(output: Path) -> str:
    """The Markdown page, from the file of the methods and the one of the rates beside it."""
    document = json.loads(output.read_text())
    rates = json.loads(output.with_name("learning-rates.json").read_text())
    template = (Path(__file__).parent / "compare_methods.md").read_text()
    machine = document["machine"]
    return template.format(
        data=document["data"],
        steps=document["steps"],
        segments=document["updates"],
        updates=document["updates"] - 1,
        tokens=document["steps"] * BATCH * LENGTH,
        cpu=f"{machine['processor']}, PyTorch {machine['torch']}",
        methods=methods_table(document),
        rates=rates_table(rates),
    ).rstrip()


def rates_table(document: dict) -> str:
    """Loss by learning-rate rule and scope."""
    losses = {(row["label"], row["block_size"]): row["mlm_loss"] for row in document["rows"]}
    lines = ["| | b = 1 | b = 16 |", "|---|---|---|"]
    for label in dict.fromkeys(row["label"] for row in document["rows"]):
        cells = [f"{losses[label, b]:.4f}" if (label, b) in losses else f"{losses[label, None]:.4f}" for b in BLOCKS]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


REFERENCE = "dynsparse"


def methods_table(document: dict) -> str:
    """By method and block size: loss, difference to dynsparse of the same seed, coverage, cost of an update."""
    costs = {(c["method"], c["block_size"]): c for c in document["updates_cost"]}
    rows = {(row["label"], row["block_size"] or b, row["seed"]): row for row in document["rows"] for b in BLOCKS}
    seeds = sorted({seed for _, _, seed in rows})
    labels = {label for label, _, _ in rows}

    def of(label: str, block: int, what: str = "mlm_loss") -> dict[int, float]:
        return {seed: rows[label, block, seed][what] for seed in seeds if (label, block, seed) in rows}

    def difference(label: str, block: int) -> str:
        own, reference = of(label, block), of(REFERENCE, block)
        return "" if label == REFERENCE else spread([own[s] - reference[s] for s in own if s in reference], "+.4f")

    columns = ["MLM loss", "to dynsparse", "coverage", "FLOPs", "seconds"]
    lines = ["| method | " + " | ".join(f"b = {b}: {columns[0]} | " + " | ".join(columns[1:]) for b in BLOCKS) + " |"]
    lines.append("|---" * (1 + len(columns) * len(BLOCKS)) + "|")
    for label in sorted(labels, key=lambda label: mean(of(label, 16).values())):
        cells = [label]
        for block in BLOCKS:
            cost = costs.get((label.split(",")[0], block))
            coverage = of(label, block, "coverage").values()
            cells += [spread(of(label, block).values(), ".4f"), difference(label, block)]
            cells += [f"{mean(coverage):.2f}" if None not in coverage else ""]
            cells += [f"{cost['flops']:.2g}", f"{cost['seconds']:.3f}"] if cost else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Iterable[float], digits: str) -> str:
    """Mean and standard deviation."""
    values = list(values)
    return f"{mean(values):{digits}}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train everything that is missing")
    runner.add_argument("--which", choices=["methods", "rates"], default="methods")
    runner.add_argument("--data", required=True)
    runner.add_argument("--output", type=Path, default=Path("benchmarks/methods.json"))
    runner.add_argument("--steps", type=int, default=1000)
    runner.add_argument("--updates", type=int, default=20, help="segments between topology updates")
    runner.add_argument("--workers", type=int, default=2)
    for name, text in (("costs", "measure what an update costs; on an idle machine"), ("page", "print the page")):
        commands.add_parser(name, help=text).add_argument("output", type=Path)
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked.which, asked.data, asked.output, asked.steps, asked.updates, asked.workers)
    elif asked.command == "costs":
        update_costs(asked.output)
    else:
        print(page(asked.output))


if __name__ == "__main__":
    main()
