"""Run records as analysis reads them: files in, and what a run was and came to.

A record is the JSON file of a finished run (``docs/report.md`` lists what is read). Every part but ``id`` and
``config`` may be missing; what needs it then says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from regrow.bert.pretrain import PretrainConfig
from regrow.bert.sizes import SIZES, size_named
from regrow.errors import RegrowError
from regrow.nn.replace import DEFAULT
from regrow.optim import sparse_learning_rate

FORMAT = 1
TRAINING_FIELDS = frozenset(field.name for field in fields(PretrainConfig))
"""Options of every run; a configuration's other ones belong to its method."""

# What can change neither the training nor its evaluation.
_BYSTANDERS = frozenset(
    (
        "output",
        "seed",
        "pattern_seed",
        "workers",
        "logging_steps",
        "save_steps",
        "keep_checkpoints",
        "eval_steps",
        "report_to",
    )
)
# What decides whether two losses are of the same task.
TASK = (
    "data",
    "tokenizer",
    "vocab_size",
    "text_field",
    "short_documents",
    "max_documents",
    "max_length",
    "heldout_fraction",
    "eval_sequences",
)
# What a dense run, or one whose pattern rests, does not use.
_TOPOLOGY = frozenset(
    ("n_updates", "drop_fraction", "decay", "final_fraction", "stop_updates", "block_warmup", "block_steps")
)
RATE_RULE = frozenset(("lr_scale", "lr_rule", "lr_scope", "base_width"))
"""What decides a learning rate that is not given."""
_SPARSE = _TOPOLOGY | (RATE_RULE - {"lr_scale"}) | frozenset(("density", "block_size", "distribution", "method"))

