"""What a fine-tuned model says of each example, as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from regrow.bert.output import new_output
from regrow.bert.tasks.classification import ClassificationProblem
from regrow.bert.tasks.problem import Problem
from regrow.bert.tasks.question_answering import QuestionAnsweringProblem


def write_predictions(problem: Problem, predicted: Any, path: Path) -> None:
    """Write what ``problem.predict`` returned to a new file.

    Classes: a TSV file of the example's number, the label, and the probability of each class. Scores: number and score.
    Questions: a JSON file of the best answer by question id, as SQuAD's official script reads it.
    """
    if isinstance(problem, QuestionAnsweringProblem):
        text = json.dumps(predicted, ensure_ascii=False, indent=0) + "\n"
    else:
        assert isinstance(problem, ClassificationProblem)
        text = _table(problem, predicted)
    with new_output(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _table(problem: ClassificationProblem, logits: np.ndarray) -> str:
    if problem.task.labels is None:
        lines = ["index\tscore", *(f"{number}\t{score:.6g}" for number, score in enumerate(logits))]
    else:
        names = problem.task.labels
        lines = ["\t".join(["index", "label", *(f"p({name})" for name in names)])]
        for number, row in enumerate(softmax(logits, -1)):
            lines.append("\t".join([str(number), names[row.argmax()], *(f"{p:.6g}" for p in row)]))
    return "\n".join(lines) + "\n"
