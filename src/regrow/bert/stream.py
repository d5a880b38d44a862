"""Masked sentence pairs as an endless, exactly repeatable stream.

Masks are drawn on the fly, so that no two epochs see the same, and everything random is a pure function of a seed
and of *what* is drawn (epoch, pair): never of how far a run had come or how many workers took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch

from regrow.bert.masking import IGNORE, WholeWordMasker
from regrow.bert.order import MASK, ShuffledOrder
from regrow.errors import RegrowError


class PairDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Masked sentence pairs over stored ones, map-style; item ``i`` is a pure function of ``(seed, i)``.

    With ``P`` stored pairs, item ``i`` belongs to epoch ``i // P``; it is pair ``order[i % P]``, ``order``
    being that epoch's permutation, under the mask of ``(seed, epoch, pair)``. So :meth:`stream` may be longer
    than the data, a run resumes by starting at its next index, and the number of ``DataLoader`` workers
    changes nothing. Read it *in order* (a sequential sampler): the shuffling is inside.

    Args:
        pairs: columns ``tokens`` (``[CLS] a [SEP] b [SEP]``), ``boundary`` (tokens of the first segment with
            its ``[CLS]`` and ``[SEP]``) and ``is_random``.
        masker: draws the masks.
        max_length: the width :meth:`collate` pads to; `pad_id`: with which id.
        seed: of order and masks.
        length: number of items; `None` for one epoch.
        shuffle: `False` keeps the stored order.
    """

    def __init__(
        self,
        pairs: datasets.Dataset,
        masker: WholeWordMasker,
        *,
        max_length: int = 128,
        pad_id: int = 0,
        seed: int = 0,
        length: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if seed < 0 or (length is not None and length < 0):
            raise RegrowError(f"seed={seed}, length={length}: neither may be negative")
        self.pairs = pairs.with_format("arrow")
        self.masker = masker
        self.max_length, self.pad_id = max_length, pad_id
        self.seed, self.shuffle = seed, shuffle
        self.length = len(pairs) if length is None else length
        self._order = ShuffledOrder(len(pairs), seed)

    def __len__(self) -> int:
        return self.length

    def stream(self, n_examples: int, *, seed: int | None = None) -> PairDataset:
        """The first `n_examples` of the endless shuffled stream of `seed` (default: this data set's)."""
        return self._view(length=n_examples, seed=self.seed if seed is None else seed, shuffle=True)

    def evaluation(self) -> PairDataset:
        """Every pair once, in stored order, always under the same mask."""
        return self.first(len(self.pairs))

    def first(self, n_examples: int) -> PairDataset:
        """The first `n_examples` pairs in stored order (all, if there are fewer), always under the same mask."""
        return self._view(length=min(n_examples, len(self.pairs)), seed=self.seed, shuffle=False)

    def _view(self, **options: Any) -> PairDataset:
        return PairDataset(self.pairs, self.masker, max_length=self.max_length, pad_id=self.pad_id, **options)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One unpadded example of ``length`` tokens.

        Returns:
            ``input_ids``, ``token_type_ids`` and ``labels`` (-100 where nothing is predicted), int64 arrays
            of shape ``[length]``, and ``next_sentence_label``, 1 if the second segment is a random one.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of a data set of {self.length}")
        epoch, position = self._order[index] if self.shuffle else divmod(int(index), len(self.pairs))
        row = self.pairs[position]
        tokens = row["tokens"][0].values.to_numpy()
        ids, labels = self.masker.mask(tokens, np.random.default_rng((MASK, self.seed, epoch, position)))
        return {
            "input_ids": ids,
            "token_type_ids": (np.arange(len(ids)) >= row["boundary"][0].as_py()).astype(np.int64),
            "labels": labels,
            "next_sentence_label": int(row["is_random"][0].as_py()),
        }

    def collate(self, batch: Sequence[dict[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Pad a batch to `pad_to` tokens (default: ``max_length``), whatever its longest: shapes never
        change.

        Returns:
            What ``BertForPreTraining`` takes, all int64: ``input_ids``, ``attention_mask``,
            ``token_type_ids`` and ``labels`` (-100 in the padding) of shape ``[batch, pad_to]``,
            ``next_sentence_label`` of ``[batch]``.
        """
        width = self.max_length if pad_to is None else pad_to
        longest = max(len(item["input_ids"]) for item in batch)
        if longest > width:
            raise RegrowError(f"an example of {longest} tokens does not fit pad_to={width}: pad to at least {longest}")
        filling = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORE}
        arrays = {name: np.full((len(batch), width), fill, dtype=np.int64) for name, fill in filling.items()}
        for row, item in enumerate(batch):
            length = len(item["input_ids"])
            arrays["attention_mask"][row, :length] = 1
            for name in ("input_ids", "token_type_ids", "labels"):
                arrays[name][row, :length] = item[name]
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors["next_sentence_label"] = torch.tensor([item["next_sentence_label"] for item in batch])
        return tensors
