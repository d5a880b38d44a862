"""``regrow inspect``: the sparse layers of a saved model, one by one."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regrow.bert.inspection import (
    Inspection,
    LayerReport,
    checkpoint_history,
    inspect_model,
    masked_layers,
    read_history,
    sparse_layers,
)
from regrow.bert.output import check_new, new_output
from regrow.bert.saved import load_saved, model_folder
from regrow.cli.parser import OneLineParser
from regrow.errors import RegrowError
from regrow.nn import named_sparse_layers

_LONGEST = 44  # letters of a name in the table
_HEADINGS = (
    ("out x in", 11),
    ("block", 5),
    ("blocks", 7),
    ("density", 7),
    ("norm", 8),
    ("mean |w|", 9),
    ("dead out", 8),
    ("dead in", 7),
    ("coverage", 8),
    ("churn", 6),
    ("at step", 7),
)


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow inspect",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show every sparse layer of a saved model: how many blocks it has, how large its weights are,\n"
        "which outputs and inputs no block reaches, and how its pattern moved. docs/inspect.md explains the columns.",
        epilog="examples:\n  regrow inspect runs/small --plot patterns.png\n"
        "  regrow inspect runs/small/checkpoints/checkpoint-2000 --layers '*.query' --json queries.json",
    )
    what = "directory of a run (of an unfinished one its newest checkpoint), a checkpoint, or a saved model"
    parser.add_argument("model", metavar="RUN|MODEL", help=what)
    parser.add_argument("--layers", default="*", metavar="GLOB", help="only layers with such a name, as '*.layer.0.*'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it as data, to a new file")
    what = "also draw where the blocks are, to a new .png, .svg or .pdf (needs regrow[plot])"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=what)
    asked = parser.parse_args(argv)
    outputs = [path for path in (asked.json, asked.plot) if path is not None]
    if len(set(outputs)) < len(outputs):
        raise RegrowError(f"--json and --plot are both {asked.plot}; name two files")
    for path in outputs:
        check_new(path)
    if asked.plot is not None:
        from regrow.bert.pattern_plot import check_can_draw, plot_patterns

        check_can_draw(asked.plot)
    model, history = _load(asked.model)
    report = inspect_model(model, layers=asked.layers, history=history)
    print(table(report, asked.model))
    if asked.json is not None:
        document = json.dumps(as_dict(report, asked.model), indent=1, allow_nan=False) + "\n"
        with new_output(asked.json) as aside:
            aside.write_text(document)
        print(asked.json)
    if asked.plot is not None:
        title = f"{asked.model}: where the blocks are"
        chosen = sparse_layers(model, asked.layers)
        with new_output(asked.plot) as aside:
            plot_patterns(chosen, aside, title=title)
        print(asked.plot)
    return 0


def table(report: Inspection, name: str) -> str:
    """A line per layer, and one of totals; what all names begin with is said once."""
    prefix = _common_prefix([layer.name for layer in report.layers])
    names = [_shortened(layer.name.removeprefix(prefix)) for layer in report.layers]
    width = max(len("layer"), *map(len, names))
    lines = [f"{name}: {report.model_class}, {len(report.layers)} sparse layers"]
    for option, count in report.options.items():
        lines.append(f"{count} layers are of option {option}; their sparse parts are listed")
    if prefix:
        lines.append(f"names begin with {prefix}")
    lines.append("  ".join([f"{'layer':{width}}", *(f"{heading:>{n}}" for heading, n in _HEADINGS)]))
    for short, layer in zip(names, report.layers, strict=True):
        cells = zip(_cells(layer), _HEADINGS, strict=True)
        lines.append("  ".join([f"{short:{width}}", *(f"{cell:>{n}}" for cell, (_, n) in cells)]))
    lines.append(
        f"density of these layers {report.density:.4g}; "
        f"the whole model: {report.parameters:,} parameters (dense {report.dense_parameters:,}), "
        f"{report.stored_bytes:,} bytes stored (dense {report.dense_bytes:,}, "
        f"{report.stored_bytes / report.dense_bytes:.1%})"
    )
    return "\n".join(lines)


def as_dict(report: Inspection, name: str) -> dict[str, Any]:
    """The same as JSON; null where nothing is known, or a number is not finite."""
    document = {"model": name, **asdict(report)}
    for layer in document["layers"]:
        unknown = {"coverage": None, "churn": None, "last_update": None}
        layer.update(layer.pop("history") or unknown)
        layer.update({key: layer[key] if math.isfinite(layer[key]) else None for key in ("norm", "mean_abs")})
    return document


def _load(path: str) -> tuple[Any, dict[str, Any]]:
    """The model and what is saved of its past."""
    if not Path(path).exists():  # a name on a hub, or an error
        return load_saved(path), {}
    folder = model_folder(path)
    model = load_saved(folder)
    if next(named_sparse_layers(model), None) is None:
        masked = masked_layers(folder)
        how = (
            f"its {len(masked)} masked layers keep dense weights, of which a mask says what trains (method acdc)"
            if masked
            else "it has no sparse layer"
        )
        raise RegrowError(f"{folder} is a dense model: {how}, so there is nothing to inspect")
    return model, checkpoint_history(folder, model) | read_history(folder)


def _cells(layer: LayerReport) -> list[str]:
    history = layer.history
    return [
        f"{layer.out_features} x {layer.in_features}",
        str(layer.block_size),
        str(layer.n_blocks),
        f"{layer.density:.4f}",
        f"{layer.norm:.4g}",
        f"{layer.mean_abs:.3g}",
        str(layer.dead_outputs),
        str(layer.dead_inputs),
        "-" if history is None else f"{history.coverage:.4f}",
        "-" if history is None or history.churn is None else f"{history.churn:.4f}",
        "-" if history is None or history.last_update is None else str(history.last_update),
    ]


def _common_prefix(names: Sequence[str]) -> str:
    """Whole components, and never a whole name.

    >>> _common_prefix(["bert.layer.0.key", "bert.layer.1.key"]), _common_prefix(["a.b"]), _common_prefix(["ab", "ac"])
    ('bert.layer.', 'a.', '')
    """
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
