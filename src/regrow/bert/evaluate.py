"""Held-out loss of a pre-training model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from regrow.bert.masking import IGNORE
from regrow.bert.model import BertForPreTraining
from regrow.errors import RegrowError
from regrow.ranks import rank, summed, world_size
from regrow.shards import is_sharded


@torch.no_grad()
def evaluate_pretraining(
    model: BertForPreTraining,
    dataset: Dataset,
    *,
    collate_fn: Callable[[list], dict[str, torch.Tensor]],
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, float]:
    """MLM and NSP loss (nats) and accuracy over a held-out set with fixed masks.

    The MLM loss is the mean over all predicted positions of the set, not over batches, so it does not depend on
    ``batch_size``. Ranks take a share of the set each and add up what they found, so all must call this together.

    Returns:
        ``mlm_loss``, ``nsp_loss``, ``mlm_accuracy``, ``nsp_accuracy``.

    Raises:
        RegrowError: the set is empty.
    """
    part = _share(dataset) if world_size() > 1 else dataset
    # A generator of its own keeps the loader from drawing its seed from the global random state.
    loader = DataLoader(part, batch_size, collate_fn=collate_fn, generator=torch.Generator())
    device = next(model.parameters()).device
    totals = torch.zeros(6, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc="evaluating", leave=False, disable=not progress):
            totals += _batch_totals(model, {name: tensor.to(device) for name, tensor in batch.items()})
        if is_sharded(model):  # others may have a batch more, and need this rank's rows for it
            for _ in range(_most_batches(dataset, batch_size) - len(loader)):
                model(**{name: tensor.to(device) for name, tensor in collate_fn([dataset[0]]).items()})
    finally:
        model.train(was_training)
    mlm_sum, mlm_right, predicted, nsp_sum, nsp_right, sequences = summed(totals).tolist()
    if sequences == 0:
        raise RegrowError("the held-out set is empty; raise heldout_fraction or give a larger corpus")
    return {
        "mlm_loss": mlm_sum / max(predicted, 1),
        "nsp_loss": nsp_sum / sequences,
        "mlm_accuracy": mlm_right / max(predicted, 1),
        "nsp_accuracy": nsp_right / sequences,
    }


def _share(dataset: Dataset) -> Dataset:
    """The items that this rank evaluates."""
    n = len(dataset)  # type: ignore[arg-type]
    return Subset(dataset, range(n * rank() // world_size(), n * (rank() + 1) // world_size()))


def _most_batches(dataset: Dataset, batch_size: int) -> int:
    """Of any rank."""
    most = -(-len(dataset) // world_size())  # type: ignore[arg-type]
    return -(-most // batch_size)


def _batch_totals(model: BertForPreTraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**batch)
    targets = batch["labels"][batch["labels"] != IGNORE]
    relation = batch["next_sentence_label"]
    mlm_right = (output.prediction_logits.argmax(-1) == targets).sum().item()
    nsp_right = (output.seq_relationship_logits.argmax(-1) == relation).sum().item()
    return torch.tensor(
        [
            output.mlm_loss.item() * targets.numel(),
            mlm_right,
            targets.numel(),
            output.nsp_loss.item() * relation.numel(),
            nsp_right,
            relation.numel(),
        ],
        dtype=torch.float64,
    )
