"""What the fine-tuning loop and ``regrow evaluate`` ask of a task, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from regrow.bert.order import ShuffledOrder

Batch = dict[str, Tensor]


class Problem(Protocol):
    """A task on data that are read and encoded: what to train on, and how well a model does.

    Attributes:
        model_class: transformers' automatic class for models with the head that is needed.
        head: how the names of such models end.
        changes: to the model's configuration.
        main_metric: which of the results to compare by.
        train: encoded examples; None where there is no training split.
    """

    @property
    def model_class(self) -> Any: ...

    @property
    def head(self) -> str: ...

    @property
    def changes(self) -> dict[str, Any]: ...

    @property
    def main_metric(self) -> str: ...

    @property
    def train(self) -> Sequence[dict[str, Any]] | None: ...

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Examples of ``train`` as a batch with labels."""
        ...

    def predict(self, model: nn.Module, *, batch_size: int = 32, progress: bool = False) -> Any:
        """What the model says of the held-out examples."""
        ...

    def score(self, predicted: Any, /) -> dict[str, float]:
        """Metrics of what :meth:`predict` returned."""
        ...

    def evaluate(self, model: nn.Module, *, batch_size: int = 32, progress: bool = False) -> dict[str, float]:
        """Metrics of the model on the held-out examples."""
        ...


class Stream(Dataset[dict[str, Any]]):
    """The first ``length`` examples of the endless shuffled stream of ``seed``; read it in order."""

    def __init__(self, examples: Sequence[dict[str, Any]], length: int, seed: int) -> None:
        self.examples, self.length, self.order = examples, length, ShuffledOrder(len(examples), seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.examples[self.order[item][1]]


def padded(items: Sequence[dict[str, Any]], pad_id: int) -> Batch:
    """``input_ids``, ``token_type_ids`` and ``attention_mask`` ``[batch, longest]``, int64.

    Example:
        >>> batch = padded([{"input_ids": [2, 7, 3]}, {"input_ids": [2, 3], "token_type_ids": [0, 1]}], pad_id=0)
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[2, 7, 3], [2, 3, 0]], [[1, 1, 1], [1, 1, 0]])
    """
    shape = len(items), max(len(item["input_ids"]) for item in items)
    ids, types, mask = np.full(shape, pad_id), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        ids[row, :n], mask[row, :n] = item["input_ids"], 1
        if "token_type_ids" in item:
            types[row, :n] = item["token_type_ids"]
    arrays = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
