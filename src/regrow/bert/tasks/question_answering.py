"""Questions answered by a stretch of a text, as in SQuAD v1.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from regrow.bert.squad import Candidate, Question, Window, best_answers, squad_metrics, windows
from regrow.bert.tasks.problem import Batch, padded


class QuestionAnsweringProblem:
    """Questions over strided windows of their texts.

    Args:
        train: None to evaluate only.
        dev: held-out questions.
        tokenizer: of the model.
        max_length, stride, query_length: of the windows, see :func:`regrow.bert.squad.windows`.
        n_best, max_answer_length: of the answers, see :func:`regrow.bert.squad.best_answers`.
    """

    model_class = AutoModelForQuestionAnswering
    head = "ForQuestionAnswering"
    main_metric = "f1"

    def __init__(
        self,
        train: list[Question] | None,
        dev: list[Question],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        stride: int,
        query_length: int,
        n_best: int,
        max_answer_length: int,
    ) -> None:
        self.changes: dict[str, Any] = {"num_labels": 2}
        self.pad_id = tokenizer.pad_token_id or 0
        self.n_best, self.max_answer_length, self.questions = n_best, max_answer_length, dev

        def cut(questions: list[Question]) -> list[Window]:
            return windows(
                questions, tokenizer, max_length=max_length, stride=stride, query_length=query_length, progress=True
            )

        self.train = None if train is None else [_item(window) for window in cut(train)]
        self.dev = cut(dev)

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        places = {
            f"{name}_positions": torch.tensor([item[name] for item in items], dtype=torch.int64)
            for name in ("start", "end")
        }
        return padded(items, self.pad_id) | places

    def evaluate(self, model: nn.Module, *, batch_size: int = 32, progress: bool = False) -> dict[str, float]:
        return self.score(self.predict(model, batch_size=batch_size, progress=progress))

    def score(self, answers: dict[str, str]) -> dict[str, float]:
        """Metrics of what :meth:`predict` returned."""
        return squad_metrics(self.questions, answers)

    def predict(self, model: nn.Module, *, batch_size: int = 32, progress: bool = False) -> dict[str, str]:
        """The likeliest answer by question id; empty where there is no text to find one in."""
        answers = self.answers(model, batch_size=batch_size, progress=progress)
        return {name: found[0].text if found else "" for name, found in answers.items()}

    @torch.no_grad()
    def answers(self, model: nn.Module, *, batch_size: int = 32, progress: bool = False) -> dict[str, list[Candidate]]:
        """The likeliest answers to every held-out question, the best first."""
        length = max(len(window.input_ids) for window in self.dev)
        starts, ends = np.full((2, len(self.dev), length), -np.inf, dtype=np.float32)
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        try:
            for first in tqdm(range(0, len(self.dev), batch_size), "answering", leave=False, disable=not progress):
                batch = padded([_item(window) for window in self.dev[first : first + batch_size]], self.pad_id)
                output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                rows, n = slice(first, first + len(output.start_logits)), output.start_logits.shape[1]
                starts[rows, :n], ends[rows, :n] = output.start_logits.cpu(), output.end_logits.cpu()
        finally:
            model.train(was_training)
        options = {"n_best": self.n_best, "max_answer_length": self.max_answer_length}
        return best_answers(self.questions, self.dev, starts, ends, progress=progress, **options)


def _item(window: Window) -> dict[str, Any]:
    types = (np.arange(len(window.input_ids)) >= window.context_start).astype(np.int64)
    return {
        "input_ids": window.input_ids,
        "token_type_ids": types,
        "start": window.start or 0,
        "end": window.end or 0,
    }
