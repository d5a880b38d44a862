"""A claim, the table that bears on it, and how a verdict comes about."""

from __future__ import annotations

from dataclasses import dataclass, field

from regrow.study.pareto import Estimate

Cell = str | int | float | None


@dataclass
class Claim:
    """A table and a verdict; ``missing`` says which runs would be needed for more."""

    id: str
    text: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    votes: list[int] = field(default_factory=list)

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
