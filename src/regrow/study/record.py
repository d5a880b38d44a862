"""The record of a finished run: one JSON file with everything that tables and pictures are made of."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from regrow.bert.flops import bert_skeleton
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.run import RunDirectory
from regrow.bert.sizes import bert_config
from regrow.errors import RegrowError
from regrow.methods import method_class
from regrow.nn.flops import count_flops
from regrow.nn.flops_family import ATTENTION, ENCODER
from regrow.nn.options import LayerOption
from regrow.nn.replace import DEFAULT

FORMAT = 1
POINTS = 200
"""Most points of a curve; more would be seen by nobody."""
_VERSIONS = ("torch", "transformers", "tokenizers", "datasets", "numpy")
_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "format": int,
    "spec": dict,
    "config": dict,
    "machine": dict,
    "versions": dict,
    "flops": dict,
    "seconds": (int, float),
    "tokens": int,
    "memory": dict,
    "final": dict,
    "curve": list,
    "evaluations": list,
    "topology": dict,
    "patterns": dict,
}
_NUMBERS = {
    "flops": ("per_sequence_paper", "train_paper"),
    "memory": ("peak_rss",),
    "final": ("eval_mlm_loss", "eval_nsp_loss"),
}
_POINT = {"curve": ("step", "tokens", "seconds", "mlm_loss"), "evaluations": ("step", "seconds", "eval_mlm_loss")}


@dataclass(frozen=True)
class RunRecord:
    """What became of a run. A number that was not finite is ``None``: JSON has no other.

    Args:
        id: :attr:`regrow.study.RunSpec.id`.
        spec: what differs from the defaults.
        config: every option.
        machine: :func:`regrow.kernels.machine.describe_machine`.
        versions: of regrow and of what it stands on.
        flops: ``per_sequence_paper`` and ``train_paper``, see :func:`paper_flops`.
        seconds: of training, over all restarts; evaluations and checkpoints not counted.
        tokens: real ones that were trained on.
        memory: ``peak_rss`` in bytes, of the process that finished the run.
        final: metrics on the held-out set at the end.
        curve: training log, at most 200 points.
        evaluations: every evaluation.
        topology: ``updates`` (means over layers, at most 200) and ``layers`` (each layer at its last update).
        patterns: layer to up to five pictures, see :class:`regrow.study.patterns.PatternSnapshots`.
    """

    id: str
    spec: dict[str, Any]
    config: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    flops: dict[str, float]
    seconds: float
    tokens: int
    memory: dict[str, int]
    final: dict[str, float | None]
    curve: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    topology: dict[str, Any]
    patterns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, path: str | Path) -> None:
        """Write the record; it appears whole or not at all."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record.

        Raises:
            RegrowError: missing, damaged, of another format, or not what :class:`RunRecord` describes; the message
                names the file and the entry.
        """
        document = read_json(Path(path))
        check_record(document, str(path))
        return cls(**{name: document[name] for name in _SCHEMA if name in document})


def check_record(document: Mapping[str, Any], source: str) -> None:
    """Raise :class:`RegrowError` unless ``document`` is a record; ``source`` is named in the message."""
    if document.get("format") != FORMAT:
        raise RegrowError(f"{source}: record format {document.get('format')!r}, this regrow reads {FORMAT}")
    for name, kind in _SCHEMA.items():
        if name not in document:
            if name == "patterns":
                continue
            raise RegrowError(f"{source}: no run record, it lacks {name!r}")
        if not isinstance(document[name], kind) or isinstance(document[name], bool):
            raise RegrowError(f"{source}: {name!r} is {_kind(document[name])}, which no run record has")
    for name, entries in _NUMBERS.items():
        for entry in entries:
            if not _is_number(document[name].get(entry, "missing")):
                raise RegrowError(f"{source}: {name!r} lacks the number {entry!r}")
    for name, entries in _POINT.items():
        for index, point in enumerate(document[name]):
            if not isinstance(point, dict) or not all(_is_number(point.get(entry, "")) for entry in entries):
                raise RegrowError(f"{source}: point {index} of {name!r} lacks one of {', '.join(entries)}")
    if not isinstance(document["topology"].get("updates"), list) or "layers" not in document["topology"]:
        raise RegrowError(f"{source}: 'topology' lacks 'updates' or 'layers'")


def summarise(run: RunDirectory) -> dict[str, Any]:
    """The entries of a record that a run directory knows: seconds, tokens, final, curve, evaluations, topology.

    Raises:
        RegrowError: the run was never evaluated, so it did not finish.
    """
    lines = [{name: _stored(value) for name, value in line.items()} for line in run.read_metrics()]
    evaluations = [line for line in lines if "eval_mlm_loss" in line]
    if not evaluations:
        raise RegrowError(f"{run.path} holds no evaluation; the run has not finished")
    updates = [
        {"step": line["step"], **{name.removeprefix("update_"): v for name, v in line.items() if "update_" in name}}
        for line in lines
        if "update_coverage" in line
    ]
    layers = {line["layer"]: line for line in run.read_updates()}  # the last of each stays
    final = {name: value for name, value in evaluations[-1].items() if name.startswith("eval_")}
    return {
        "seconds": evaluations[-1]["seconds"],
        "tokens": evaluations[-1]["tokens"],
        "final": final,
        "curve": thinned([line for line in lines if "mlm_loss" in line]),
        "evaluations": evaluations,
        "topology": {
            "updates": thinned(updates),
            "layers": {name: {k: v for k, v in line.items() if k != "layer"} for name, line in layers.items()},
        },
    }


def thinned(points: list[Any], most: int = POINTS) -> list[Any]:
    """At most so many points, evenly spread, first and last among them.

    Example:
        >>> thinned(list(range(10)), most=4)
        [0, 3, 6, 9]
    """
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def paper_flops(config: PretrainConfig, layer: LayerOption | None = None) -> dict[str, float]:
    """Non-embedding FLOPs as the paper counts them: of a sequence, and of the whole training.

    :func:`regrow.count_flops` counts the dense encoder. Its linears are then taken times the density, and all of it
    three times: forward and, by the paper's convention, twice as much backward. A density that moves (gmp), varies
    over layers or is not that of a whole number of blocks counts as the one that was asked for; updates of the pattern
    are not counted. Masked dense weights (acdc) count in full. Of another ``layer`` than plain blocks every product is
    counted, by whole blocks.

    Example:
        >>> f"{paper_flops(PretrainConfig(size='base', density=0.1))['per_sequence_paper']:.3g}"
        '8.33e+09'

    Reference: Dietrich et al. 2021, arXiv 2108.06277, appendix A.2.
    """
    linears, attention = _dense_forward(config.size, config.max_length)
    density = 1.0 if config.dense or method_class(config.method).dense_layout else config.density
    sequence = 3.0 * (linears * density + attention)
    if layer is not None and layer.name != DEFAULT and not config.dense:
        sequence = _with_layer(
            config.size, config.max_length, config.density, config.block_size, config.distribution, layer
        )
    return {"per_sequence_paper": sequence, "train_paper": sequence * config.batch_size * config.steps}


@cache  # a study asks for many runs of few sizes
def _dense_forward(size: str, length: int) -> tuple[int, int]:
    """FLOPs of a sequence's forward pass through a dense encoder: its linears, and its attention."""
    config = bert_config(size, vocab_size=1, max_length=length)  # the embeddings are not counted
    model = bert_skeleton(config, density=None, block_size=1)
    report = count_flops(model, batch_size=1, seq_length=length, convention="paper")
    return report.parts[ENCODER].forward, report.parts[ATTENTION].forward


