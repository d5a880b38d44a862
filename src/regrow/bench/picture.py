"""Pictures of benchmarks, without a window."""

from __future__ import annotations

from typing import Any

from regrow.errors import RegrowError


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
        RegrowError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RegrowError('--plot needs matplotlib: pip install "regrow[plot]"') from None
    return Figure(figsize=(width, height), layout="constrained")
