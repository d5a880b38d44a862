"""Sentence pairs for next-sentence prediction, as in the original BERT: pure functions on token ids.

A document is a sequence of sentences, a sentence a non-empty list of token ids. Walking through a document,
sentences gather in a *chunk* until it is as long as the target; the chunk then becomes one pair:

* the first segment is its first ``k`` sentences, ``k`` uniform in ``1 .. n - 1`` (1 when the chunk has one
  sentence);
* with probability one half, and always when ``n = 1``, the second segment comes from another document, from a
  random sentence on (label 1); the ``n - k`` sentences it displaced are given back and begin the next chunk;
* otherwise the second segment is the rest of the chunk (label 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Sentences(Protocol):
    """A document: anything with a length and sentences by number, so that it may lie in a file, too."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sequence[int]: ...


_TRIES = 10


@dataclass(frozen=True)
class Pair:
    """Two token segments, without special tokens; `is_random` is the label: the second is from elsewhere."""

    first: list[int]
    second: list[int]
    is_random: bool


def pairs_from_document(
    document: Sentences,
    index: int,
    sample_other: Callable[[np.random.Generator], tuple[int, Sentences]],
    rng: np.random.Generator,
    max_tokens: int = 125,
    short_sequence_probability: float = 0.1,
) -> Iterator[Pair]:
    """Cut one document into pairs of together at most `max_tokens` tokens.

    Args:
        document: its sentences; `index`: its number, to tell it from others.
        sample_other: draws a random document, returned with its number. It is asked up to 10 times for
            another document than `index`; in a corpus of one document the last draw stands, as in the
            original.
        max_tokens: of both segments, so the sequence length less 3 for ``[CLS]``, ``[SEP]`` and ``[SEP]``.
        short_sequence_probability: with this probability the target length of the whole document is not
            `max_tokens` but uniform in ``2 .. max_tokens``, so that fine-tuning on short text meets no
            stranger.

    >>> story, other = [[1, 1], [2, 2], [3, 3]], [[9, 9]]
    >>> rng = np.random.default_rng(1)
    >>> for pair in pairs_from_document(story, 0, lambda rng: (1, other), rng, max_tokens=4):
    ...     print(pair)
    Pair(first=[1, 1], second=[2, 2], is_random=False)
    Pair(first=[3, 3], second=[9, 9], is_random=True)
    """
    target = max_tokens
    if rng.random() < short_sequence_probability:
        target = int(rng.integers(2, max_tokens, endpoint=True))
    start = 0
    while start < len(document):
        stop = _chunk_end(document, start, target)
        split = start + 1 if stop - start == 1 else int(rng.integers(start + 1, stop))
        first = _join(document, start, split)
        is_random = stop - start == 1 or rng.random() < 0.5
        if is_random:
            other = _another(index, sample_other, rng)
            begin = int(rng.integers(len(other)))
            second = _join(other, begin, _chunk_end(other, begin, target - len(first)))
            start = split  # the sentences from `split` to `stop` are given back
        else:
            second = _join(document, split, stop)
            start = stop
        yield Pair(*truncate_pair(first, second, max_tokens, rng), is_random)


def truncate_pair(
    first: list[int], second: list[int], max_tokens: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Drop tokens one by one from the longer segment, each from its front or its back at random.

    Which segment gives up how many tokens follows from the lengths alone (the second gives way in a tie), and
    how many of them at the front is binomial: no loop over tokens is needed.

    >>> first, second = truncate_pair([1] * 8, [2, 3], 6, np.random.default_rng(0))
    >>> first, second
    ([1, 1, 1, 1], [2, 3])
    """
    excess = len(first) + len(second) - max_tokens
    if excess <= 0:
        return first, second
    keep_first = min(len(first), max(max_tokens - len(second), (max_tokens + 1) // 2))
    return _trim(first, keep_first, rng), _trim(second, max_tokens - keep_first, rng)


def _trim(segment: list[int], keep: int, rng: np.random.Generator) -> list[int]:
    excess = len(segment) - keep
    if excess <= 0:
        return segment
    front = int(rng.binomial(excess, 0.5))
    return segment[front : front + keep]


def _chunk_end(document: Sentences, start: int, target: int) -> int:
    """Where the chunk from `start` ends: at the first sentence that reaches `target`, or at the end."""
    length = 0
    for stop in range(start, len(document)):
        length += len(document[stop])
        if length >= target:
            return stop + 1
    return len(document)


def _join(document: Sentences, start: int, stop: int) -> list[int]:
    joined: list[int] = []
    for number in range(start, stop):
        joined.extend(document[number])
    return joined


def _another(
    index: int, sample_other: Callable[[np.random.Generator], tuple[int, Sentences]], rng: np.random.Generator
) -> Sentences:
    for _ in range(_TRIES):
        number, document = sample_other(rng)
        if number != index:
            break
    return document


class StoredDocuments:
    """Encoded documents by number, read when asked for, so that they may be many more than memory holds.

    Args:
        encoded: a `datasets.Dataset` with the columns ``ids`` and ``ends`` of
            :func:`regrow.bert.tokenizer.encode_documents`.
        rows: which rows of it, int64.
    """

    def __init__(self, encoded: Any, rows: np.ndarray) -> None:
        self.encoded = encoded.with_format("arrow")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Sentences:
        row = self.encoded[int(self.rows[number])]
        return _StoredSentences(*(row[name][0].values.to_numpy() for name in ("ids", "ends")))


@dataclass(frozen=True)
class _StoredSentences:
    """One encoded document; a sentence becomes a list only when it is used."""

    ids: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int, /) -> list[int]:
        start = self.ends[number - 1] if number else 0
        sentence: list[int] = self.ids[start : self.ends[number]].tolist()
        return sentence
