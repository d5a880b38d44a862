"""Files and directories that a command makes: new ones, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regrow.bert.run import writing
from regrow.errors import RegrowError


@contextmanager
def new_output(out: str | Path) -> Iterator[Path]:
    """A path in a scratch directory beside ``out``; what is written there becomes ``out`` if all went well.

    Raises:
        RegrowError: ``out`` exists, or cannot be written.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with new_output(folder / "answer.txt") as aside:
        ...     n = aside.write_text("42")
        >>> [path.name for path in folder.iterdir()]
        ['answer.txt']
    """
    out = Path(out)
    check_new(out)
    with writing(str(out), "choose another place"):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield scratch / out.name
        check_new(out)  # somebody else may have written it meanwhile
        with writing(str(out), "choose another place"):
            (scratch / out.name).rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_new(out: Path) -> None:
    """Raise :class:`RegrowError` if something is at ``out``."""
    if out.exists() or out.is_symlink():
        raise RegrowError(f"{out} exists; choose another name, nothing is overwritten")
