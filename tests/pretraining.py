"""A small corpus, the settings of a small pre-training on it, and what such a run logged."""

import json
from pathlib import Path

import numpy as np

from regrow.bert.pretrain import PretrainConfig

STEPS = 24


def write_corpus(path: Path) -> Path:
    """Forty documents of a made-up language in which words follow each other by rule."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("bdfgklmnprst")) + rng.choice(list("aeiou")) for _ in range(3)) for _ in range(60)]
    documents = []
    for _ in range(40):
        sentences = []
        for _ in range(rng.integers(4, 9)):
            start = rng.integers(60)
            sentences.append(
                " ".join(words[(start + 7 * i) % 60] for i in range(rng.integers(5, 12))).capitalize() + "."
            )
        documents.append(" ".join(sentences))
    path.write_text("\n\n".join(documents) + "\n")
    return path


def config(corpus: Path, output: Path, **changes: object) -> PretrainConfig:
    options = {
        "data": str(corpus),
        "output": str(output),
        "vocab_size": 200,
        "steps": STEPS,
        "batch_size": 4,
        "max_length": 32,
        "n_updates": 6,
        "density": 0.2,
        "dropout": 0.1,  # so that a resumed run must restore the random state
        "logging_steps": 5,
        "save_steps": 1000,
        "eval_steps": 10,
        "heldout_fraction": 0.2,
        "learning_rate": 2e-3,
        "seed": 3,
    }
    return PretrainConfig(**(options | changes))


def lines_with_clock(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics_without_clock(run: Path) -> list[dict]:
    clock = ("tokens_per_second", "data_wait", "seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines_with_clock(run)]
