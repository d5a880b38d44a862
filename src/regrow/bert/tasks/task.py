"""What a classification or regression task is, GLUE's among them, and its examples.

GLUE: Wang et al. 2019, https://arxiv.org/abs/1804.07461. Columns and labels are those of the published TSV files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from regrow.bert.tasks.metrics import CLASSIFICATION_METRICS, REGRESSION_METRICS
from regrow.bert.tasks.table import SUFFIXES, read_table, table_format
from regrow.errors import RegrowError

_SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "dev_matched", "validation_matched")}


@dataclass(frozen=True)
class Task:
    """One or two texts in, a label or a number out.

    Args:
        name: as the command line has it.
        text: the columns of the texts, one or two.
        label: the column of the label or the score.
        labels: the classes; empty where the training file says which there are. None for regression.
        metrics: what its results are, by name; the first is the one to compare by.
        header: names of the columns where the files do not say.
        hub: data set and configuration on the hub.
    """

    name: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    header: tuple[str, ...] = ()
    hub: str | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the result is a number."""
        return self.labels is None


@dataclass(frozen=True)
class Examples:
    """Texts, one or two each, and labels: numbers of classes, or scores; ``where`` says from which file."""

    where: str
    texts: list[tuple[str, ...]] = field(repr=False)
    labels: list[float] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
