"""From start and end logits to answers: the best spans over all windows of a question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm.auto import tqdm

from regrow.bert.squad.data import Question
from regrow.bert.squad.features import Window
from regrow.errors import RegrowError


@dataclass(frozen=True)
class Candidate:
    """A possible answer.

    Args:
        text: ``context[start:end]``, character by character.
        start, end: where it begins, and the character behind it.
        score: start logit plus end logit.
        probability: among the candidates of its question, which sum to 1.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    progress: bool = False,
) -> dict[str, list[Candidate]]:
    """The ``n_best`` best answers of every question by its id, the best first.

    A span of tokens from i to j of a window scores

        start_logits[window, i] + end_logits[window, j],   i <= j < i + max_answer_length

    where both are tokens of the context and the window shows i with more context than the question's other windows, so
    that no span is judged twice. All such spans are compared. Of equal texts the best stays; of equal scores the
    earlier. Probabilities are the softmax of the scores of the list. A question whose context has no
    token has an empty list.

    Source: Devlin et al. 2019, arXiv 1810.04805, section 4.2, and its published code, which compares only the 20 best
    starts with the 20 best ends of a window.

    Args:
        windows: what :func:`regrow.bert.squad.windows` made of the questions.
        start_logits, end_logits: shape [n_windows, length], length at least that of the longest window; what lies
            behind a window's end is not looked at.
        max_answer_length: most tokens of an answer.
        progress: show a bar.

    Raises:
        RegrowError: an argument is out of range, the windows are of other questions, or a logit is not finite.

    >>> from regrow.bert.squad.features import windows
    >>> from regrow.bert.tokenizer import train_wordpiece
    >>> tokenizer = train_wordpiece(["who ada wrote it ."] * 2, vocab_size=40)
    >>> question = Question("q1", "Who?", "Ada wrote it.")
    >>> [window] = windows([question], tokenizer)
    >>> start, end = np.zeros((2, 1, len(window)))
    >>> start[0, window.context_start] = end[0, window.context_start] = 4.0
    >>> best = best_answers([question], [window], start, end, n_best=2)["q1"]
    >>> [(candidate.text, candidate.score, round(candidate.probability, 3)) for candidate in best]
    [('Ada', 8.0, 0.982), ('Ada wrote', 4.0, 0.018)]
    """
    for name, value in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        if value < 1:
            raise RegrowError(f"{name}={value}: must be at least 1")
    starts, ends = np.asarray(start_logits), np.asarray(end_logits)
    groups = _by_question(questions, windows)
    _check_shape("start_logits", starts, windows)
    _check_shape("end_logits", ends, windows)
    result: dict[str, list[Candidate]] = {}
    bar = tqdm(questions, desc="answers", unit="question", leave=False, disable=not progress)
    for question, numbers in zip(bar, groups, strict=True):
        if question.id in result:
            raise RegrowError(f"questions: two have the id {question.id!r}; give each an id of its own")
        scores = [_scores(windows[n], n, starts[n], ends[n], max_answer_length) for n in numbers]
        spans = [windows[n].spans for n in numbers]
        result[question.id] = _candidates(question.context, spans, scores, n_best)
    return result


def _by_question(questions: Sequence[Question], windows: Sequence[Window]) -> list[list[int]]:
    """The numbers of each question's windows."""
    groups: list[list[int]] = [[] for _ in questions]
    for number, window in enumerate(windows):
        if window.question >= len(questions):
            raise RegrowError(
                f"windows: number {number} is of question {window.question}, and there are {len(questions)}; give the "
                "questions the windows were made of"
            )
        length = len(questions[window.question].context)
        if len(window.spans) and window.spans[-1, 1] > length:
            raise RegrowError(
                f"windows: number {number} ends behind the context of question {questions[window.question].id!r}; give "
                "the questions the windows were made of"
            )
        groups[window.question].append(number)
    for question, group in zip(questions, groups, strict=True):
        if not group:
            raise RegrowError(f"windows: none is of question {question.id!r}; give all windows of the questions")
    return groups


def _check_shape(name: str, logits: np.ndarray, windows: Sequence[Window]) -> None:
    longest = max(map(len, windows), default=0)
    if logits.ndim != 2 or len(logits) != len(windows) or logits.shape[1] < longest:
        raise RegrowError(
            f"{name} has shape {list(logits.shape)}: [{len(windows)}, {longest}] is needed, a row for each window and "
            "a column for each token"
        )


def _scores(window: Window, number: int, starts: np.ndarray, ends: np.ndarray, longest: int) -> np.ndarray:
    """Score of the span that begins at a context token and has so many more: [n_context, longest], -inf if not allowed.

    The sum is in float64, whatever type the logits have.
    """
    context = slice(window.context_start, len(window) - 1)
    start, end = starts[context].astype(np.float64), ends[context].astype(np.float64)
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise RegrowError(f"logits of window {number} are not finite: the model that gave them has diverged")
    start[~window.most_context] = -np.inf
    if not len(end):
        return np.empty((0, 1))
    longest = min(longest, len(end))
    padded = np.concatenate((end, np.full(longest - 1, -np.inf)))
    return start[:, None] + sliding_window_view(padded, longest)


def _candidates(context: str, spans: list[np.ndarray], scores: list[np.ndarray], n_best: int) -> list[Candidate]:
    flat = np.concatenate([score.ravel() for score in scores])
    begins = np.cumsum([0, *(score.size for score in scores)])  # of each window, in `flat`
    found: dict[str, tuple[int, int, float]] = {}
    for place in _ranked(flat, 4 * n_best):
        number = int(np.searchsorted(begins, place, side="right")) - 1
        first, more = divmod(int(place - begins[number]), scores[number].shape[1])
        start, end = int(spans[number][first, 0]), int(spans[number][first + more, 1])
        found.setdefault(context[start:end], (start, end, float(flat[place])))
        if len(found) == n_best:
            break
    if not found:
        return []
    listed = np.array([score for _, _, score in found.values()])
    weights = np.exp(listed - listed[0])  # the best is first, so nothing overflows
    return [
        Candidate(text, start, end, score, float(probability))
        for (text, (start, end, score)), probability in zip(found.items(), weights / weights.sum(), strict=True)
    ]


def _ranked(scores: np.ndarray, likely: int) -> Iterator[int]:
    """Places of the scores above -inf from the highest down, equal ones in order.

    Only the ``likely`` highest are sorted, unless somebody wants more.
    """
    rest = np.flatnonzero(scores > -np.inf)
    if len(rest) > likely:
        threshold = np.partition(scores[rest], len(rest) - likely)[len(rest) - likely]
        high = scores[rest] >= threshold
        head, rest = rest[high], rest[~high]
        yield from head[np.argsort(-scores[head], kind="stable")]
    yield from rest[np.argsort(-scores[rest], kind="stable")]
