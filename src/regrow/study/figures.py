"""Pictures of runs for a page of paper: ``regrow report --figures DIR`` (needs ``regrow[plot]``).

Each is written as PNG and SVG, without a plotting window. ``docs/report.md`` says what each shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrow.errors import RegrowError
from regrow.study.analysis import Configuration, best_learning_rates, configurations, frontier_members
from regrow.study.claims import claims
from regrow.study.claims.figures import claim_figures, log_axis
from regrow.study.pictures import pictures
from regrow.study.report import family_order
from regrow.study.runs import Run, entries, number

COLORS = ("#0b0b0b", "#2a78d6", "#1baf7a", "#eda100", "#008300", "#4a3aa7", "#e34948", "#e87ba4")
"""As in the page: dense is black."""
_OTHER = "#898781"
_STYLE = {
    "font.size": 9,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e1e0d9",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "regrow",  # the same runs give the same file
}
_KINDS = ("png", "svg")


def write_figures(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Draw ``pareto``, ``curves``, ``topology``, ``patterns`` and ``c1`` to ``c11``; returns the files.

    Losses of different tasks (data, vocabulary, length) do not belong in one picture: of several tasks, the one with
    the most runs is drawn.

    Raises:
        RegrowError: matplotlib is not installed, or the folder cannot be written.
    """
    with _matplotlib() as figure_class:
        folder = Path(folder)
        task, _ = Counter(run.task for run in runs).most_common(1)[0]
        runs = [run for run in runs if run.task == task]
        every = configurations(runs)
        tuned = [t.best for t in best_learning_rates(every)]
        colors = {family: COLORS[i] if i < len(COLORS) else _OTHER for i, family in enumerate(family_order(every))}
        figures = {"pareto": _pareto(figure_class, tuned, colors), "curves": _curves(figure_class, runs, colors)}
        if any(run.updates for run in runs):
            figures["topology"] = _topology(figure_class, runs, colors)
        pictured = next((run for run in runs if not run.dense and pictures(run)), None)
        if pictured is not None:
            figures["patterns"] = _patterns(figure_class, pictured)
        of_claims = claim_figures(figure_class, claims(best_learning_rates(every)))
        for figure in of_claims.values():
            _legend(figure)
        figures |= of_claims
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                for kind in _KINDS:
                    path = folder / f"{name}.{kind}"
                    figure.savefig(path, dpi=200, metadata={"Date": None} if kind == "svg" else None)
                    written.append(path)
        except OSError as error:
            raise RegrowError(f"cannot write figures to {folder} ({error.strerror})") from None
    return written


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """The class of figures without a window; style only for as long as we draw."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise RegrowError('--figures needs matplotlib: pip install "regrow[plot]"') from None
    with rc_context(_STYLE):
        yield Figure


def _pareto(figure_class: Any, tuned: Sequence[Configuration], colors: dict[str, str]) -> Any:
    """Loss against FLOPs and seconds, side by side."""
    figure = figure_class(figsize=(7.2, 3.2))
    for axes, cost, title in zip(
        figure.subplots(1, 2, sharey=True), ("flops", "seconds"), ("training FLOPs", "training seconds"), strict=True
    ):
        front = [point for c in frontier_members(tuned, cost) if (point := c.point(cost))]
        if front:
            axes.plot(*zip(*front, strict=True), color="#c3c2b7", linewidth=4, zorder=1, drawstyle="steps-post")
        for family, color in colors.items():
            members = [c for c in tuned if c.first.family == family and c.point(cost)]
            members.sort(key=lambda c: c.point(cost) or (0.0, 0.0))
            if members:
                x, y = zip(*(c.point(cost) or (0.0, 0.0) for c in members), strict=True)
                bars = [(c.loss.half_width or 0.0) if c.loss else 0.0 for c in members]
                axes.errorbar(x, y, yerr=bars, color=color, marker="o", markersize=4, linewidth=1, label=family)
        axes.set_xlabel(title)
        log_axis(axes)
        if not axes.has_data():
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=_OTHER)
    figure.axes[0].set_ylabel("held-out MLM loss")
    _legend(figure)
    return figure


def _curves(figure_class: Any, runs: Sequence[Run], colors: dict[str, str]) -> Any:
    """Training MLM loss by steps, tokens and seconds; the first tenth runs out of the picture."""
    figure = figure_class(figsize=(7.2, 3.0))
    settled: list[float] = []
    for axes, axis in zip(figure.subplots(1, 3, sharey=True), ("step", "tokens", "seconds"), strict=True):
        for run in runs:
            rows = [(number(row, axis), number(row, "mlm_loss")) for row in entries(run.record, "curve")]
            points = [(x, y) for x, y in rows if x is not None and y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colors[run.family], linewidth=0.8, label=run.family)
                settled += [y for _, y in points[len(points) // 10 :]]
        axes.set_xlabel(axis)
    if settled:
        margin = 0.05 * (max(settled) - min(settled)) or 0.1
        figure.axes[0].set_ylim(min(settled) - margin, max(settled) + margin)
    figure.axes[0].set_ylabel("MLM loss (training)")
    _legend(figure)
    return figure


def _topology(figure_class: Any, runs: Sequence[Run], colors: dict[str, str]) -> Any:
    figure = figure_class(figsize=(7.2, 2.8))
    for axes, name in zip(figure.subplots(1, 3), ("coverage", "churn", "fresh_removed"), strict=True):
        for run in runs:
            points = [(number(row, "step"), number(row, name)) for row in run.updates]
            known = [(x, y) for x, y in points if x is not None and y is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colors[run.family], linewidth=0.8, label=run.family)
        axes.set(xlabel="step", title=name.replace("_", " "))
    _legend(figure)
    return figure


def _legend(figure: Any) -> None:
    """One for all axes, a line per family."""
    found = dict(pair[::-1] for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True))
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)))


def _patterns(figure_class: Any, run: Run) -> Any:
    """A row per layer, at most twelve, and a column per moment: darker where more blocks are."""
    layers = dict(list(pictures(run).items())[:12])
    columns = max(len(moments) for moments in layers.values())
    figure = figure_class(figsize=(1.3 * columns + 1.6, 1.3 * len(layers) + 0.4))
    grid = figure.subplots(len(layers), columns, squeeze=False)
    for row, (name, moments) in zip(grid, layers.items(), strict=True):
        most = max(max(map(max, moment["counts"])) for moment in moments) or 1
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, moment in zip(row, moments, strict=False):
            step = moment["step"]
            axes.imshow(moment["counts"], cmap="Blues", vmin=0, vmax=most, interpolation="nearest", aspect="auto")
            axes.set_title(f"step {step:g}" if step is not None else "", fontsize=7)
        row[0].set_ylabel(name.replace("bert.encoder.layer.", "layer "), fontsize=6, rotation=0, ha="right")
    return figure
