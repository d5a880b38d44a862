"""Fast answers from a trained sparse BERT: weights packed once, the whole encoder one call.

While training, every fused operation packs its weights at each call, since a step has changed them. :func:`prepare`
gives that up: the encoder's parameters are copied into packed form and cease to exist, so that there is nothing that
could change behind the copy's back.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertLayer, BertModel

from regrow.bert.fused import Tokens
from regrow.errors import RegrowError
from regrow.kernels.encoder import NAMES, PackedEncoder, embed
from regrow.kernels.reference import Weight
from regrow.nn import BlockSparseLinear
from regrow.nn.ffn import hooked

Model = TypeVar("Model", bound=nn.Module)


class FrozenEncoder(nn.Module):
    """What :func:`prepare` puts in the place of a ``BertEncoder``: no parameters, no gradient, no training."""

    def __init__(self, packed: PackedEncoder) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``[n, hidden]`` of packed tokens; see :class:`regrow.kernels.encoder.PackedEncoder`."""
        return self.packed(x, offsets)

    def train(self, mode: bool = True) -> FrozenEncoder:
        if mode:
            raise RegrowError("a model prepared for inference cannot train; train the one it was made of")
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **named: Any) -> NoReturn:
        raise RegrowError("a model prepared for inference cannot be saved; save it before it is prepared")

    def _load_from_state_dict(self, *args: Any, **named: Any) -> NoReturn:
        raise RegrowError("a model prepared for inference cannot be loaded into; load first, then prepare")

    def extra_repr(self) -> str:
        return f"{self.packed.n_layers} layers, {self.packed.n_bytes / 1e6:.1f} MB packed"


@torch.no_grad()
def prepare(model: Model) -> Model:
    """Make every ``BertModel`` in ``model`` fast at inference, and inference all it can do, in place.

    The weights of its encoder are packed for this machine's kernels, once; their parameters are gone then, and the
    model can be neither trained nor saved. Results are those of the fused model to rounding, do not depend on the
    number of threads, and have no gradient. What is not the encoder (embeddings, pooler, heads) stays as it is.

    Args:
        model: any transformers BERT whose encoder layers are sparse, all six with one block size, float32 on a CPU.
            To keep it as it is too, give ``copy.deepcopy(model)``.

    Returns:
        the same model, in evaluation mode.

    Raises:
        RegrowError: there is no ``BertModel``, or a layer cannot be packed; the model is as it was then.

    Example:
        >>> from transformers import BertConfig
        >>> from regrow import sparsify
        >>> config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> bert = sparsify(BertModel(config).eval(), density=0.5, block_size=16, include="encoder.*")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> before = bert(ids).last_hidden_state
        >>> torch.allclose(prepare(bert)(ids).last_hidden_state, before, atol=1e-5)
        True
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, BertModel)]
    if not found:
        raise RegrowError("prepare found no BertModel in the model")
    packed = [_pack(bert, name + "." if name else "") for name, bert in found]
    for (_, bert), encoder in zip(found, packed, strict=True):
        bert.encoder = FrozenEncoder(encoder)
        bert.forward = MethodType(_forward, bert)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _forward(
    self: BertModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    **others: Any,
) -> Any:
    """Instead of ``BertModel.forward``."""
    as_dict = others.pop("return_dict", None)
    more = any(value is not None and value is not False for value in others.values())
    more = more or self.config.output_hidden_states or self.config.output_attentions
    if more or input_ids is None or not (attention_mask is None or attention_mask.dim() == 2):
        raise RegrowError(
            "a model prepared for inference takes input_ids and a mask [batch, length], and returns the last hidden "
            "state alone; use the model as it was before regrow.bert.inference.prepare"
        )
    tokens = Tokens.of(input_ids.shape, attention_mask, True, input_ids.device)
    part = self.embeddings
    tables = part.word_embeddings.weight, part.position_embeddings.weight, part.token_type_embeddings.weight
    x = embed(
        tokens.pack(input_ids).long(),
        tokens.length if tokens.rows is None else tokens.rows % tokens.length,
        None if token_type_ids is None else tokens.pack(token_type_ids.expand_as(input_ids)).long(),
        tables,
        (part.LayerNorm.weight, part.LayerNorm.bias),
        part.LayerNorm.eps,
    )
    hidden = tokens.pad(self.encoder(x, tokens.offsets))
    pooled = None if self.pooler is None else self.pooler(hidden)
    output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)
    return output if self.config.return_dict and as_dict is not False else output.to_tuple()


def _pack(bert: BertModel, prefix: str) -> PackedEncoder:
    if isinstance(bert.encoder, FrozenEncoder):
        raise RegrowError(f"{prefix}encoder is prepared already")
    if bert.config.is_decoder or bert.config.add_cross_attention:
        raise RegrowError("prepare is for encoders; this BertModel is a decoder")
    packed = PackedEncoder(bert.config.num_attention_heads, bert.config.hidden_size)
    for number, layer in enumerate(bert.encoder.layer):
        where = f"{prefix}encoder.layer.{number}"
        norm1, norm2 = layer.attention.output.LayerNorm, layer.output.LayerNorm
        norms = torch.stack([norm1.weight, norm1.bias, norm2.weight, norm2.bias])
        weights = _weights(layer, where)
        try:
            packed.add_layer(weights, norms, (norm1.eps, norm2.eps))
        except RegrowError as error:
            raise RegrowError(f"{where}: {error}") from None
    return packed


def _weights(layer: BertLayer, where: str) -> list[Weight]:
    part, output = layer.attention.self, layer.attention.output.dense
    linears = part.query, part.key, part.value, output, layer.intermediate.dense, layer.output.dense
    if not isinstance(layer.intermediate.intermediate_act_fn, GELUActivation):
        raise RegrowError(f'{where}: prepare needs hidden_act="gelu", the exact one')
    for name, linear in zip(NAMES, linears, strict=True):
        if not isinstance(linear, BlockSparseLinear):
            raise RegrowError(f"{where}: its {name} is {type(linear).__name__}; prepare needs all six layers sparse")
        if not linear.block_shape.is_square:
            raise RegrowError(
                f"{where}: its {name} has gathered blocks of {linear.block_shape}; prepare is for square blocks, "
                "run the model as it is"
            )
        if hooked(linear):
            raise RegrowError(f"{where}: a hook on its {name} would not be called; remove it before prepare")
        if linear.activation is not None and name != "first":  # there the GELU is applied either way
            raise RegrowError(f"{where}: its {name} has an activation, which BERT has not; set it to None")
    return [Weight(linear.values, linear.bias, linear.topology.indices()) for linear in linears]
