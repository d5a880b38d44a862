"""A pre-trained model and the held-out text that it is judged by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from regrow.bert.activations import ActivationSparsity, activation_sparsity
from regrow.bert.essential import EssentialSparsity, essential_sparsity
from regrow.bert.evaluate import evaluate_pretraining
from regrow.bert.fused import fuse
from regrow.bert.model import BertForPreTraining
from regrow.bert.perplexity import pseudo_perplexity
from regrow.bert.pretrain import PretrainConfig, splits_of
from regrow.bert.saved import load_saved
from regrow.bert.stream import PairDataset
from regrow.bert.tokenizer import load_tokenizer


class HeldOut:
    """A pre-trained model, sparse or dense, on the held-out sequences of a corpus.

    Args:
        model: directory of a run or a saved model, with its tokenizer.
        config: says what text is held out, as in pre-training: corpus, lengths, shares.
        batch_size: sequences at a time.

    Raises:
        RegrowError: the model or the corpus cannot be read.
    """

    def __init__(self, model: str | Path, config: PretrainConfig, batch_size: int = 32) -> None:
        self.path, self.batch_size = model, batch_size
        self.model: BertForPreTraining = fuse(load_saved(model, BertForPreTraining))
        self.tokenizer = load_tokenizer(model)
        length = min(config.max_length, self.model.config.max_position_embeddings)
        splits = splits_of(replace(config, max_length=length), self.tokenizer)
        self.sequences: PairDataset = splits.heldout.first(config.eval_sequences)

    def losses(self, model: torch.nn.Module | None = None) -> dict[str, float]:
        """``mlm_loss`` and ``nsp_loss`` in nats, and accuracies; of another model of the same tokenizer, if given."""
        return self._evaluate(self.model if model is None else model, progress=True)

    def pseudo_perplexity(self, n_sequences: int) -> float:
        """See :func:`regrow.bert.perplexity.pseudo_perplexity`; of the first so many sequences."""
        pairs = self.sequences.pairs
        ids = [
            torch.from_numpy(pairs[number]["tokens"][0].values.to_numpy().astype("int64"))
            for number in range(min(n_sequences, len(self.sequences)))
        ]
        return pseudo_perplexity(
            self.model,
            ids,
            mask_id=self.tokenizer.mask_token_id,
            special_ids=self.tokenizer.all_special_ids,
            batch_size=2 * self.batch_size,
            progress=True,
        )

    def activation_sparsity(self, p: float) -> ActivationSparsity:
        """See :func:`regrow.bert.activations.activation_sparsity`; by the masked-word loss."""
        model = load_saved(self.path, BertForPreTraining)  # not fused: activations must be seen
        return activation_sparsity(model, lambda: self._evaluate(model)["mlm_loss"], p=p)

    def essential_sparsity(self, block_size: int | None = None) -> EssentialSparsity:
        """See :func:`regrow.bert.essential.essential_sparsity`; by the masked-word loss."""
        model = fuse(load_saved(self.path, BertForPreTraining))  # anew: it will be pruned
        return essential_sparsity(
            model,
            lambda pruned: self._evaluate(pruned)["mlm_loss"],
            metric="mlm_loss",
            lower_is_better=True,
            block_size=block_size,
            progress=True,
        )

    def _evaluate(self, model: torch.nn.Module, progress: bool = False) -> dict[str, float]:
        return evaluate_pretraining(
            model,  # type: ignore[arg-type]
            self.sequences,
            collate_fn=self.sequences.collate,
            batch_size=self.batch_size,
            progress=progress,
        )
