"""Classes and scores of one or two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from regrow.bert.tasks.metrics import task_metrics
from regrow.bert.tasks.problem import Batch, padded
from regrow.bert.tasks.task import Examples, Task


class ClassificationProblem:
    """A :class:`~regrow.bert.tasks.task.Task` on its examples; longer texts than ``max_length`` tokens lose their end.

    Args:
        task: with its labels known.
        train: None to evaluate only.
        dev: held-out examples.
        tokenizer: of the model.
        max_length: tokens, ``[CLS]`` and ``[SEP]`` included.
    """

    model_class = AutoModelForSequenceClassification
    head = "ForSequenceClassification"

    def __init__(
        self,
        task: Task,
        train: Examples | None,
        dev: Examples,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        self.task, self.pad_id = task, tokenizer.pad_token_id or 0
        self.main_metric = task.metrics[0]
        names = task.labels if task.labels is not None else ("score",)
        self.changes = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "regression" if task.is_regression else "single_label_classification",
        }
        self.train = None if train is None else _encode(train, tokenizer, max_length)
        self.dev = _encode(dev, tokenizer, max_length)

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        kind = torch.float32 if self.task.is_regression else torch.int64
        return padded(items, self.pad_id) | {"labels": torch.tensor([item["label"] for item in items], dtype=kind)}

    def evaluate(self, model: nn.Module, *, batch_size: int = 32, progress: bool = False) -> dict[str, float]:
        return self.score(self.predict(model, batch_size=batch_size, progress=progress))

    def score(self, logits: np.ndarray) -> dict[str, float]:
        """Metrics of what :meth:`predict` returned."""
        return task_metrics(self.task.metrics, logits, np.array([item["label"] for item in self.dev]))

    @torch.no_grad()
    def predict(self, model: nn.Module, *, batch_size: int = 32, progress: bool = False) -> np.ndarray:
        """Logits ``[n, classes]`` of the held-out examples, or predicted scores ``[n]``."""
        found = []
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        try:
            for start in tqdm(range(0, len(self.dev), batch_size), "evaluating", leave=False, disable=not progress):
                batch = padded(self.dev[start : start + batch_size], self.pad_id)
                found.append(model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.cpu())
        finally:
            model.train(was_training)
        logits = torch.cat(found).float().numpy()
        return logits[:, 0] if self.task.is_regression else logits


def _encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    columns = [list(column) for column in zip(*examples.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
    return [
        {"input_ids": ids, "token_type_ids": types, "label": label}
        for ids, types, label in zip(encoded["input_ids"], encoded["token_type_ids"], examples.labels, strict=True)
    ]
