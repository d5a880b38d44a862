"""Leave out input columns token by token at inference, as WINA, TEAL and CATS do for language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertModel

from regrow.entries import listed
from regrow.errors import RegrowError
from regrow.kernels.cpu import supports_rows
from regrow.kernels.gather import copy_table, gather_sum, top_columns
from regrow.nn import BlockSparseLinear
from regrow.nn.options import Composite

Rule = Literal["wina", "teal", "cats"]
FEW_TOKENS = 16
"""For so many tokens at most a dense layer multiplies with the columns that stay alone."""
_INPUTS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_HALVES = ("intermediate.dense", "output.dense")
_HIDDEN = _HALVES[-1:]
_LAYERS: dict[Rule, tuple[str, ...]] = {"wina": _INPUTS + _HALVES, "teal": _INPUTS + _HALVES, "cats": _HIDDEN}


class Skipping:
    """Skipping that is in force, until :meth:`remove` or the end of a ``with`` block.

    Args:
        layers: names of the layers whose inputs are cut.
    """

    def __init__(self, layers: tuple[str, ...], undo: Sequence[Callable[[], None]]) -> None:
        self.layers, self._undo = layers, undo

    def remove(self) -> None:
        """Make the model what it was."""
        for undo in self._undo:
            undo()
        self._undo = ()

    def __enter__(self) -> Skipping:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


@listed(
    "tool",
    "wina",
    paper="Chen et al., WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference",
    year=2025,
    link="https://arxiv.org/abs/2505.19427",
    always_sparse=True,
    command="regrow evaluate MODEL --skip wina --keep 0.5,0.7,0.9",
    does="Skip, token by token, the inputs that count least by their size and the norm of their weights.",
)
@listed(
    "tool",
    "teal",
    paper="Liu et al., Training-Free Activation Sparsity in Large Language Models",
    year=2024,
    link="https://arxiv.org/abs/2408.14690",
    always_sparse=True,
    command="regrow evaluate MODEL --skip teal --keep 0.5,0.7,0.9",
    does="Skip, token by token, the smallest inputs of every layer.",
)
@listed(
    "tool",
    "cats",
    paper="Lee et al., CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
    year=2024,
    link="https://arxiv.org/abs/2404.08763",
    always_sparse=True,
    command="regrow evaluate MODEL --skip cats --keep 0.5,0.7,0.9",
    does="Skip, token by token, the smallest hidden activations of feed-forward halves.",
)
def skip_activations(model: nn.Module, rule: Rule = "wina", keep: float = 0.5) -> Skipping:
    """Make the encoder of ``model`` leave out input columns, for each token those that a rule scores lowest.

    Of every input ``x`` of a linear layer with weight ``W`` the share ``keep`` of the columns ``i`` stays that are
    greatest by

    * ``wina``: ``|x_i|`` times the norm of ``W[:, i]``, in every layer of the encoder; its error is the least there is
      where the columns of ``W`` are orthogonal;
    * ``teal``: ``|x_i|``, in every layer of the encoder;
    * ``cats``: ``|x_i|``, of the hidden activations of the feed-forward halves alone.

    In a :class:`~regrow.BlockSparseLinear` whole block columns stay or go, by the root of the sum of squares of these
    in a block column; the share is of those that have blocks, since the others cost nothing. Attention, norms and
    everything outside the encoder are as they were, and so are the biases.

    A dense layer then reads only the columns that stay, for up to :data:`FEW_TOKENS` tokens, in float32 on a CPU and
    without gradients; it keeps a copy of its weight for that. Everywhere else what is left out is multiplied as zeros:
    this says what skipping does to the answers, not what it saves (docs/inference.md has measurements). TEAL's and
    CATS's thresholds, which their authors find on calibration data, are replaced by an exact count here.

    Args:
        model: a transformers BERT, dense or sparse, fused or not; one of :func:`regrow.bert.inference.prepare` has no
            layers that could be changed.
        rule: ``"wina"``, ``"teal"`` or ``"cats"``.
        keep: share of the columns that stays, in (0, 1], at least one; with 1 nothing is changed.

    Returns:
        what takes it back: ``with skip_activations(model): ...``, or :meth:`Skipping.remove`.

    Raises:
        RegrowError: the rule is unknown, ``keep`` is out of range, the model has no BERT encoder of linear layers, or
            it skips already.

    Example:
        >>> from transformers import BertConfig
        >>> bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> before = bert(ids).last_hidden_state
        >>> with skip_activations(bert, "teal", keep=0.5):
        ...     bool((bert(ids).last_hidden_state == before).all())
        False
        >>> bool((bert(ids).last_hidden_state == before).all())
        True

    Reference: Chen et al. 2025, *WINA*, https://arxiv.org/abs/2505.19427; Liu et al. 2024, *TEAL*,
    https://arxiv.org/abs/2408.14690; Lee et al. 2024, *CATS*, https://arxiv.org/abs/2404.08763.
    """
    if rule not in get_args(Rule):
        raise RegrowError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    if not 0 < keep <= 1:
        raise RegrowError(f"keep must lie in (0, 1], got {keep}")
    layers = dict(_encoder_layers(model, rule))
    for name, layer in layers.items():
        if "forward" in vars(layer) or any(isinstance(hook, _Cut) for hook in layer._forward_pre_hooks.values()):
            raise RegrowError(f"{name} skips activations already; take that back first")
    undo = [_install(layer, _Cut(layer, rule, keep)) for layer in layers.values()] if keep < 1 else []
    return Skipping(tuple(layers), undo)


def _install(layer: nn.Module, cut: _Cut) -> Callable[[], None]:
    """Returns what takes it back."""
    if not isinstance(layer, nn.Linear):
        return layer.register_forward_pre_hook(cut).remove
    setattr(layer, "forward", _DenseForward(layer, cut))  # noqa: B010 -- of the instance: its class stays nn.Linear
    return partial(delattr, layer, "forward")


class _Cut:
    """Zeroes the columns of a layer's input that are left out; as a hook before the layer."""

    def __init__(self, layer: Any, rule: Rule, keep: float) -> None:
        self.norms = column_norms(layer) if rule == "wina" else None
        self.block = 1
        self.live: Tensor | None = None
        columns = layer.in_features
        if isinstance(layer, BlockSparseLinear):
            self.block = layer.block_shape.cols
            self.live = layer.topology.coordinates()[1].bincount(minlength=layer.topology.n_block_cols) > 0
            columns = int(self.live.sum())
        self.kept = max(1, round(keep * columns))

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.of(inputs[0]), *inputs[1:])

    def of(self, x: Tensor) -> Tensor:
        return x * self._chosen(x.detach()).repeat_interleave(self.block, -1)

    def _chosen(self, x: Tensor) -> Tensor:
        """``[..., block columns]``"""
        score = x if self.norms is None else x * self.norms
        score = score.unflatten(-1, (-1, self.block)).square().sum(-1) if self.block > 1 else score.abs()
        if self.live is not None:
            score = score.masked_fill(~self.live, -1.0)
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(self.kept, -1).indices, True)


