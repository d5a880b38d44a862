"""A small encoder, tasks of made-up words, and the settings of a short fine-tuning."""

import json
from pathlib import Path

import numpy as np
from transformers import BertConfig

from regrow.bert.finetune_config import FinetuneConfig
from regrow.bert.model import build_model
from regrow.bert.tokenizer import train_wordpiece

WORDS = [*(a + b for a in "bdfgl" for b in "aeiou"), "good", "bad"]


def write_encoder(folder: Path, *, density: float | None = 0.5, seed: int = 0) -> Path:
    """A pre-trained model, as far as its files go."""
    tokenizer = train_wordpiece(WORDS * 3, vocab_size=200)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    build_model(config, density=density, block_size=8, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(n: int, seed: int) -> list[tuple[str, str, float]]:
    """Text, label and score: whether it says good or bad, and how often."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        label, times = str(rng.choice(["good", "bad"])), int(rng.integers(1, 4))
        words = [*rng.choice(WORDS[:-2], size=rng.integers(3, 9)), *([label] * times)]
        rng.shuffle(words)
        found.append((" ".join(words), label, times if label == "good" else -times))
    return found


def write_table(folder: Path, n: int = 256) -> Path:
    """``train.csv`` and ``dev.csv`` with the columns review, verdict and score."""
    folder.mkdir()
    for seed, name, size in ((1, "train", n), (2, "dev", 64)):
        lines = [f'"{text}",{label},{score}' for text, label, score in sentences(size, seed)]
        (folder / f"{name}.csv").write_text("\n".join(["review,verdict,score", *lines]) + "\n")
    return folder


def write_questions(folder: Path, n: int = 256) -> Path:
    """``train.json`` and ``dev.json``, in SQuAD's format: is it good or bad?"""
    folder.mkdir()
    for seed, name, size in ((1, "train", n), (2, "dev", 48)):
        rng, paragraphs = np.random.default_rng(seed), []
        for number in range(size):
            words = [str(word) for word in rng.permutation(WORDS[:-2])[:12]]
            place = int(rng.integers(0, 12))
            words[place] = str(rng.choice(["good", "bad"]))
            answers = [{"text": words[place], "answer_start": len(" ".join([*words[:place], ""]))}]
            qas = [{"id": f"{name}{number}", "question": "la la la", "answers": answers}]
            paragraphs.append({"context": " ".join(words), "qas": qas})
        document = {"version": "1.1", "data": [{"title": "words", "paragraphs": paragraphs}]}
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def config(model: Path, data: Path, output: Path, /, **changes: object) -> FinetuneConfig:
    options = {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "task": "classification",
        "text_columns": "review",
        "label_column": "verdict",
        "epochs": 1.0,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "eval_steps": 16,
        "save_steps": 1000,
        "logging_steps": 8,
        "seed": 5,
    }
    return FinetuneConfig(**(options | changes))
