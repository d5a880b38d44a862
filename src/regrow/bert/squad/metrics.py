"""Exact match and F1 as SQuAD v1.1 defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from regrow.bert.squad.data import Question
from regrow.errors import RegrowError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous white space.

    >>> normalize_answer(" The  U.S. Army's\\n(a) tank")
    'us armys tank'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1(prediction: str, answer: str) -> float:
    """F1 = 2 P R / (P + R) of the bags of words of two answers, in [0, 1]; 0 if no word is common.

    P is the share of the prediction's words that the answer has too, R the share of the answer's words.

    >>> f1("the tall Ada Lovelace", "Ada, Countess of Lovelace")  # P = 2/3, R = 2/4
    0.5714285714285714
    """
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def squad_metrics(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """The two scores of SQuAD v1.1, in percent.

    Of each question the best value over its answers counts, and the score is the mean over questions:

        exact_match: 1 if prediction and answer are equal once normalised, else 0
        f1:          see :func:`f1`

    A question that ``predictions`` lacks scores 0. Words that normalisation leaves none of (an answer "The") match
    exactly and have an F1 of 0, as in the official script.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1.

    Args:
        questions: with one answer each at least.
        predictions: an answer for each question's id.

    Raises:
        RegrowError: there are no questions, one has no answers, or a prediction is for none of them.

    >>> from regrow.bert.squad.data import Answer
    >>> context = "Ada Lovelace wrote it in 1843."
    >>> who = Question("q1", "Who?", context, (Answer("Ada Lovelace", 0),))
    >>> when = Question("q2", "When?", context, (Answer("1843", 25), Answer("in 1843", 22)))
    >>> squad_metrics([who, when], {"q1": "Lovelace", "q2": "in 1843."})  # F1 of q1: 2 * 1 / (1 + 2)
    {'exact_match': 50.0, 'f1': 83.33333333333333}
    """
    if not questions:
        raise RegrowError("questions is empty: there is nothing to score")
    unknown = predictions.keys() - {question.id for question in questions}
    if unknown:
        raise RegrowError(f"predictions: no question has the id {min(unknown)!r}; score against the file they are for")
    exact = total = 0.0
    for question in questions:
        if not question.answers:
            raise RegrowError(f"question {question.id!r} has no answers to score against; leave it out")
        if question.id not in predictions:
            continue
        given = predictions[question.id]
        answers = {answer.text for answer in question.answers}
        exact += normalize_answer(given) in {normalize_answer(answer) for answer in answers}
        total += max(f1(given, answer) for answer in answers)
    return {"exact_match": 100 * exact / len(questions), "f1": 100 * total / len(questions)}
