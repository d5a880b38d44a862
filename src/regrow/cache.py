"""Prepared data on disk, by content; a result appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root(folder: str | Path | None = None) -> Path:
    """``folder``, or ``$REGROW_CACHE``, or ``~/.cache/regrow``."""
    return Path(folder or os.environ.get("REGROW_CACHE") or Path.home() / ".cache" / "regrow").expanduser()


@contextmanager
def written_aside(result: Path) -> Iterator[Path]:
    """A scratch directory beside ``result``; its subdirectory of the same name becomes ``result`` if all went well.

    Whoever prepares the same at the same time may win the race: then theirs stays.

    Example:
        >>> folder = Path(tempfile.mkdtemp()) / "answer"
        >>> with written_aside(folder) as aside:
        ...     (aside / "answer").mkdir()
        >>> folder.is_dir()
        True
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{result.name}-", dir=result.parent))
    try:
        yield aside
        try:
            (aside / result.name).rename(result)
        except OSError:
            if not result.exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