class _DenseForward:
    """Stands for ``forward`` of an ``nn.Linear``: for few tokens it multiplies with the columns that stay alone."""

    def __init__(self, layer: nn.Linear, cut: _Cut) -> None:
        self.layer, self.cut = layer, cut
        self.made_of: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        tokens = x.numel() // self.layer.in_features
        if torch.is_grad_enabled() or tokens > FEW_TOKENS or not supports_rows(x, weight, bias):
            return nn.functional.linear(self.cut.of(x), weight, bias)
        made_of = weight.data_ptr(), weight._version
        if self.made_of != made_of:
            self.table, self.made_of = copy_table(weight.T.contiguous()), made_of
        lists, numbers = top_columns(x.reshape(-1, self.layer.in_features), self.cut.norms, self.cut.kept)
        y = gather_sum(lists, numbers, weight.T, copied=self.table, start=bias, out=x.new_empty(tokens, len(weight)))
        return y.view(*x.shape[:-1], len(weight))


def column_norms(layer: Any) -> Tensor:
    r""":math:`\|W_{:,i}\|_2` for every input of a linear layer: ``[in_features]``.

    Raises:
        RegrowError: the layer computes what no one matrix does.
    """
    if isinstance(layer, Composite):
        return layer.to_dense().norm(dim=0)
    if not isinstance(layer, BlockSparseLinear):
        return layer.weight.detach().norm(dim=0)
    squares = layer.values.new_zeros(layer.topology.n_block_cols, layer.block_shape.cols)
    squares.index_add_(0, layer.topology.coordinates()[1], layer.values.detach().square().sum(1))
    return squares.flatten().sqrt()


def _encoder_layers(model: nn.Module, rule: Rule) -> Iterator[tuple[str, nn.Module]]:
    found = False
    for prefix, bert in model.named_modules():
        if not isinstance(bert, BertModel):
            continue
        for number, block in enumerate(getattr(bert.encoder, "layer", ())):
            for part in _LAYERS[rule]:
                name = ".".join(filter(None, (prefix, "encoder.layer", str(number), part)))
                layer = block.get_submodule(part)
                if not isinstance(layer, nn.Linear | BlockSparseLinear):
                    raise RegrowError(
                        f"{name} is {type(layer).__name__}; skipping is for linear and block-sparse layers"
                    )
                found = True
                yield name, layer
    if not found:
        raise RegrowError("the model has no BERT encoder with layers that could skip activations")
