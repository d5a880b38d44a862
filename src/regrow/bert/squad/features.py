"""From questions to the windows of tokens that a model reads."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from regrow.bert.squad.data import Answer, Question
from regrow.errors import RegrowError

_BATCH = 256  # texts to tokenize at once: the tokenizer's threads have work, and the bar moves


@dataclass(frozen=True, eq=False)
class Window:
    """``[CLS] question [SEP] part of the context [SEP]``, without padding.

    Args:
        question: index of the question.
        input_ids: int32, shape [length].
        context_start: position of the first token of the context.
        spans: int32, shape [n_context, 2]: where each context token begins and ends in the context, in characters.
        most_context: bool, shape [n_context]: whether no other window shows more on both sides of this token.
        start, end: positions of the first and the last token of the first answer, for training; 0 and 0 (``[CLS]``)
            when the window does not hold all of it, `None` when the question has no answers.
    """

    question: int
    input_ids: np.ndarray
    context_start: int
    spans: np.ndarray
    most_context: np.ndarray
    start: int | None
    end: int | None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def token_type_ids(self) -> np.ndarray:
        """int32, shape [length]: 0 for ``[CLS] question [SEP]``, 1 for the rest."""
        return (np.arange(len(self)) >= self.context_start).astype(np.int32)

    @property
    def offsets(self) -> list[tuple[int, int] | None]:
        """Where each token begins and ends in the context, in characters; `None` for what is no context."""
        spans = [(start, end) for start, end in self.spans.tolist()]
        return [None] * self.context_start + spans + [None]

    @property
    def is_max_context(self) -> np.ndarray:
        """bool, shape [length]: ``most_context`` for tokens of the context, `False` elsewhere."""
        flags = np.zeros(len(self), dtype=bool)
        flags[self.context_start : -1] = self.most_context
        return flags


def windows(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 384,
    stride: int = 128,
    query_length: int = 64,
    progress: bool = False,
) -> list[Window]:
    """Cut every context into overlapping windows, each behind its question; in the order of ``questions``.

    A window has room for ``max_length - n_query - 3`` tokens of the context. As in the original BERT, ``stride`` is how
    far a window begins behind the one before, *not* how much they overlap: windows begin every ``min(stride, room)``
    context tokens until one reaches the end. A token in several windows has most context in the one with the largest

        min(tokens to its left, tokens to its right) + 0.01 * (context tokens of the window)

    and in the earlier of two that are equal. Special tokens written out in a text are plain text. A context without any
    token gives one window without context.

    Args:
        tokenizer: a fast one, since it must say where tokens come from.
        max_length: most tokens of a window, ``[CLS]`` and ``[SEP]`` counted; that the model has so many positions is
            the caller's to check.
        query_length: most tokens of a question; what is beyond is cut off.
        progress: show a bar.

    Raises:
        RegrowError: a length or ``stride`` is out of range, or the tokenizer is not a fast one.

    Source: Devlin et al. 2019, arXiv 1810.04805, section 4.2, and its published code.

    >>> from regrow.bert.tokenizer import train_wordpiece
    >>> tokenizer = train_wordpiece(["who a b c d e"] * 2, vocab_size=40)
    >>> question = Question("q1", "who", "a b c d e", (Answer("d", 6),))
    >>> for window in windows([question], tokenizer, max_length=7, stride=2, query_length=2):
    ...     print(" ".join(tokenizer.convert_ids_to_tokens(window.input_ids)), window.start, window.most_context)
    [CLS] who [SEP] a b c [SEP] 0 [ True  True  True]
    [CLS] who [SEP] c d e [SEP] 4 [False  True  True]
    """
    _check(tokenizer, max_length, stride, query_length)
    # A context has some five questions: each text is tokenized once.
    texts = dict.fromkeys(text for q in questions for text in (q.question, q.context))
    encoded = _encode(list(texts), tokenizer, progress)
    result = []
    for index, question in enumerate(questions):
        query = encoded[question.question][0][:query_length]
        ids, spans = encoded[question.context]
        room = max_length - len(query) - 3
        answer = _answer_tokens(question.answers[0], spans) if question.answers else None
        bounds = _bounds(len(ids), room, stride)
        for (first, stop), most in zip(bounds, _most_context(bounds), strict=True):
            before = np.concatenate(([tokenizer.cls_token_id], query, [tokenizer.sep_token_id]))
            tokens = np.concatenate((before, ids[first:stop], [tokenizer.sep_token_id])).astype(np.int32)
            start, end = (None, None) if not question.answers else _labels(answer, first, stop, len(before))
            result.append(Window(index, tokens, len(before), spans[first:stop], most, start, end))
    return result


def _check(tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int, query_length: int) -> None:
    if not tokenizer.is_fast:
        raise RegrowError("tokenizer: a fast one is needed, which knows where its tokens come from")
    for name, value in (("stride", stride), ("query_length", query_length)):
        if value < 1:
            raise RegrowError(f"{name}={value}: must be at least 1")
    if max_length <= query_length + 3:
        raise RegrowError(
            f"max_length={max_length} leaves no room for the context beside query_length={query_length} and 3 special "
            f"tokens; raise max_length or lower query_length"
        )


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, progress: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ids and character spans of each text."""
    result = {}
    with tqdm(total=len(texts), desc="tokenizing", unit="text", leave=False, disable=not progress) as bar:
        for batch in (texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)):
            encoded = tokenizer(
                batch,
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                spans = np.array(offsets, dtype=np.int32).reshape(-1, 2)
                result[text] = np.array(ids, dtype=np.int32), _with_marks(spans, text)
            bar.update(len(batch))
    return result


def _with_marks(spans: np.ndarray, text: str) -> np.ndarray:
    """Count accents that a tokenizer strips, and so leaves out behind the last letter, to the token before them."""
    if text.isascii() or not len(spans):
        return spans
    ends = spans[:, 1].tolist()
    limits = [*spans[1:, 0].tolist(), len(text)]
    for number, limit in enumerate(limits):
        while ends[number] < limit and unicodedata.category(text[ends[number]]) == "Mn":
            ends[number] += 1
    return np.column_stack((spans[:, 0], ends)).astype(np.int32)


def _bounds(n_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First token, and the one behind the last, of every window of a context."""
    step = min(stride, room)  # or a context would have tokens in no window
    n_windows = 1 + max(0, -(-(n_tokens - room) // step))
    return [(first, min(first + room, n_tokens)) for first in range(0, n_windows * step, step)]


def _most_context(bounds: list[tuple[int, int]]) -> list[np.ndarray]:
    """For each window, which of its tokens it shows with more context than the others."""
    n_tokens = bounds[-1][1]
    best, owner = np.full(n_tokens, -1), np.zeros(n_tokens, dtype=int)
    for number, (first, stop) in enumerate(bounds):
        left = np.arange(stop - first)
        score = 100 * np.minimum(left, left[::-1]) + stop - first  # in hundredths, so that equal means equal
        better = score > best[first:stop]
        best[first:stop][better] = score[better]
        owner[first:stop][better] = number
    return [owner[first:stop] == number for number, (first, stop) in enumerate(bounds)]


def _answer_tokens(answer: Answer, spans: np.ndarray) -> tuple[int, int] | None:
    """First and last token that share a character with the answer; `None` if the tokenizer left out all of it."""
    shared = np.flatnonzero((spans[:, 0] < answer.start + len(answer.text)) & (spans[:, 1] > answer.start))
    return (int(shared[0]), int(shared[-1])) if len(shared) else None


def _labels(answer: tuple[int, int] | None, first: int, stop: int, before: int) -> tuple[int, int]:
    if answer is None or answer[0] < first or answer[1] >= stop:
        return 0, 0
    return answer[0] - first + before, answer[1] - first + before
