"""BERT's encoder with its small operations fused: same weights, same names, same function, less memory traffic.

Sparse products are so cheap that what lies between them decides the speed of a step: dropout and its random numbers,
residuals and layer norms, the hidden activations of the feed-forward half, padding. :func:`fuse` replaces the forward
passes of transformers' ``BertModel`` and ``BertLayer`` by ones made of the fused operations of :mod:`regrow.nn`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertLayer, BertModel, BertOutput, BertSelfOutput

from regrow.errors import RegrowError
from regrow.kernels import gpu
from regrow.nn import BlockSparseLinear
from regrow.nn.attention import attention
from regrow.nn.ffn import sparse_ffn
from regrow.nn.merged import merged_linear
from regrow.nn.norm import dropout, dropout_add_norm
from regrow.nn.sparse_attention import sparse_attention
from regrow.nn.tied import SharedGradient, tied_embedding

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Fusions:
    """Which operations are fused; each can be switched off alone, to compare or to bisect.

    Args:
        attention: softmax, dropout and both products of :func:`regrow.nn.attention`, instead of PyTorch's
            ``scaled_dot_product_attention``.
        norm: :func:`regrow.nn.dropout_add_norm` for dropout + residual + LayerNorm.
        ffn: :func:`regrow.nn.sparse_ffn` for the feed-forward half of a layer, where it is sparse.
        qkv: :func:`regrow.nn.merged_linear` for query, key and value, where they are sparse.
        unpad: padding is taken out at the embeddings and put back at the end.
        loss: :func:`regrow.nn.linear_cross_entropy` for the vocabulary head, while training.
    """

    attention: bool = True
    norm: bool = True
    ffn: bool = True
    qkv: bool = True
    unpad: bool = True
    loss: bool = True

    @classmethod
    def named(cls, names: str) -> Fusions:
        """From ``all``, ``none``, or some of them: ``attention,norm``.

        >>> Fusions.named("norm,loss")
        Fusions(attention=False, norm=True, ffn=False, qkv=False, unpad=False, loss=True)
        """
        known = [field.name for field in fields(cls)]
        chosen = {"all": known, "none": []}.get(names, names.split(","))
        if unknown := [name for name in chosen if name not in known]:
            raise RegrowError(f"fuse must be all, none, or some of {','.join(known)}; {unknown[0]!r} is none of them")
        return cls(**{name: name in chosen for name in known})

    def on(self, device: torch.device) -> Fusions:
        """Those of them that are used on a device: all on a CPU; on a GPU, where there are no such kernels of ours,
        PyTorch's own attention, dropout and LayerNorm, on padded batches, whose shapes never change.

        >>> Fusions().on(torch.device("cuda"))
        Fusions(attention=False, norm=False, ffn=True, qkv=True, unpad=False, loss=True)
        """
        return replace(self, attention=False, norm=False, unpad=False) if gpu.handles(device) else self


def fuse(model: Model, fusions: Fusions | None = None) -> Model:
    """Make every ``BertModel`` in ``model`` compute with fused operations, in place.

    Parameters, their names, saved files and results (to rounding) stay what they are; with dropout the random masks
    are others than PyTorch's. Calls that ask for what the fused encoder has not (embeddings as input, attention
    weights or hidden states as output, a mask that is not ``[batch, length]``) run transformers' own code.

    A fused ``bert(..., shared=SharedGradient())`` adds the word embedding's gradient to that of a head with the same
    weight; see :mod:`regrow.nn.tied`.

    Args:
        fusions: all by default; with none, nothing is replaced.

    Raises:
        RegrowError: there is no ``BertModel``, or it is a decoder.

    Example:
        >>> from transformers import BertConfig
        >>> bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> before = bert(ids).last_hidden_state
        >>> torch.allclose(fuse(bert)(ids).last_hidden_state, before, atol=1e-5)
        True
    """
    fusions = fusions or Fusions()
    if fusions == Fusions.named("none"):
        return model
    found = [module for module in model.modules() if isinstance(module, BertModel)]
    if not found:
        raise RegrowError("fuse found no BertModel in the model")
    for bert in found:
        if bert.config.is_decoder or bert.config.add_cross_attention:
            raise RegrowError("fuse is for encoders; this BertModel is a decoder")
        bert.fusions = fusions
        # Of the instance, not of a subclass: transformers looks up by the class's name what a model can return. Layers
        # become a subclass, because gradient checkpointing is put around the forward passes of classes.
        bert.forward = MethodType(_forward, bert)
        for layer in bert.encoder.layer:
            layer.__class__ = FusedBertLayer
    return model


@dataclass(frozen=True)
class Tokens:
    """Which of a batch's positions are computed, side by side, and where each sequence begins among them.

    Args:
        batch, length: of the padded batch.
        offsets: [batch + 1] int32, sequence ``s`` is the rows ``offsets[s]`` to ``offsets[s + 1]``.
        rows: [n] the computed positions, ``batch_index * length + position``; None for all of them.
        mask: [batch, length], True at real tokens, where padding is computed too; otherwise None.
    """

    batch: int
    length: int
    offsets: Tensor
    rows: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, shape: torch.Size, mask: Tensor | None, unpad: bool, device: torch.device) -> Tokens:
        """``mask [batch, length]`` is non-zero at real tokens."""
        batch, length = shape
        real = None if mask is None else mask.bool()
        if real is not None and not gpu.handles(device) and bool(real.all()):  # a GPU would have to be waited for
            real = None
        if real is None or not unpad:
            ends = torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=device)
            return cls(batch, length, ends[: batch + 1], None, real)
        counts = real.sum(1).cumsum(0)
        return cls(batch, length, F.pad(counts, (1, 0)).int(), real.flatten().nonzero().squeeze(1), None)

    def pack(self, x: Tensor) -> Tensor:
        """``[batch, length, ...]`` -> ``[n, ...]``."""
        x = x.reshape(self.batch * self.length, *x.shape[2:])
        return x if self.rows is None else x.index_select(0, self.rows)

    def pad(self, x: Tensor) -> Tensor:
        """``[n, ...]`` -> ``[batch, length, ...]``, zero at padding."""
        if self.rows is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.rows, x)
        return x.view(self.batch, self.length, *x.shape[1:])


def _forward(
    self: BertModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    shared: SharedGradient | None = None,
    **others: Any,
) -> Any:
    """Instead of ``BertModel.forward``."""
    as_dict = others.pop("return_dict", None)
    others = {name: value for name, value in others.items() if value is not None}
    ordinary = attention_mask is None or attention_mask.dim() == 2
    if others or input_ids is None or not ordinary or self.config.output_hidden_states or self.config.output_attentions:
        if as_dict is not None:
            others["return_dict"] = as_dict
        return BertModel.forward(self, input_ids, attention_mask, token_type_ids, **others)
    fusions = self.fusions.on(input_ids.device)
    tokens = Tokens.of(input_ids.shape, attention_mask, fusions.unpad, input_ids.device)
    x = _embed(self, input_ids, token_type_ids, tokens, shared, fusions)
    for layer in self.encoder.layer:
        x = layer(x, tokens, fusions)
    hidden = tokens.pad(x)
    pooled = None if self.pooler is None else self.pooler(hidden)
    output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)
    return output if self.config.return_dict and as_dict is not False else output.to_tuple()


def _embed(
    bert: BertModel,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    tokens: Tokens,
    shared: SharedGradient | None,
    fusions: Fusions,
) -> Tensor:
    part = bert.embeddings
    ids = tokens.pack(input_ids)
    positions = part.position_ids[:, : tokens.length].expand(tokens.batch, -1)
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    word = part.word_embeddings
    words = word(ids) if shared is None else tied_embedding(ids, word.weight, shared, word.padding_idx)
    places = part.position_embeddings(tokens.pack(positions)) + part.token_type_embeddings(tokens.pack(types))
    if not fusions.norm:
        return part.dropout(part.LayerNorm(words + places))
    norm = part.LayerNorm
    x = dropout_add_norm(words, places, norm.weight, norm.bias, eps=norm.eps)
    return dropout(x, part.dropout.p, training=bert.training)


class FusedBertLayer(BertLayer):
    """``BertLayer`` as :func:`fuse` leaves it: on ``[n, hidden]`` of packed tokens where it is given ``Tokens``."""

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        if not others or not isinstance(others[0], Tokens):
            return super().forward(hidden_states, *others, **named)
        tokens, fusions = others
        x = _add_norm(self.attention.output, _attend(self, hidden_states, tokens, fusions), hidden_states, fusions)
        return _add_norm(self.output, _feed_forward(self, x, fusions), x, fusions)


def _attend(layer: BertLayer, x: Tensor, tokens: Tokens, fusions: Fusions) -> Tensor:
    part = layer.attention.self
    layers, output = (part.query, part.key, part.value), layer.attention.output.dense
    heads, p = part.num_attention_heads, part.dropout.p
    packed = fusions.attention and tokens.mask is None
    merge = fusions.qkv and all(isinstance(layer, BlockSparseLinear) for layer in layers)
    if packed and merge and isinstance(output, BlockSparseLinear):
        return sparse_attention(*layers, output, x, tokens.offsets, heads, p=p, training=layer.training)
    qkv = merged_linear(layers, x) if merge else torch.cat([layer(x) for layer in layers], -1)
    if packed:
        y = attention(qkv, tokens.offsets, heads, p=p, training=layer.training)
    else:
        y = _padded_attention(qkv, tokens, heads, p if layer.training else 0.0)
    return output(y)


def _feed_forward(layer: BertLayer, x: Tensor, fusions: Fusions) -> Tensor:
    first, second = layer.intermediate.dense, layer.output.dense
    sparse = isinstance(first, BlockSparseLinear) and isinstance(second, BlockSparseLinear)
    if fusions.ffn and sparse and isinstance(layer.intermediate.intermediate_act_fn, GELUActivation):
        return sparse_ffn(first, second, x)
    return second(layer.intermediate(x))


def _add_norm(part: BertSelfOutput | BertOutput, x: Tensor, residual: Tensor, fusions: Fusions) -> Tensor:
    norm, p = part.LayerNorm, part.dropout.p
    if not fusions.norm:
        return norm(part.dropout(x) + residual)
    return dropout_add_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, p=p, training=part.training)


def _padded_attention(qkv: Tensor, tokens: Tokens, heads: int, p: float) -> Tensor:
    """PyTorch's attention, which wants sequences of equal length."""
    shape = tokens.batch, tokens.length, 3, heads, -1
    query, key, value = tokens.pad(qkv).view(shape).permute(2, 0, 3, 1, 4)
    mask = tokens.mask
    if tokens.rows is not None:
        mask = tokens.pad(torch.ones_like(tokens.rows, dtype=torch.bool))
    where = None if mask is None else mask[:, None, None, :]
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=where, dropout_p=p)
    return tokens.pack(y.transpose(1, 2).flatten(2))
