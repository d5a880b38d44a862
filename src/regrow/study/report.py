"""One page about many runs: ``regrow report``.

The page is one file without any reference outside itself: data, style and script are inside. Records are not to be
trusted: they enter as JSON in which no tag can begin, the script writes them as text only, and the page's own content
security policy allows nothing but the script and the style it was made with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from regrow import __version__
from regrow.errors import RegrowError
from regrow.study.analysis import Configuration, Tuned, best_learning_rates, configurations, frontier_members
from regrow.study.claims import claims
from regrow.study.pictures import pictures
from regrow.study.runs import Key, Run, entries, number

MAX_POINTS = 400
"""Of one curve: a page of hundreds of runs must stay small. Longer curves are thinned evenly."""


def write_report(runs: Sequence[Run], output: str | Path, *, title: str = "Runs", notes: Sequence[str] = ()) -> Path:
    """Write the page.

    Args:
        notes: lines shown at its head, such as files that could not be read.

    Raises:
        RegrowError: no runs, or the file cannot be written.
    """
    return _written(Path(output), render(report_data(runs, title=title, notes=notes)), "--output")


def write_claims(runs: Sequence[Run], output: str | Path) -> Path:
    """Write what the runs say about each claim of the paper as a Markdown page.

    Raises:
        RegrowError: the file cannot be written.
    """
    found = claims(best_learning_rates(configurations(runs)))
    head = "# What the runs say about each claim\n\nA number after ± is half a 95% interval over n seeds."
    return _written(Path(output), "\n\n".join([head, *(claim.markdown() for claim in found)]) + "\n", "--claims")


def _written(path: Path, text: str, option: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RegrowError(f"cannot write {path} ({error.strerror}); choose another {option}") from None
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page as text, from :func:`report_data`."""
    folder = files("regrow.study")
    names = ("report.html", "report.css", "chart.js", "report.js")
    template, style, *scripts = ((folder / name).read_text(encoding="utf-8") for name in names)
    script = "".join(scripts)
    parts = {
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": as_script_data(data),
    }
    for name, text in parts.items():
        # one at a time, and the data last: what it holds is not looked through for placeholders
        template = template.replace(f"@@{name}@@", text)
    return template


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def as_script_data(data: Any) -> str:
    """JSON that can stand inside a ``<script>`` element: no ``<``, ``>`` or ``&``, and null for what is not finite.

    Example:
        >>> as_script_data({"</script>": float("inf")})
        '{"\\\\u003c/script\\\\u003e":null}'
    """
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def report_data(runs: Sequence[Run], *, title: str = "Runs", notes: Sequence[str] = ()) -> dict[str, Any]:
    """Everything the page shows, as JSON can hold it.

    Raises:
        RegrowError: there is no run.
    """
    if not runs:
        raise RegrowError("a report needs at least one run")
    every = configurations(runs)
    tuned = best_learning_rates(every)
    families = family_order(every)
    tasks = list(dict.fromkeys(run.task for run in runs))
    labels = _labels(every)
    group_of = {id(run): i for i, c in enumerate(every) for run in c.runs}
    best = {id(t.best) for t in tuned}
    frontier = {cost: _frontiers(tuned, tasks, cost) for cost in ("flops", "seconds")}
    return {
        "title": title,
        "version": __version__,
        "notes": list(notes),
        "families": families,
        "tasks": [_task_name(task, tasks) for task in tasks],
        "groups": [
            {
                "label": labels[i],
                "family": c.first.family,
                "size": c.first.size,
                "steps": c.get("steps"),
                "task": tasks.index(c.first.task),
                "loss": asdict(c.loss) if c.loss else None,
                "flops": c.flops,
                "seconds": c.seconds,
                "best": id(c) in best,
                "frontier": {cost: id(c) in members for cost, members in frontier.items()},
            }
            for i, c in enumerate(every)
        ],
        "runs": [_run_data(run, group_of[id(run)], labels[group_of[id(run)]], tasks.index(run.task)) for run in runs],
        "claims": [
            {
                "id": claim.id,
                "text": claim.text,
                "verdict": claim.verdict,
                "columns": claim.columns,
                "rows": claim.rows,
                "findings": list(dict.fromkeys(claim.findings)),
                "missing": list(dict.fromkeys(claim.missing)),
            }
            for claim in claims(tuned)
        ],
    }


