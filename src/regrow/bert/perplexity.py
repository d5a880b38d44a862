"""Pseudo-perplexity of a masked-word model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from regrow.bert.masking import IGNORE
from regrow.bert.model import BertForPreTraining
from regrow.entries import listed
from regrow.errors import RegrowError


@listed(
    "tool",
    "pseudo-perplexity",
    paper="Salazar et al., Masked Language Model Scoring",
    year=2020,
    link="https://arxiv.org/abs/1910.14659",
    always_sparse=True,
    command="regrow evaluate MODEL --pseudo-perplexity 64",
    does="A perplexity for masked words: each word of a text is masked alone and predicted from all others.",
)
@torch.no_grad()
def pseudo_perplexity(
    model: BertForPreTraining,
    sequences: Sequence[Tensor],
    *,
    mask_id: int,
    special_ids: Sequence[int],
    batch_size: int = 64,
    progress: bool = False,
) -> float:
    r"""How surprised the model is by each word, given all others around it:

    .. math:: \text{PPPL} = \exp\Big(-\frac{1}{N} \sum_s \sum_t \log P(w_t \mid s \setminus w_t)\Big)

    over the ``N`` tokens of all sequences, special ones not counted. A sequence of ``n`` tokens costs ``n`` forward
    passes, so a few dozen sequences are plenty.

    Args:
        sequences: token ids, ``[length]`` each.
        mask_id: id of ``[MASK]``.
        special_ids: of tokens that are neither masked nor counted.
        batch_size: masked copies of a sequence at a time.

    Raises:
        RegrowError: there is no token to predict.

    Reference: Salazar et al. 2020, *Masked Language Model Scoring*, https://arxiv.org/abs/1910.14659.
    """
    total, count = 0.0, 0
    special, device = torch.tensor(special_ids), next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for ids in tqdm(sequences, "pseudo-perplexity", unit="sequence", leave=False, disable=not progress):
            for places in (~torch.isin(ids, special)).nonzero().squeeze(1).split(batch_size):
                rows = torch.arange(len(places))
                masked, labels = ids.repeat(len(places), 1), torch.full((len(places), len(ids)), IGNORE)
                masked[rows, places], labels[rows, places] = mask_id, ids[places]
                relation = torch.zeros(len(places), dtype=torch.int64)
                output = model(masked.to(device), labels.to(device), relation.to(device))
                total += output.mlm_loss.item() * len(places)
                count += len(places)
    finally:
        model.train(was_training)
    if count == 0:
        raise RegrowError("there is no token to predict; give longer sequences")
    return math.exp(total / count)
