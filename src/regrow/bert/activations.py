"""How many hidden activations of the feed-forward halves could be left out, at a price in perplexity that one names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertModel

from regrow.bert.skipping import column_norms
from regrow.entries import listed
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear
from regrow.nn.options import Composite

_TOKENS = 2048
"""Tokens from which a layer's thresholds are found."""


@dataclass(frozen=True)
class ActivationSparsity:
    """Shares of activations that are left out.

    Args:
        share: over all layers.
        by_layer: by the name of the layer that takes the activations.
        error: relative error that every such layer's output was allowed, on average over tokens.
        loss_before, loss_after: in nats.
    """

    share: float
    by_layer: dict[str, float]
    error: float
    loss_before: float
    loss_after: float


@listed(
    "tool",
    "activations",
    paper="Luo et al., Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
    year=2024,
    link="https://arxiv.org/abs/2411.02335",
    always_sparse=True,
    command="regrow evaluate MODEL --activations 0.01",
    does="How many feed-forward activations can be left out while the perplexity rises by a given share at most.",
)
@torch.no_grad()
def activation_sparsity(
    model: nn.Module, loss: Callable[[], float], *, p: float = 0.01, rounds: int = 8
) -> ActivationSparsity:
    r"""PPL-p%: the share of activations that can be left out while the perplexity rises by at most ``p``.

    Activation ``i`` of a token contributes ``c_i = |a_i| \, \|W_{:,i}\|_2`` to the output ``W a`` of its feed-forward
    half. In each layer those up to a threshold are left out: the greatest threshold at which

    .. math:: \text{CETT} = \text{mean}_\text{tokens} \frac{\|W (a \cdot [c \le \theta])\|_2}{\|W a\|_2}

    is at most a target shared by all layers, and the target is the greatest, by bisection, with
    ``exp(loss_after - loss_before) <= 1 + p``. For BERT's masked words it is a *pseudo*-PPL-p%. With ``p = 0`` only
    what is exactly zero is left out.

    Args:
        model: a transformers BERT that is not fused.
        loss: mean loss of the model over some data, in nats; called about ``rounds + 2`` times.
        p: by how much the perplexity may rise, as a share.
        rounds: of bisection.

    Raises:
        RegrowError: ``p`` is negative, or there is no BERT encoder in the model.

    Reference: Luo et al. 2024, *Sparsing Law*, https://arxiv.org/abs/2411.02335.
    """
    if p < 0:
        raise RegrowError(f"p must be at least 0, got {p}")
    layers = _down_projections(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        room = _TOKENS - sum(map(len, seen[name]))
        seen[name].append(tokens[: max(room, 0)].clone())
        return x

    with _changed_inputs(layers, keep):
        before = loss()
    samples = {name: torch.cat(parts) for name, parts in seen.items()}
    norms = {name: column_norms(layer) for name, layer in layers.items()}

    def trial(error: float) -> ActivationSparsity:
        limits = {name: _threshold(layer, samples[name], norms[name], error) for name, layer in layers.items()}
        return _with_thresholds(layers, norms, limits, loss, error, before)

    best, low, high = trial(0.0), 0.0, 1.0
    for _ in range(rounds if p > 0 else 0):
        middle = trial((low + high) / 2)
        if math.exp(min(middle.loss_after - before, 50.0)) <= 1 + p:
            best, low = middle, middle.error
        else:
            high = middle.error
    return best


def _down_projections(model: nn.Module) -> dict[str, Any]:
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, BertModel):
            if hasattr(module, "fusions"):
                raise RegrowError("activation_sparsity needs activations that a fused model never stores; load it anew")
            for number, layer in enumerate(module.encoder.layer):
                name = f"{prefix + '.' if prefix else ''}encoder.layer.{number}.output.dense"
                found[name] = down = layer.output.dense
                if not isinstance(down, nn.Linear | BlockSparseLinear | Composite):
                    raise RegrowError(f"{name} is {type(down).__name__}, which takes no hidden activations")
    if not found:
        raise RegrowError("there is no BERT encoder in the model")
    return found


@contextmanager
def _changed_inputs(layers: Mapping[str, nn.Module], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: (change(name, inputs[0]),))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _threshold(layer: Any, a: Tensor, norms: Tensor, error: float, rounds: int = 20) -> float:
    """The greatest threshold, to a millionth of the greatest contribution, that keeps the error."""
    if error == 0.0:
        return 0.0
    bias = 0.0 if layer.bias is None else layer.bias
    contributions, whole = a.abs() * norms, (layer(a) - bias).norm(dim=1).clamp_min(1e-30)
    low, high = 0.0, float(contributions.max())
    for _ in range(rounds):
        middle = (low + high) / 2
        lost = layer(a * (contributions <= middle)) - bias
        if float((lost.norm(dim=1) / whole).mean()) <= error:
            low = middle
        else:
            high = middle
    return low


def _with_thresholds(
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, Tensor],
    limits: Mapping[str, float],
    loss: Callable[[], float],
    error: float,
    before: float,
) -> ActivationSparsity:
    left_out, seen = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def drop(name: str, x: Tensor) -> Tensor:
        out = x.abs() * norms[name] <= limits[name]
        left_out[name] += int(out.sum())
        seen[name] += out.numel()
        return x.masked_fill(out, 0.0)

    with _changed_inputs(layers, drop):
        after = loss()
    shares = {name: left_out[name] / max(seen[name], 1) for name in layers}
    return ActivationSparsity(sum(left_out.values()) / max(sum(seen.values()), 1), shares, error, before, after)
