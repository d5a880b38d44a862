"""Pictures of patterns: where a weight's blocks are, counted in the cells of a small grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from regrow.study.runs import Run, entries, number

MAX_EDGE = 64
"""Cells of a picture to a side; larger ones are left out."""


def pictures(run: Run) -> dict[str, list[dict[str, Any]]]:
    """By layer, the moments ``{"step", "counts"}`` that hold a picture; layers without one are left out.

    Example:
        >>> pictures(Run({"patterns": {"a": [{"step": 0, "counts": [[1, 2]]}, {"step": 9, "counts": "?"}], "b": []}}))
        {'a': [{'step': 0.0, 'counts': [[1, 2]]}]}
    """
    patterns = run.record.get("patterns")
    found = {
        str(layer): [
            {"step": number(moment, "step"), "counts": moment["counts"]}
            for moment in entries(patterns, layer)
            if _is_picture(moment.get("counts"))
        ]
        for layer in (patterns if isinstance(patterns, dict) else ())
    }
    return {layer: moments for layer, moments in found.items() if moments}


def spread(runs: Iterable[Run]) -> tuple[float | None, float | None]:
    r"""How evenly the last patterns use inputs and outputs, mean over layers and runs: 1 is evenly, 1/n a single one.

    The participation ratio :math:`(\sum p)^2 / (n \sum p^2)` of the counts per input (column), and per output (row).

    Example:
        >>> spread([Run({"patterns": {"layer": [{"step": 0, "counts": [[4, 0], [4, 0]]}]}})])
        (0.5, 1.0)
    """
    inputs, outputs = [], []
    for run in runs:
        for moments in pictures(run).values():
            counts = moments[-1]["counts"]
            outputs.append(_participation([sum(row) for row in counts]))
            inputs.append(_participation([sum(column) for column in zip(*counts, strict=True)]))
    return _mean(inputs), _mean(outputs)


def _participation(counts: Sequence[float]) -> float | None:
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _is_picture(counts: object) -> bool:
    """Whether this is a rectangle of numbers from zero on, small enough to draw."""
    if not isinstance(counts, list) or not 0 < len(counts) <= MAX_EDGE:
        return False
    if not all(isinstance(row, list) and 0 < len(row) <= MAX_EDGE for row in counts):
        return False
    cells = [cell for row in counts for cell in row]
    one_width = len({len(row) for row in counts}) == 1
    return one_width and all(type(cell) in (int, float) and 0 <= cell < 1e9 for cell in cells)
