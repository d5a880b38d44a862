"""Rows of TSV, CSV and JSON Lines files, with the place of each for errors.

=========  ==================================================================================================
``.tsv``   tab-separated, no quoting: a quotation mark is text, as in GLUE's files
``.csv``   comma-separated, fields with commas or line ends in double quotes
``.jsonl`` one JSON object a line
=========  ==================================================================================================

Each may be compressed: ``.xz``, ``.gz``, ``.bz2``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regrow.bert.files import OPENERS, numbered_lines
from regrow.errors import RegrowError

SUFFIXES = (".tsv", ".csv", ".jsonl")


def table_format(path: Path) -> str | None:
    """The suffix that says how to read ``path``, None if there is no such.

    >>> table_format(Path("train.tsv.xz")), table_format(Path("train.pdf"))
    ('.tsv', None)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def read_table(path: Path, columns: Sequence[str], header: Sequence[str] = ()) -> Iterator[tuple[str, list[Any]]]:
    """The values of ``columns`` in every row, after the row's place (``"FILE, line 3"``).

    Args:
        path: a file of a format named above.
        columns: names, as in the file's first line or as JSON keys.
        header: names of all columns, for a TSV or CSV file whose first line is data already.

    Raises:
        RegrowError: the file cannot be read, lacks a column, or a row has more or fewer fields than the header.
    """
    kind = table_format(path)
    if kind is None:
        raise RegrowError(f"{path} has no known format; a table is {', '.join(SUFFIXES)}, or one of them compressed")
    if not path.is_file():
        raise RegrowError(f"{path} does not exist; check the path")
    if kind == ".jsonl":
        yield from _json_rows(path, columns)
        return
    rows = _csv_rows(path) if kind == ".csv" else _tsv_rows(path)
    names = list(header)
    for where, fields in rows:
        if not names:
            names = fields
            _check_columns(columns, names, where)
            continue
        if len(fields) != len(names):
            raise RegrowError(f"{where}: {len(fields)} fields where {len(names)} are expected ({', '.join(names)})")
        row = dict(zip(names, fields, strict=True))
        yield where, [row[column] for column in columns]


def _tsv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    for number, line in numbered_lines(path):
        if line.strip():
            yield f"{path}, line {number}", line.rstrip("\r\n").split("\t")


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    number = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise RegrowError(f"{path}, line {number}: {error}; is a quotation mark missing?") from None
        if fields is None:
            return
        if fields:
            yield f"{path}, line {number}", fields
        number = reader.line_num + 1


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RegrowError(f"{where}: not JSON ({error}); the file must hold one JSON object per line") from None
        if not isinstance(row, dict):
            raise RegrowError(f"{where}: not a JSON object")
        _check_columns(columns, list(row), where)
        yield where, [row[column] for column in columns]


def _check_columns(columns: Sequence[str], names: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in names:
            raise RegrowError(
                f"{where}: no column {column!r} among {', '.join(map(repr, names))}; name the right ones with "
                "--text_columns and --label_column"
            )
