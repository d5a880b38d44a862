"""One step's losses over all ranks: the masked-word loss is a mean, and ranks do not predict equally many words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.bert.masking import IGNORE
from regrow.bert.model import PretrainingOutput
from regrow.ranks import summed, world_size


@dataclass(frozen=True)
class GlobalBatch:
    """What a step is over the sequences of all ranks, the same on all of them but for ``loss``.

    Args:
        loss: to differentiate. The mean over ranks of its gradient, which is what DDP makes, is the gradient of the
            loss of the whole batch.
        mlm_loss, nsp_loss: of the whole batch, in nats.
        tokens: in the whole batch, without padding.
    """

    loss: Tensor
    mlm_loss: float
    nsp_loss: float
    tokens: int

    @classmethod
    def of(cls, output: PretrainingOutput, inputs: Mapping[str, Tensor]) -> GlobalBatch:
        """From one rank's share; all ranks call this together, and exchange five numbers."""
        mlm, nsp = output.mlm_loss, output.nsp_loss
        assert output.loss is not None and mlm is not None and nsp is not None
        tokens = int(inputs["attention_mask"].sum())
        if world_size() == 1:
            return cls(output.loss, mlm.item(), nsp.item(), tokens)
        words, sequences = int((inputs["labels"] != IGNORE).sum()), len(inputs["labels"])
        own = [mlm.item() * words, words, nsp.item() * sequences, sequences, tokens]
        mlm_sum, all_words, nsp_sum, all_sequences, all_tokens = summed(torch.tensor(own, dtype=torch.float64)).tolist()
        all_words = max(all_words, 1.0)  # a batch may hold nothing to predict
        of_words, of_sequences = words / all_words, sequences / all_sequences
        loss = world_size() * (of_words * mlm + of_sequences * nsp)
        return cls(loss, mlm_sum / all_words, nsp_sum / all_sequences, int(all_tokens))
