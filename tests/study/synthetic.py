"""Records that look like real ones, with losses that follow the paper's claims."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

SHAPES = {"2/64/1": (2, 64), "2/128/2": (2, 128), "4/256/4": (4, 256), "mini": (4, 256), "small": (4, 512)}
MACHINE = {"processor": "Some Processor", "cores": 2, "threads": 2, "isa": "avx512", "torch": "2.13.0"}


def record(
    size: str = "2/128/2",
    *,
    dense: bool = False,
    seed: int = 0,
    patterns: bool = False,
    machine: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A finished run; ``changes`` go into its configuration."""
    config: dict[str, Any] = {
        "data": "corpus.txt", "output": "runs/x", "size": size, "density": 0.1, "block_size": 1, "method": "dynsparse",
        "dense": dense, "n_updates": 40, "drop_fraction": 0.5, "distribution": "uniform", "steps": 1000,
        "batch_size": 32, "max_length": 128, "learning_rate": None, "lr_rule": "eq3", "seed": seed, "norm": "l1",
        "group_lasso": 0.0, "weight_decay": 0.01, **changes,
    }  # fmt: skip
    layers, hidden = SHAPES[size]
    density = 1.0 if dense else config["density"]
    per_sequence = 3 * (2 * 128 * 12 * layers * hidden**2 * density + 4 * layers * 128**2 * hidden)
    flops = per_sequence * config["batch_size"] * config["steps"]
    loss = _loss(config, per_sequence)
    speed = 1.0 if dense else 1.5 if config["block_size"] == 1 else 1.1
    seconds = flops * speed / 4e10
    steps = list(range(10, config["steps"] + 1, 10))
    curve = [
        {
            "step": step,
            "tokens": step * 3000,
            "seconds": seconds * step / config["steps"],
            "mlm_loss": loss + 6 * math.exp(-step / 60) + 0.5 * (1 - step / config["steps"]),
            "nsp_loss": 0.4 + 0.3 * math.exp(-step / 200),
            "tokens_per_second": 3000 * config["steps"] / seconds,
            "learning_rate": 1e-3 * (1 - step / config["steps"]),
        }
        for step in steps
    ]
    document: dict[str, Any] = {
        "id": hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=12).hexdigest(),
        "format": 1,
        "spec": {"size": size, "dense": dense, "seed": seed, **changes},
        "config": config,
        "machine": machine or MACHINE,
        "versions": {"regrow": "0.1.0", "torch": "2.13.0"},
        "flops": {"per_sequence_paper": per_sequence, "train_paper": flops},
        "seconds": seconds,
        "tokens": config["steps"] * 3000,
        "memory": {"peak_rss": 900_000_000},
        "final": {"eval_mlm_loss": loss, "eval_nsp_loss": 0.42, "eval_mlm_accuracy": 0.2},
        "curve": curve,
        "evaluations": [
            {"step": 0, "seconds": 0.0, "eval_mlm_loss": 9.0},
            {"step": config["steps"], "seconds": seconds, "eval_mlm_loss": loss},
        ],
    }
    if not dense and config["method"] != "static":
        document["topology"] = _topology(config)
    if patterns:
        document["patterns"] = _patterns(config)
    return document


def _loss(config: dict[str, Any], per_sequence: float) -> float:
    """Falls with the logarithm of FLOPs; sparse models are better by what their kind is worth."""
    noise = random.Random(json.dumps(config, sort_keys=True)).gauss(0, 0.004)
    shared = random.Random(config["seed"]).gauss(0, 0.03)  # of the data: in all runs of a seed
    loss = 6.0 - 0.35 * math.log(per_sequence / 1e8) + shared + noise
    if config["dense"]:
        return loss
    if config["method"] == "static":
        return loss + 0.01 * math.copysign(1, noise)
    loss -= 0.30 - 0.05 * math.log2(config["block_size"])
    loss += (
        0.02 * math.log2((config["n_updates"] or 20) / 40) ** 2 + {"l1": 0.0, "l2": 0.02, "linf": 0.04}[config["norm"]]
    )
    if config["method"] == "rigl":
        loss += 0.05
    return loss + (0.1 if config["group_lasso"] else 0.0)


def _topology(config: dict[str, Any]) -> dict[str, Any]:
    n, steps = config["n_updates"] or 20, config["steps"]
    reach = 0.35 if config["method"] == "rigl" else 0.9
    fraction = [config["drop_fraction"] * (1 + math.cos(math.pi * i / n)) / 2 for i in range(1, n)]
    updates = [
        {
            "step": steps * i // n,
            "coverage": 0.1 + (reach - 0.1) * (1 - math.exp(-4 * i / n)),
            "churn": fraction[i - 1] * 0.9,
            "fresh_removed": 0.0 if i == 1 else fraction[i - 1],
        }
        for i in range(1, n)
    ]
    return {"updates": updates, "layers": {"bert.encoder.layer.0.attention.self.query": updates[-1] if updates else {}}}


def _patterns(config: dict[str, Any]) -> dict[str, Any]:
    """Stripes that come with RigL, evenness that stays with the others."""
    draw = random.Random(config["seed"])
    names = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    return {
        f"bert.encoder.layer.{layer}.{name}": [
            {
                "step": step,
                "counts": [
                    [draw.randint(0, 6) * (x % 5 == 0 or not step or config["method"] != "rigl") for x in range(16)]
                    for _ in range(16)
                ],
            }
            for step in (0, config["steps"] // 2, config["steps"])
        ]
        for layer in range(2)
        for name in names
    }


def study(seeds: int = 3) -> list[dict[str, Any]]:
    """Enough for most claims: dense of three sizes, static, dynamic, blocks, schedules, norms, RigL."""
    records = []
    for seed in range(seeds):
        records += [record(size, dense=True, seed=seed) for size in ("2/64/1", "2/128/2", "4/256/4")]
        records += [record(size, seed=seed, patterns=seed == 0) for size in ("2/128/2", "4/256/4")]
        records += [record(size, seed=seed, method="static") for size in ("2/128/2", "4/256/4")]
        records += [record("4/256/4", seed=seed, block_size=b) for b in (4, 16)]
        records += [record("4/256/4", seed=seed, density=d) for d in (0.5, 0.25)]
        records += [record("4/256/4", seed=seed, n_updates=n) for n in (10, 160)]
        records += [record("4/256/4", seed=seed, block_size=16, norm=norm) for norm in ("l2", "linf")]
        records.append(record("4/256/4", seed=seed, method="rigl", patterns=seed == 0))
        records.append(record("4/256/4", seed=seed, group_lasso=0.01))
    return records


def write(records: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in records:
        (folder / f"{entry['id']}.json").write_text(json.dumps(entry))
    return folder