GLUE = {
    task.name: replace(task, hub=f"nyu-mll/glue:{task.name}")
    for task in (
        Task("sst2", ("sentence",), "label", ("0", "1"), ("accuracy",)),
        Task("cola", ("sentence",), "label", ("0", "1"), ("matthews",), ("source", "label", "mark", "sentence")),
        Task("mrpc", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("f1", "accuracy")),
        Task("qqp", ("question1", "question2"), "is_duplicate", ("0", "1"), ("f1", "accuracy")),
        Task("stsb", _PAIR, "score", None, ("spearman", "pearson")),
        Task("mnli", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",)),
        Task("qnli", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
        Task("rte", _PAIR, "label", _ENTAILMENT, ("accuracy",)),
        Task("wnli", _PAIR, "label", ("0", "1"), ("accuracy",)),
    )
}
_HUB_COLUMNS = {"#1 String": "sentence1", "#2 String": "sentence2"}
"""Where the hub's copy of GLUE names a text otherwise; its labels are always ``label``."""


def task_named(name: str, text_columns: Sequence[str] = (), label_column: str | None = None) -> Task:
    """A task of GLUE, or ``classification`` or ``regression`` of named columns.

    Raises:
        RegrowError: no such task, or columns are given that it has not.

    Example:
        >>> task_named("rte").text, task_named("classification", ["title"], "topic").label
        (('sentence1', 'sentence2'), 'topic')
    """
    if name in GLUE:
        if text_columns or label_column:
            raise RegrowError(f"text_columns and label_column are for --task classification or regression, not {name}")
        return GLUE[name]
    if name not in ("classification", "regression"):
        known = ", ".join([*GLUE, "squad", "classification", "regression"])
        raise RegrowError(f"task must be one of {known}; got {name!r}")
    text = tuple(text_columns) or ("text",)
    if len(text) > 2 or len(set(text)) < len(text):
        raise RegrowError(f"text_columns must be one column or two different ones, got {','.join(text)}")
    if name == "regression":
        return Task(name, text, label_column or "label", None, REGRESSION_METRICS)
    return Task(name, text, label_column or "label", (), CLASSIFICATION_METRICS)


def read_examples(task: Task, source: str | Path, split: str) -> tuple[Task, Examples]:
    """The ``train`` or ``dev`` examples of a task, and the task with its labels known.

    Args:
        source: a file; a folder that holds ``train.*`` and ``dev.*`` (or ``validation.*``); or a hub data set, as
            ``owner/name`` or ``owner/name:configuration``.
        split: ``"train"`` or ``"dev"``.

    Raises:
        RegrowError: there is no such file or it holds nothing; a column is missing, a row is ragged, a text is empty of
            type, a label is unknown or a score no number: with the file's name and the line.
    """
    path = Path(source)
    if path.exists():
        path = split_file(path, split)
        rows = read_table(path, [*task.text, task.label], task.header)
        where = str(path)
    elif str(source).count("/") == 1 and str(source)[0] not in "./~":
        task, rows = _hub_rows(task, str(source), split)
        where = f"{source}, {split}"
    else:
        raise RegrowError(
            f"data {str(source)!r} does not exist; give a file, a folder of a task, or a hub's owner/name"
        )
    return _examples(task, where, rows)


def split_file(path: Path, split: str) -> Path:
    """The file of a split in a folder; a file is its own."""
    if not path.is_dir():
        return path
    found = sorted(
        file for file in path.iterdir() if table_format(file) and file.name.split(".")[0].lower() in _SPLITS[split]
    )
    if not found:
        names = " or ".join(_SPLITS[split][:2])
        raise RegrowError(f"{path} holds no {names} file ({', '.join(SUFFIXES)}); name one with --{split}_data")
    return found[0]


def _examples(task: Task, where: str, rows: Iterable[tuple[str, list[Any]]]) -> tuple[Task, Examples]:
    texts, labels, places = [], [], []
    for place, values in rows:
        for column, text in zip(task.text, values, strict=False):
            if not isinstance(text, str):
                raise RegrowError(f"{place}, column {column!r}: {text!r} is no text")
        texts.append(tuple(values[:-1]))
        labels.append(values[-1])
        places.append(place)
    if not texts:
        raise RegrowError(f"{where} holds no examples")
    if task.labels is None:
        return task, Examples(where, texts, [_score(task, *pair) for pair in zip(labels, places, strict=True)])
    names = task.labels or _found_labels(task, where, labels)
    numbers = {name: number for number, name in enumerate(names)}
    for place, label in zip(places, labels, strict=True):
        if str(label) not in numbers:
            raise RegrowError(f"{place}, column {task.label!r}: unknown label {label!r}; known are {', '.join(names)}")
    return replace(task, labels=names), Examples(where, texts, [numbers[str(label)] for label in labels])


def _found_labels(task: Task, where: str, labels: Sequence[Any]) -> tuple[str, ...]:
    names = tuple(sorted({str(label) for label in labels}))
    if len(names) < 2:
        raise RegrowError(f"{where}, column {task.label!r}: every label is {names[0]!r}; there is nothing to learn")
    if len(labels) > 20 and len(names) > len(labels) / 2:
        raise RegrowError(
            f"{where}, column {task.label!r}: {len(names)} different labels in {len(labels)} rows; is it a score? Then "
            "give --task regression, or else another --label_column"
        )
    return names


def _score(task: Task, value: Any, place: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise RegrowError(f"{place}, column {task.label!r}: {value!r} is no number")
    return score


def _hub_rows(task: Task, source: str, split: str) -> tuple[Task, Iterator[tuple[str, list[Any]]]]:
    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub client has no common error type; all mean "no such data"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RegrowError(f"data {source!r} is no path and cannot be had from the hub: {reason}") from None
    part = next((found[key] for key in _SPLITS[split] if key in found), None)
    if part is None:
        raise RegrowError(f"data {source!r} has no {split} split, only {', '.join(found)}")
    label = task.label if task.label in part.column_names else "label"
    text = [column if column in part.column_names else _HUB_COLUMNS.get(column, column) for column in task.text]
    for column in (*text, label):
        if column not in part.column_names:
            raise RegrowError(f"data {source!r} has no column {column!r} among {', '.join(part.column_names)}")
    names = getattr(part.features[label], "names", None)
    if names and task.labels is not None:
        task = replace(task, labels=tuple(names))
        part = part.filter(lambda row: row[label] >= 0)  # -1 stands for labels that are kept secret

    def rows() -> Iterator[tuple[str, list[Any]]]:
        for number, row in enumerate(part, start=1):
            value = names[row[label]] if names and task.labels is not None else row[label]
            yield f"{source}, {split}, row {number}", [*(row[column] for column in text), value]

    return task, rows()