def family_order(every: Iterable[Configuration]) -> list[str]:
    """Families in the order of their colours: dense first, then by method, block edge and density."""
    runs = {c.first.family: c.first for c in every}
    by_kind = sorted(runs.values(), key=lambda run: (not run.dense, run.method, run.block_size or 0, run.density))
    return [run.family for run in by_kind]


def _frontiers(tuned: Iterable[Tuned], tasks: Iterable[Key], cost: str) -> set[int]:
    best = [t.best for t in tuned]
    return {id(c) for task in tasks for c in frontier_members([c for c in best if c.first.task == task], cost)}


def _task_name(task: Key, tasks: Sequence[Key]) -> str:
    """Only what distinguishes it from the other tasks."""
    told = [f"{name} {json.loads(value)}" for name, value in task if any((name, value) not in other for other in tasks)]
    return ", ".join(told) or "all runs"


def _labels(every: Sequence[Configuration]) -> list[str]:
    """Size and family, and whatever else is not the same in all configurations that share them."""
    keys = [dict(c.first.key) for c in every]
    heads = [f"{c.first.size} {c.first.family}" for c in every]
    values: dict[str, dict[str, set[str | None]]] = {}
    names = sorted({name for key in keys for name in key} - {"size", "method", "density", "block_size", "dense"})
    for head, key in zip(heads, keys, strict=True):
        for name in names:
            values.setdefault(head, {}).setdefault(name, set()).add(key.get(name))
    labels = []
    for head, key in zip(heads, keys, strict=True):
        told = [f"{name}={_short(key[name])}" for name in names if name in key and len(values[head][name]) > 1]
        labels.append(" ".join([head, *told]))
    return labels


def _short(value: str) -> str:
    decoded = json.loads(value)
    return f"{decoded:.4g}" if isinstance(decoded, float) else str(decoded)


_CURVES = ("mlm_loss", "nsp_loss", "tokens_per_second", "learning_rate", "grad_norm", "data_wait")
_EVALUATIONS = ("eval_mlm_loss", "eval_nsp_loss", "eval_mlm_accuracy", "eval_nsp_accuracy")
_UPDATES = ("coverage", "churn", "fresh_removed")


def _run_data(run: Run, group: int, label: str, task: int) -> dict[str, Any]:
    record, steps = run.record, number(run.config, "steps")
    curve = _columns(entries(record, "curve"), ("step", "tokens", "seconds", *_CURVES))
    evaluations = _columns(entries(record, "evaluations"), ("step", "tokens", "seconds", *_EVALUATIONS))
    for columns in (curve, evaluations):
        if run.flops is not None and steps and "step" in columns:
            columns["flops"] = [None if s is None else _rounded(run.flops * s / steps) for s in columns["step"]]
    return {
        "id": run.id,
        "group": group,
        "label": label,
        "task": task,
        "family": run.family,
        "size": run.size,
        "weights": run.weights,
        "method": run.method,
        "density": run.density,
        "block": run.block_size,
        "seed": run.seed,
        "n": None if run.dense or run.method == "static" else run.n_updates,
        "pr": None if run.dense or run.method == "static" else number(run.config, "drop_fraction"),
        "lr": run.learning_rate,
        "steps": steps,
        "loss": run.loss,
        "flops": run.flops,
        "seconds": run.seconds,
        "tokens": number(record, "tokens"),
        "memory": number(record, "memory", "peak_rss"),
        "coverage": run.coverage,
        "curve": curve,
        "evaluations": evaluations,
        "updates": _columns(list(run.updates), ("step", *_UPDATES)),
        "patterns": pictures(run),
        "layers": _mapping(record.get("topology"), "layers"),
        **{name: _mapping(record, name) for name in ("config", "spec", "machine", "versions", "final")},
    }


def _mapping(parent: Any, name: str) -> Mapping[str, Any]:
    value = parent.get(name) if isinstance(parent, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _columns(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, list[float | None]]:
    """Rows as columns, thinned; a column that no row has is left out."""
    if len(rows) > MAX_POINTS:
        rows = [rows[round(i * (len(rows) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    found = {name: [_rounded(number(row, name)) for row in rows] for name in names}
    return {name: column for name, column in found.items() if any(value is not None for value in column)}


def _rounded(value: float | None) -> float | None:
    """Six digits: more than a screen shows, in a third of the bytes."""
    if value is None or value == int(value):
        return None if value is None else int(value)
    return float(f"{value:.6g}")