@cache
def _with_layer(
    size: str, length: int, density: float, block_size: int, distribution: str, layer: LayerOption
) -> float:
    config = bert_config(size, vocab_size=1, max_length=length)
    densities = PretrainConfig(distribution=distribution).densities
    model = bert_skeleton(config, density=density, block_size=block_size, distribution=densities, layer=layer)
    return count_flops(model, batch_size=1, seq_length=length, convention="paper").per_sequence


def versions() -> dict[str, str]:
    """Of regrow, Python and the libraries that results depend on."""
    from regrow import __version__

    found = {"regrow": __version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # installed without metadata
            found[name] = "unknown"
    return found


def load_records(paths: Iterable[str | Path]) -> list[RunRecord]:
    """The records of files and study folders, each run once, in order of path.

    Raises:
        RegrowError: a path does not exist, or a file is no record.
    """
    records: dict[str, RunRecord] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise RegrowError(f"{path}: no such file or folder")
        folder = path / "records" if (path / "records").is_dir() else path
        for file in sorted(folder.glob("*.json")) if path.is_dir() else [path]:
            record = RunRecord.load(file)
            records.setdefault(record.id, record)
    return list(records.values())


def write_json(path: Path, document: Any) -> None:
    """Write JSON aside, flush it to the disk, then rename: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)  # mkstemp's files are private
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RegrowError: missing or no JSON object.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise RegrowError(f"cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise RegrowError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise RegrowError(f"{path} must hold a JSON object, it holds {_kind(document)}")
    return document


def _stored(value: Any) -> Any:
    """A number of a log line to six digits, which halves a record; ``None`` where there is none."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _kind(value: Any) -> str:
    return {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }.get(type(value), "null")