# So that records from before an option existed still group with those after.
_DEFAULTS = {field.name: field.default for field in fields(PretrainConfig)}

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Run:
    """One record, with names for what is asked of it again and again.

    Example:
        >>> config = {"dense": True, "size": "tiny", "seed": 3}
        >>> run = Run({"id": "a", "config": config, "final": {"eval_mlm_loss": 2.5}})
        >>> run.method, run.density, run.family, run.seed, run.loss, run.seconds
        ('dense', 1.0, 'dense', 3, 2.5, None)
    """

    record: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The record's identity."""
        return str(self.record["id"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The full configuration."""
        return self.record["config"]

    @property
    def seed(self) -> int:
        """Of weights, pattern and data."""
        return int(number(self.config, "seed") or 0)

    @property
    def dense(self) -> bool:
        """Whether this is the dense baseline."""
        return bool(self.config.get("dense", False))

    @cached_property
    def size(self) -> str:
        """The size's name, or ``LAYERS/HIDDEN/HEADS``, in one way whichever it was given in."""
        given = str(self.config.get("size", "unknown"))
        try:
            size = size_named(given)
        except RegrowError:
            return given
        shapes = {(known.layers, known.hidden, known.heads): name for name, known in SIZES.items()}
        shape = (size.layers, size.hidden, size.heads)
        return shapes.get(shape, "/".join(map(str, shape)))

    @property
    def weights(self) -> int | None:
        """Elements of the encoder's linear weights when dense."""
        try:
            return size_named(self.size).encoder_weights
        except RegrowError:
            return None

    @property
    def dropout(self) -> float | None:
        """The given one, or what the size has by the name it was given by."""
        given, named = number(self.config, "dropout"), SIZES.get(str(self.config.get("size")))
        return given if given is not None else named.dropout if named else 0.0

    @property
    def method(self) -> str:
        """How the pattern moves, or ``dense``."""
        return "dense" if self.dense else str(self.config.get("method", "unknown"))

    @property
    def density(self) -> float:
        """Share of the encoder's blocks that exist; 1 for a dense model."""
        density = number(self.config, "density")
        return 1.0 if self.dense or density is None else density

    @property
    def block_size(self) -> int | None:
        """Edge of a block; ``None`` for a dense model."""
        block = number(self.config, "block_size")
        return None if self.dense or block is None else int(block)

    @property
    def layer(self) -> str:
        """What stands in the place of linear layers: blocks alone, or a layer option."""
        return str(self.config.get("layer") or DEFAULT)

    @property
    def family(self) -> str:
        """What is drawn in one colour: method, layer option, block edge and density, over all sizes."""
        if self.dense:
            return "dense"
        kind = self.method if self.layer == DEFAULT else f"{self.method} {self.layer}"
        return f"{kind} b={self.block_size} d={self.density:g}"

    @property
    def loss(self) -> float | None:
        """Held-out MLM loss at the end, in nats."""
        return number(self.record, "final", "eval_mlm_loss")

    @property
    def flops(self) -> float | None:
        """FLOPs of the training as the paper counts them."""
        return number(self.record, "flops", "train_paper")

    @property
    def seconds(self) -> float | None:
        """Of training alone."""
        return number(self.record, "seconds")

    @property
    def machine(self) -> str:
        """What the seconds depend on."""
        machine = self.record.get("machine")
        parts = machine if isinstance(machine, Mapping) else {}
        return ", ".join(f"{name} {parts[name]}" for name in ("processor", "threads", "isa") if name in parts)

    @property
    def updates(self) -> Sequence[Mapping[str, Any]]:
        """Topology updates, means over the layers; no share of fresh blocks in the first, before which none came."""
        first, *rest = entries(self.record, "topology", "updates") or [{}]
        return [{name: value for name, value in first.items() if name != "fresh_removed"}, *rest] if first else rest

    @property
    def coverage(self) -> float | None:
        """Share of all positions that were ever active, at the end."""
        return number(self.updates[-1], "coverage") if self.updates else None

    @property
    def fresh_removed(self) -> float | None:
        """Share of removed blocks that the update before had allocated, mean over updates but the first."""
        shares = [number(update, "fresh_removed") for update in self.updates]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if known else None

    @property
    def n_updates(self) -> int | None:
        """Segments between topology updates; the default is one in 50 steps, at most 160."""
        given, steps = number(self.config, "n_updates"), number(self.config, "steps")
        if given is not None or steps is None:
            return None if given is None else int(given)
        return max(min(2, int(steps)), min(160, int(steps) // 50))

    @cached_property
    def learning_rate(self) -> float | None:
        """Peak learning rate of the encoder's weights: the given one, or what size, density and rule come to."""
        given = number(self.config, "learning_rate")
        if given is not None:
            return given
        try:
            size = size_named(str(self.config.get("size")))
            base = number(self.config, "base_width")
            ratio = 1.0 if base is None else size.hidden / base
            rule: Any = self.config.get("lr_rule", "eq3")
            scale = number(self.config, "lr_scale") or 1.0
            return sparse_learning_rate(scale * size.dense_lr, self.density, rule, width_ratio=ratio)
        except RegrowError:
            return None

    @cached_property
    def key(self) -> Key:
        """Everything that can change the result but the seed."""
        unused = _BYSTANDERS | (_SPARSE if self.dense else _TOPOLOGY if self.method == "static" else frozenset())
        if number(self.config, "learning_rate") is not None:  # it is then that of every parameter
            unused |= RATE_RULE
        config = {name: value for name, value in (_DEFAULTS | dict(self.config)).items() if name not in unused}
        if self.dense:  # options of the method that a dense model does not have
            config = {name: value for name, value in config.items() if name in TRAINING_FIELDS}
        config["learning_rate"] = self.learning_rate
        config |= {"dense": self.dense, "size": self.size, "dropout": self.dropout}
        if "n_updates" in config:
            config["n_updates"] = self.n_updates
        return tuple(sorted((name, json.dumps(value, sort_keys=True)) for name, value in config.items()))

    @cached_property
    def task(self) -> Key:
        """What two losses must share to be compared."""
        return tuple((name, json.dumps(self.config[name])) for name in TASK if name in self.config)


def number(mapping: Any, *path: str) -> float | None:
    """The finite number at a path of keys, else ``None``: records are not to be trusted.

    Example:
        >>> number({"a": {"b": 2}}, "a", "b"), number({"a": "2"}, "a"), number({"a": float("nan")}, "a")
        (2.0, None, None)
    """
    for name in path:
        mapping = mapping.get(name) if isinstance(mapping, Mapping) else None
    if isinstance(mapping, bool) or not isinstance(mapping, int | float):
        return None
    try:
        value = float(mapping)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def entries(mapping: Any, *path: str) -> list[Mapping[str, Any]]:
    """The list of mappings at a path of keys; empty if it is anything else."""
    for name in path:
        mapping = mapping.get(name) if isinstance(mapping, Mapping) else None
    return [entry for entry in mapping if isinstance(entry, Mapping)] if isinstance(mapping, list) else []


def read_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Runs of record files, and of folders searched to the bottom; a run that is found twice is taken once.

    A folder may hold other JSON files; a file named here must be a record.

    Returns:
        The runs, and a line for each file in a folder that could not be read.

    Raises:
        RegrowError: no such file, a file that is no record, a record of another format, or no record at all.
    """
    found: dict[str, Run] = {}
    broken: list[str] = []
    places = [Path(path) for path in paths]
    for path in places:
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        for file in files:
            try:
                document = _read(file)
            except RegrowError as error:
                if file is path:
                    raise
                broken.append(str(error))
                continue
            if not _is_record(document):
                if file is path:
                    raise RegrowError(f"{file} is no run record: it has no 'id', 'format' and 'config'")
                continue
            if document["format"] != FORMAT:
                raise RegrowError(
                    f"{file} is of format {document['format']!r}, this regrow reads {FORMAT}: update regrow"
                )
            found.setdefault(str(document["id"]), Run(document))
    if not found:
        raise RegrowError(f"no run record in {', '.join(map(str, places)) or 'nothing'}; give files or folders of them")
    return list(found.values()), broken


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RegrowError(f"cannot read {file} ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise RegrowError(f"{file} is not valid JSON: {' '.join(str(error).split())}") from None


def _is_record(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and {"id", "format", "config"} <= document.keys()
        and isinstance(document["config"], dict)
    )
