"""A claim, the table that bears on it, and how a verdict comes about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from regrow.study.pareto import Estimate

Cell = str | int | float | None
Panels = dict[str, dict[str, list[tuple[float | str, Estimate]]]]
"""What is on the horizontal axis -> series -> points; a text is a category."""


@dataclass
class Claim:
    """A table, pictures and a verdict; ``missing`` says which runs would be needed for more."""

    id: str
    text: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    votes: list[int] = field(default_factory=list)
    panels: Panels = field(default_factory=dict)
    joined: bool = True
    """Whether points of a series are settings in a row, or outcomes that no line joins."""

    @property
    def verdict(self) -> str:
        """One of supported, contradicted, mixed, undecided, no data."""
        if not self.votes:
            return "no data"
        counted = set(self.votes) - {0}
        return {0: "undecided", 2: "mixed"}.get(len(counted), "supported" if counted == {1} else "contradicted")

    def row(self, *cells: Cell) -> None:
        """Add a line to the table."""
        self.rows.append(list(cells))

    def point(self, axis: str, series: str, x: Any, loss: Estimate | None) -> None:
        """Add a loss to the picture of ``axis``; one that is not known is left out."""
        if x is not None and loss is not None:
            self.panels.setdefault(axis, {}).setdefault(series, []).append((x, loss))

    def markdown(self) -> str:
        """A heading with the verdict, the table, and what was found and is missing."""

        def line(cells: Iterable[object]) -> str:
            return f"| {' | '.join(map(str, cells))} |"

        def text(cell: Cell) -> str:
            if cell is None:
                return ""
            plain = f"{cell:.3g}" if isinstance(cell, float) else str(cell)
            return plain.replace("*", r"\*").replace("|", r"\|")  # as a glob of layer names has

        parts = [f"## {self.id}: {self.verdict}", self.text]
        if self.rows:
            head = [line(self.columns), line(["---"] * len(self.columns))]
            parts.append("\n".join([*head, *(line(map(text, row)) for row in self.rows)]))
        notes = [*dict.fromkeys(self.findings), *(f"Missing: {what}" for what in dict.fromkeys(self.missing))]
        parts.append("\n".join(f"- {note}" for note in notes))
        return "\n\n".join(part for part in parts if part)

    def vote(self, found: Estimate | None, wanted: int) -> None:
        """Count a difference that the claim says is negative (``wanted=-1``) or positive."""
        if found is not None:
            self.votes.append(found.sign * wanted)

    def vote_same(self, found: Estimate | None, margin: float) -> None:
        """Count a difference that the claim says is none: for it within the margin, against it surely outside."""
        if found is None:
            return
        if found.half_width is None:
            self.votes.append(0)
        elif abs(found.mean) + found.half_width < margin:
            self.votes.append(1)
        else:
            self.votes.append(-1 if abs(found.mean) - found.half_width > margin else 0)


def exact(value: float | None) -> Estimate | None:
    """A number without an interval."""
    return None if value is None else Estimate(value, None, None, 1)


def shown(found: Estimate | None, digits: int = 3) -> str | None:
    """``mean +- half width (n)``.

    Example:
        >>> shown(Estimate(1.5, 0.1, 0.25, 3)), shown(Estimate(1.5, None, None, 1)), shown(None)
        ('1.500 ± 0.250 (n=3)', '1.500 (n=1)', None)
    """
    if found is None:
        return None
    width = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:.{digits}f}{width} (n={found.n})"


def signed(found: Estimate | None) -> str | None:
    """As :func:`shown`, with a plus: for differences."""
    text = shown(found)
    return text if text is None or found is None or found.mean < 0 else f"+{text}"
