"""A picture for each claim: the losses it compares, with their intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Any

from regrow.study.claims.claim import Claim

_DENSE, _COLORS = "#0b0b0b", ("#2a78d6", "#eda100", "#1baf7a", "#e34948", "#4a3aa7", "#e87ba4")


def claim_figures(figure_class: Any, found: Iterable[Claim]) -> dict[str, Any]:
    """Figures by the claim's name in small letters, of the claims that have something to draw."""
    return {claim.id.lower(): _figure(figure_class, claim) for claim in found if claim.panels}


def log_axis(axes: Any) -> None:
    """A logarithmic x axis whose few ticks can be read."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 6 * low else MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda x, _: EngFormatter(sep="")(x) if x >= 1000 else f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _figure(figure_class: Any, claim: Claim) -> Any:
    figure = figure_class(figsize=(3.6 * max(len(claim.panels), 1.4), 3.2))
    colors, color_of = cycle(_COLORS), dict[str, str]()
    style = {"markersize": 4, "linewidth": 1, "capsize": 2, "linestyle": "-" if claim.joined else ""}
    for axes, (name, series) in zip(
        figure.subplots(1, len(claim.panels), sharey=True, squeeze=False)[0], claim.panels.items(), strict=True
    ):
        for label, points in series.items():
            if label not in color_of:
                color_of[label] = _DENSE if label.startswith("dense") else next(colors)
            # categories in the order in which the claim ranks them, numbers from left to right
            points = points if isinstance(points[0][0], str) else sorted(points, key=lambda point: point[0])
            x = [point[0] for point in points]
            y = [point[1].mean for point in points]
            bars = [point[1].half_width or 0.0 for point in points]
            axes.errorbar(x, y, yerr=bars, color=color_of[label], marker="o", label=label, **style)
        axes.set_xlabel(name)
        numbers = {x for points in series.values() for x, _ in points if not isinstance(x, str)}
        if numbers and min(numbers) > 0 and max(numbers) >= 6 * min(numbers):
            log_axis(axes)
            if all(isinstance(x, int) for x in numbers):  # settings, not measurements: each has its tick
                axes.set_xticks(sorted(numbers), list(map(str, sorted(numbers))))
    figure.axes[0].set_ylabel("held-out MLM loss")
    figure.suptitle(f"{claim.id}: {claim.verdict}", fontsize=9)
    return figure
