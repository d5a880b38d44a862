"""Text files that may be packed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from regrow.errors import RegrowError

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
"""By the last suffix of a file's name; other files are opened as they are."""

BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""What reading a truncated or damaged file raises."""


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file, compressed or not. Decoded line by line, so that an error has its number."""
    opener = OPENERS.get(path.suffix.lower(), open)
    number = 0
    try:
        handle: IO[bytes]
        with opener(path, "rb") as handle:
            for number, raw in enumerate(handle, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RegrowError(
            f"{path}, line {number}: not UTF-8 text (byte {error.start} of the line); convert the file to UTF-8"
        ) from error
    except BROKEN as error:
        raise RegrowError(
            f"{path} cannot be read beyond line {number} ({error}): the file is truncated, damaged or not in "
            "the format its name says; fetch or pack it again"
        ) from error
