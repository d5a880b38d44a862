"""Read the data of a fine-tuning run and encode them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from regrow.bert.finetune_config import FinetuneConfig
from regrow.bert.saved import is_hub_name, model_folder
from regrow.bert.squad import read_squad
from regrow.bert.tasks.classification import ClassificationProblem
from regrow.bert.tasks.problem import Problem
from regrow.bert.tasks.question_answering import QuestionAnsweringProblem
from regrow.bert.tasks.task import Task, read_examples, task_named
from regrow.bert.tokenizer import load_tokenizer
from regrow.errors import RegrowError


def load_problem(config: FinetuneConfig, *, train: bool = True) -> tuple[Problem, Any]:
    """The task with its examples, encoded by the model's tokenizer, which is returned too.

    Raises:
        RegrowError: see :func:`finetune`.
    """
    folder = config.model if is_hub_name(config.model) else str(model_folder(config.model))
    tokenizer = load_tokenizer(folder)
    saved = AutoConfig.from_pretrained(folder)
    max_length = _max_length(config, saved.max_position_embeddings)
    if config.task == "squad":
        return _squad(config, tokenizer, max_length, train), tokenizer
    task = task_named(config.task, config.columns, config.label_column)
    task = _with_labels_of(task, saved, config.model)
    examples = None
    if train:
        task, examples = read_examples(task, config.source("train"), "train")
    task, dev = read_examples(task, config.source("dev"), "dev")
    return ClassificationProblem(task, examples, dev, tokenizer, max_length), tokenizer


def check_data(config: FinetuneConfig) -> None:
    """Read the examples and forget them: what is wrong with them is known before there is a model to fine-tune.

    Raises:
        RegrowError: they cannot be read.
    """
    if config.task == "squad":
        for split in ("train", "dev"):
            read_squad(_squad_file(config, split))
        return
    task = task_named(config.task, config.columns, config.label_column)
    task, _ = read_examples(task, config.source("train"), "train")
    read_examples(task, config.source("dev"), "dev")


def _with_labels_of(task: Task, saved: Any, model: str) -> Task:
    """The task with the labels, and their order, of a model that has a head for classes already."""
    if not any(name.endswith(ClassificationProblem.head) for name in saved.architectures or ()):
        return task
    names = tuple(str(saved.id2label[number]) for number in range(saved.num_labels))
    expected = ("score",) if task.labels is None else task.labels
    if expected and sorted(expected) != sorted(names):
        raise RegrowError(
            f"{model} has a head for {', '.join(names)}, and task {task.name} is about {', '.join(expected)}; start "
            "from the model before it was fine-tuned"
        )
    return task if task.labels is None else replace(task, labels=names)


def _max_length(config: FinetuneConfig, positions: int) -> int:
    if config.max_length is None:
        return min(384 if config.task == "squad" else 128, positions)
    if not 8 <= config.max_length <= positions:
        raise RegrowError(
            f"max_length={config.max_length} must lie between 8 and the {positions} positions that the model knows"
        )
    return config.max_length


def _squad(config: FinetuneConfig, tokenizer: Any, max_length: int, train: bool) -> Problem:
    read = [read_squad(_squad_file(config, split)) for split in (("train", "dev") if train else ("dev",))]
    return QuestionAnsweringProblem(
        read[0] if train else None,
        read[-1],
        tokenizer,
        max_length=max_length,
        stride=config.stride,
        query_length=config.query_length,
        n_best=config.n_best,
        max_answer_length=config.max_answer_length,
    )


def _squad_file(config: FinetuneConfig, split: Literal["train", "dev"]) -> Path:
    path = Path(config.source(split))
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.startswith(split) and ".json" in file.suffixes)
        if not found:
            raise RegrowError(f"{path} holds no {split}*.json file; name one with --{split}_data")
        return found[0]
    return path
