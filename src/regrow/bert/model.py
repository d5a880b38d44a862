"""BERT for pre-training, with the vocabulary head on the masked positions only.

At length 128 only 15 % of the positions are predicted, yet the head over all of them costs more than a small
encoder. Gathering them first changes no gradient and no weight name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.utils import ModelOutput

from regrow.bert.fused import Fusions, fuse
from regrow.bert.masking import IGNORE
from regrow.methods import WeightTransform
from regrow.nn import mask_linears, named_sparse_layers, sparsify, transform_linears
from regrow.nn.loss import linear_cross_entropy
from regrow.nn.options import LayerOption
from regrow.nn.replace import DEFAULT, built_places
from regrow.nn.tied import SharedGradient
from regrow.topology.distribution import Distribution

ENCODER = "bert.encoder.*"
"""The layers the paper makes sparse: Q, K, V, attention output and both feed-forward ones of every layer."""


@dataclass
class PretrainingOutput(ModelOutput):
    """Losses in nats, and the logits of the ``n`` predicted positions in batch order.

    Args:
        loss: mlm_loss + nsp_loss.
        mlm_loss: mean cross-entropy over the predicted positions.
        nsp_loss: mean cross-entropy of next-sentence prediction.
        prediction_logits: [n, vocabulary]; None while training with a fused loss, which never holds them all.
        seq_relationship_logits: [batch, 2]; class 1 means a random second segment.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    nsp_loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None


class BertForPreTraining(transformers.BertForPreTraining):
    """transformers' model of the same name and weights; ``forward`` needs labels and predicts only where they are.

    Outside pre-training load the saved weights with transformers' own classes.
    """

    def forward(
        self, input_ids: Tensor, labels: Tensor, next_sentence_label: Tensor, **inputs: Any
    ) -> PretrainingOutput:
        """
        Args:
            input_ids: [batch, length].
            labels: [batch, length] true token ids at predicted positions, -100 elsewhere.
            next_sentence_label: [batch] 1 where the second segment is a random one.
            inputs: attention_mask, token_type_ids: [batch, length].
        """
        fusions = getattr(self.bert, "fusions", Fusions.named("none"))
        head = self.cls.predictions
        fused_loss = fusions.loss and self.training
        tied = fused_loss and head.decoder.weight is self.get_input_embeddings().weight
        shared = SharedGradient() if tied else None
        # Before the encoder: how many there are is not known on the host, which on a GPU waits for it.
        rows = (labels.flatten() != IGNORE).nonzero().squeeze(1)
        hidden, pooled = self.bert(input_ids, **inputs, **({"shared": shared} if tied else {}))[:2]
        predicted, targets = hidden.flatten(0, 1).index_select(0, rows), labels.flatten().index_select(0, rows)
        if fused_loss:
            logits, decoder = None, head.decoder
            mlm_loss = linear_cross_entropy(
                head.transform(predicted), decoder.weight, decoder.bias, targets, shared=shared
            )
        else:
            logits = head(predicted)
            mlm_loss = _mean_cross_entropy(logits, targets)
        relationship = self.cls.seq_relationship(pooled)
        nsp_loss = F.cross_entropy(relationship.float(), next_sentence_label)
        return PretrainingOutput(mlm_loss + nsp_loss, mlm_loss, nsp_loss, logits, relationship)


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.numel() == 0:  # a batch may hold nothing to predict; its mean would be NaN
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), targets)


def build_model(
    config: BertConfig,
    *,
    density: float | None,
    block_size: int,
    distribution: Distribution = "uniform",
    fusions: Fusions | None = None,
    masked: bool = False,
    layer: str | LayerOption = DEFAULT,
    transform: WeightTransform | None = None,
    seed: int = 0,
) -> BertForPreTraining:
    """A freshly initialised model; with a ``density`` its encoder is sparse from the start and never dense.

    With ``masked`` it is dense, and the density is that of the masks in :class:`~regrow.nn.MaskedLinear`;
    with a ``transform`` it has dense :class:`~regrow.nn.TransformedLinear`, and the density is what is to be left.
    ``layer`` says what stands in the place of an encoder's linear layers, as in :func:`regrow.sparsify`.

    The skeleton is laid out on the meta device, its linear layers are replaced there, and only then is memory
    taken for what is left. ``density=None`` gives the dense baseline. By default all its operations are fused (see
    :func:`regrow.bert.fused.fuse`).
    """
    with torch.device("meta"):
        model = BertForPreTraining(config)
    if density is not None and masked:
        mask_linears(model, density=density, block_size=block_size, include=ENCODER)
    elif density is not None and transform is None:
        sparsify(
            model,
            density=density,
            block_size=block_size,
            distribution=distribution,
            layer=layer,
            include=ENCODER,
            seed=seed,
        )
    for module in model.modules():
        if any(tensor.is_meta for tensor in [*module.parameters(False), *module.buffers(False)]):
            module.to_empty(device="cpu", recurse=False)
    model.tie_weights()
    model.initialize_weights()
    if density is not None and transform is not None:  # which begins with weights
        transform_linears(model, transform, density=density, block_size=block_size, include=ENCODER, seed=seed)
    return fuse(model, fusions)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model's distinct parameters and saved buffers, indices included."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def dense_bytes(model: nn.Module) -> int:
    """Bytes the same model takes when every sparse layer is an ``nn.Linear``."""
    excess, element = 0, next(model.parameters()).element_size()
    inside: set[int] = set()
    for _, module, built in built_places(model):
        tensors = module.state_dict().values()
        size = next((p.element_size() for p in module.parameters()), element)  # none: the other half has all
        excess += built.dense_elements * size - sum(t.numel() * t.element_size() for t in tensors)
        inside |= {id(part) for part in module.modules()}
    for _, layer in named_sparse_layers(model):
        if id(layer) in inside:
            continue
        topology = sum(t.numel() * t.element_size() for t in layer.topology.state_dict().values())
        stored = layer.values.numel() * layer.values.element_size() + topology
        excess += layer.in_features * layer.out_features * layer.values.element_size() - stored
    return stored_bytes(model) + excess
