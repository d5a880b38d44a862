"""What :func:`regrow.count_flops` has to know of BERT, and BERTs that are there only to be counted.

Every linear layer and every attention of transformers' encoder models has its place here, fused or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert as hf

from regrow.bert.fused import Fusions, fuse
from regrow.bert.model import ENCODER as ENCODER_LAYERS
from regrow.bert.model import BertForPreTraining
from regrow.nn import BlockSparseLinear
from regrow.nn.flops_family import ENCODER, Costs, Family, Role, register_family
from regrow.nn.options import LayerOption
from regrow.nn.replace import DEFAULT
from regrow.nn.sparsify import sparse_skeleton
from regrow.topology.distribution import Distribution

_SIDE_BY_SIDE = Role(ENCODER, beside=True)
_NEXT_SENTENCE = Role("next-sentence head", "sequences", reads=hf.BertPooler)
_TASK = "task head"
_ROLES: dict[tuple[type, str], Role] = {
    (hf.BertSelfAttention, "query"): _SIDE_BY_SIDE,
    (hf.BertSelfAttention, "key"): _SIDE_BY_SIDE,
    (hf.BertSelfAttention, "value"): _SIDE_BY_SIDE,
    (hf.BertSelfOutput, "dense"): Role(ENCODER),
    (hf.BertIntermediate, "dense"): Role(ENCODER),
    (hf.BertOutput, "dense"): Role(ENCODER),
    (hf.BertPooler, "dense"): Role("pooler", "sequences", reads=hf.BertEncoder),
    (hf.BertPredictionHeadTransform, "dense"): Role("head transform", "predicted", reads=hf.BertEncoder),
    (hf.BertLMPredictionHead, "decoder"): Role("vocabulary head", "predicted", reads=hf.BertPredictionHeadTransform),
    (hf.BertPreTrainingHeads, "seq_relationship"): _NEXT_SENTENCE,
    (hf.BertOnlyNSPHead, "seq_relationship"): _NEXT_SENTENCE,
    (hf.BertForSequenceClassification, "classifier"): Role(_TASK, "sequences", reads=hf.BertPooler),
    (hf.BertForMultipleChoice, "classifier"): Role(_TASK, "sequences", reads=hf.BertPooler),
    (hf.BertForTokenClassification, "classifier"): Role(_TASK, reads=hf.BertEncoder),
    (hf.BertForQuestionAnswering, "qa_outputs"): Role(_TASK, reads=hf.BertEncoder),
}


def _width(attention: Any) -> int:
    return attention.all_head_size


def _computed_again(bert: Any, costs: Costs) -> int:
    """By fused operations in the backward pass, and by gradient checkpointing."""
    fusions = getattr(bert, "fusions", Fusions.named("none"))
    return sum(_computed_again_by_layer(layer, fusions, costs) for layer in bert.encoder.layer)


def _computed_again_by_layer(layer: Any, fusions: Fusions, costs: Costs) -> int:
    inside = [costs[module].flops for module in layer.modules() if module in costs]
    if not any(flops.input_gradient or flops.weight_gradient for flops in inside):
        return 0
    again = sum(flops.forward for flops in inside) if layer.gradient_checkpointing else 0
    if fusions.attention:
        again += costs[layer.attention.self].flops.forward // 2  # the scores, one of its two products
    if fusions.ffn and _is_fusible(layer.intermediate, layer.output.dense):
        again += costs[layer.intermediate.dense].flops.forward
    return again


def _is_fusible(intermediate: Any, second: nn.Module) -> bool:
    """Whether :func:`regrow.nn.sparse_ffn` does the feed-forward half of a layer, and in one pass."""
    first = intermediate.dense
    return (
        isinstance(first, BlockSparseLinear)
        and isinstance(second, BlockSparseLinear)
        and isinstance(intermediate.intermediate_act_fn, GELUActivation)
        and first.block_size == second.block_size
        and second.activation is None
    )


register_family(
    Family(
        roles=_ROLES,
        attention={hf.BertSelfAttention: _width},
        recomputed={hf.BertModel: _computed_again},
        without_products=(hf.BertLMPredictionHead,),  # whose own parameter is a bias
        refused={hf.BertCrossAttention: "cross-attention depends on a second sequence; count_flops is for encoders"},
    )
)


def bert_skeleton(
    config: BertConfig,
    *,
    density: float | None,
    block_size: int,
    distribution: Distribution = "uniform",
    fusions: Fusions | None = None,
    layer: str | LayerOption = DEFAULT,
) -> BertForPreTraining:
    """The model that :func:`regrow.bert.model.build_model` makes, without memory: on the meta device, to be counted.

    Args:
        config, density, block_size, distribution, fusions, layer: as there; ``density=None`` is dense.

    Raises:
        RegrowError: the block does not divide a layer, or a density is outside (0, 1].

    Example:
        >>> from regrow import count_flops
        >>> from regrow.bert.sizes import bert_config
        >>> config = bert_config("base", vocab_size=30522, max_length=128)
        >>> model = bert_skeleton(config, density=0.1, block_size=1)
        >>> report = count_flops(model, batch_size=1, seq_length=128, convention="paper")
        >>> f"{report.per_sequence:.4g}"  # the paper says 8.33e9
        '8.335e+09'
    """
    with torch.device("meta"):
        model = BertForPreTraining(config)
    if density is not None:
        sparse_skeleton(
            model,
            density=density,
            block_size=block_size,
            distribution=distribution,
            layer=layer,
            include=ENCODER_LAYERS,
        )
    return fuse(model, fusions)
