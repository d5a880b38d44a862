"""Questions, contexts and answers from files in the format of SQuAD v1.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

from regrow.bert.files import BROKEN, OPENERS
from regrow.errors import RegrowError

_KINDS = {str: "a string", list: "a list", dict: "an object", int: "an integer"}

_quoting = Repr()
_quoting.maxstring = 60
_quoted = _quoting.repr
"""For messages: on one line, and no longer than is of use."""


@dataclass(frozen=True)
class Answer:
    """A span of the context: ``context[start : start + len(text)] == text``, counted in Unicode characters."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question and the passage that answers it.

    Args:
        id: names the question in predictions; no two of a file are equal.
        question, context: as in the file, character by character.
        answers: what people answered, some of it more than once; empty if nobody was asked.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()


def read_squad(path: str | Path) -> list[Question]:
    r"""The questions of a SQuAD v1.1 file, in its order.

    The file is JSON in UTF-8, plain or compressed as ``.xz``, ``.gz`` or ``.bz2``. Text is kept as it is, and nothing
    is normalised, so that positions stay true. Questions without answers (``"answers": []``) are read too.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, and the data set's files of version 1.1.

    Raises:
        RegrowError: the file cannot be read, is in the format of version 2, holds no question, or an entry is wrong;
            the message says which: article, paragraph, question.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "one.json"
    >>> qa = {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 3}]}
    >>> article = {"title": "Letters", "paragraphs": [{"context": "By Ada.", "qas": [qa]}]}
    >>> _ = path.write_text(json.dumps({"version": "1.1", "data": [article]}))
    >>> read_squad(path)
    [Question(id='q1', question='Who?', context='By Ada.', answers=(Answer(text='Ada', start=3),))]
    """
    path = Path(path).expanduser()
    document = _object(_load(path), str(path))
    if str(document.get("version", "")).lower().removeprefix("v").startswith("2"):
        raise RegrowError(f"{path} is in the format of SQuAD v2, which is not supported; give a file of v1.1")
    questions: dict[str, Question] = {}
    for number, article in enumerate(_entry(document, "data", list, str(path)), start=1):
        for where, question in _article(article, f"{path}, article {number}"):
            if question.id in questions:
                raise RegrowError(f"{where}: another question has this id; give each question an id of its own")
            questions[question.id] = question
    if not questions:
        raise RegrowError(f"{path} holds no questions; give a file of SQuAD v1.1 with at least one")
    return list(questions.values())


def _load(path: Path) -> Any:
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or error or "it is truncated"
        raise RegrowError(f"cannot read {path}: {reason}; give a SQuAD v1.1 file that is whole") from None
    if not content.strip():
        raise RegrowError(f"{path} is empty; give a SQuAD v1.1 file")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RegrowError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RegrowError(f"{path} is not valid JSON ({error}); give a SQuAD v1.1 file") from None


def _article(article: Any, where: str) -> Iterator[tuple[str, Question]]:
    """The questions of an article, each with the words that say where it is."""
    if isinstance(article, dict) and isinstance(article.get("title"), str):
        where = f"{where} ({_quoted(article['title'])})"
    for number, paragraph in enumerate(_entry(article, "paragraphs", list, where), start=1):
        here = f"{where}, paragraph {number}"
        context = _text(paragraph, "context", here)
        for position, qa in enumerate(_entry(paragraph, "qas", list, here), start=1):
            identity = _text(qa, "id", f"{here}, question {position}")
            there = f"{here}, question {_quoted(identity)}"
            yield there, _question(qa, identity, context, there)


def _question(qa: dict[str, Any], identity: str, context: str, where: str) -> Question:
    if qa.get("is_impossible"):  # in its own words: version 2, whatever the file says of itself
        raise RegrowError(f"{where} has no answer (is_impossible): SQuAD v2 is not supported; give a file of v1.1")
    question = _text(qa, "question", where)
    entries = _entry(qa, "answers", list, where)
    return Question(identity, question, context, tuple(_answer(entry, context, where) for entry in entries))


def _answer(entry: Any, context: str, where: str) -> Answer:
    text, start = _text(entry, "text", where), _entry(entry, "answer_start", int, where)
    if not 0 <= start < len(context):
        raise RegrowError(f"{where}: answer_start={start} lies outside of the context of {len(context)} characters")
    found = context[start : start + len(text)]
    if found != text:
        first = context.find(text)
        fix = f"it first stands at {first}" if first >= 0 else "which does not hold it"
        raise RegrowError(
            f"{where}: at answer_start={start} the context has {_quoted(found)}, not the answer {_quoted(text)}; "
            f"{fix} (counted in Unicode characters from 0)"
        )
    return Answer(text, start)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RegrowError(f"{where}: an object of SQuAD v1.1 was expected, not {_quoted(value)}")
    return value


def _entry(record: Any, key: str, kind: type, where: str) -> Any:
    record = _object(record, where)
    if key not in record:
        raise RegrowError(f"{where}: {key!r} is missing; there are {_quoted(sorted(record))}")
    if type(record[key]) is not kind:  # exactly, for True is an int
        raise RegrowError(f"{where}: {key!r} must be {_KINDS[kind]}, not {_quoted(record[key])}")
    return record[key]


def _text(record: Any, key: str, where: str) -> str:
    text: str = _entry(record, key, str, where)
    if not text.strip():
        raise RegrowError(f"{where}: {key!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character, which is no text to any tokenizer
        raise RegrowError(f"{where}: {key!r} holds half a surrogate pair at character {error.start}") from None
    return text
