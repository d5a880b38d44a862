"""Average models that share one sparsity pattern: the average is as sparse as each of them.

Averaging fine-tuned models is the recipe of Wortsman et al. 2022 (arXiv 2203.05482); that it works for sparse
models of equal pattern is shown by Zimmer et al., ICLR 2024 (arXiv 2306.16788).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from regrow.bert.export import save, saved_tokenizer
from regrow.bert.output import new_output
from regrow.bert.saved import load_saved
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, named_sparse_layers
from regrow.nn.replace import built_places

_MAY_DIFFER = {
    "_name_or_path",
    "architectures",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "hidden_dropout_prob",
    "initializer_range",
    "quantization_config",  # compared block by block
    "transformers_version",
}
"""Entries of a configuration that do not change what a model computes."""


@torch.no_grad()
def soup(models: Iterable[PreTrainedModel], names: Sequence[str] | None = None) -> PreTrainedModel:
    r"""The uniform average ``theta = (1 / m) * sum_i theta_i`` of ``m`` models with identical patterns.

    Blocks are averaged by their position: models may hold them in slots of another order. All other parameters are
    averaged element by element, and buffers of integers must be equal. Sums are float64.

    Args:
        models: one after another; of those before only the sum is kept.
        names: what errors call them; by default their numbers.

    Returns:
        a new model with the slots of the first; none of ``models`` is changed.

    Raises:
        RegrowError: there is no model, or two differ in class, configuration, labels, shapes or pattern.

    Example:
        >>> from regrow import sparsify
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> one = sparsify(BertModel(BertConfig(vocab_size=9, **sizes)), density=0.5, block_size=16)
        >>> other = copy.deepcopy(one)
        >>> for parameter in other.parameters():
        ...     _ = parameter.data.add_(2.0)
        >>> torch.allclose(soup([one, other]).pooler.dense.bias, one.pooler.dense.bias + 1.0)
        True
    """
    result, count = None, 0
    for number, model in enumerate(models):
        name = names[number] if names else f"model {number + 1}"
        if result is None:
            result, first = copy.deepcopy(model), name
            sums = {key: tensor.double() for key, tensor in _averaged(result).items()}
        else:
            _refuse_others(result, model, first, name)
            for key, tensor in _averaged(model).items():
                sums[key] += _like_first(result, model, key, tensor.to(sums[key].device)).double()
        count += 1
    if result is None:
        raise RegrowError("a soup needs at least one model")
    for key, tensor in _averaged(result).items():
        tensor.copy_(sums[key] / count)
    return result


def greedy_soup(
    models: Sequence[PreTrainedModel], score: Callable[[PreTrainedModel], float]
) -> tuple[PreTrainedModel, list[int]]:
    """Average only the models that help: the greedy soup of Wortsman et al. 2022, algorithm 1.

    From the best single model on, each is tried in the order of its score and stays if the soup's score on held-out
    data does not get worse. So the soup is at least as good there as the best of ``models``.

    Args:
        models: as :func:`soup` takes them.
        score: of a model on held-out data; higher is better. Called at most ``2 m - 1`` times.

    Returns:
        the soup, and the indices of its ingredients, best first.

    Raises:
        RegrowError: as :func:`soup`, or a score is not a number.
    """
    if not models:
        raise RegrowError("a soup needs at least one model")
    scores = [_number(score(model), f"the score of model {number + 1}") for number, model in enumerate(models)]
    order = sorted(range(len(models)), key=lambda number: -scores[number])
    chosen, best, result = order[:1], scores[order[0]], soup([models[order[0]]])
    for number in order[1:]:
        taken = [*chosen, number]
        trial = soup([models[i] for i in taken], [f"model {i + 1}" for i in taken])
        reached = _number(score(trial), f"the score with model {number + 1}")
        if reached >= best:
            chosen, best, result = taken, reached, trial
    return result, chosen


def save_soup(sources: Sequence[str | Path], out: str | Path, *, progress: bool = False) -> None:
    """Write the average of saved models, with their tokenizer, for :func:`regrow.bert.saved.load_saved` to load.

    Args:
        sources: what ``load_saved`` takes; one model is in memory at a time, beside the sum.
        out: directory to make.

    Raises:
        RegrowError: ``out`` exists, a model cannot be loaded, two have different vocabularies, or as :func:`soup`.
    """
    names = [str(source) for source in sources]
    with new_output(out) as aside:
        tokenizer, owner = None, ""
        for source in sources:
            found = saved_tokenizer(source)
            if found is None:
                continue
            if tokenizer is not None and found.get_vocab() != tokenizer.get_vocab():
                raise RegrowError(f"{source} has another vocabulary than {owner}; a soup needs one for all")
            if tokenizer is None:
                tokenizer, owner = found, str(source)
        bar = tqdm(sources, "averaging", unit=" models", disable=not progress)
        result = soup((load_saved(source) for source in bar), names)
        save(result, tokenizer, aside, out)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and buffers of floating-point numbers."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name: parameter.data for name, parameter in model.named_parameters()} | buffers


def _like_first(first: nn.Module, model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """Blocks in the order of the first model's slots, anything else as it is."""
    owner, _, leaf = key.rpartition(".")
    layer = first.get_submodule(owner)
    if not isinstance(layer, BlockSparseLinear) or leaf != "values":
        return tensor
    other = model.get_submodule(owner)
    assert isinstance(other, BlockSparseLinear)
    slots = torch.empty_like(layer.topology.slot.long())
    slots[layer.topology.slot.long()] = other.topology.slot.to(slots.device).long()  # by entry, which are in one order
    return tensor[slots]


def _refuse_others(first: PreTrainedModel, model: PreTrainedModel, first_name: str, name: str) -> None:
    """Raise unless an average of the two means something."""
    different = _different_configuration(first, model) or _different_pattern(first, model)
    if different is None:
        shapes, others = (dict(_shapes(m)) for m in (first, model))
        key = next((key for key in (shapes | others) if shapes.get(key) != others.get(key)), None)
        different = key and f"{key} is {others.get(key, 'absent')}, not {shapes.get(key, 'absent')}"
    if different is None:
        buffers = dict(model.named_buffers())
        for key, buffer in first.named_buffers():
            part = key.rpartition(".topology.")[1]  # slots may be in another order, and all else was compared
            if not part and not buffer.is_floating_point() and not torch.equal(buffer, buffers[key].to(buffer.device)):
                different = f"{key} holds other numbers"
    if different is not None:
        raise RegrowError(f"cannot average {name} with {first_name}: {different}")


def _different_configuration(first: PreTrainedModel, model: PreTrainedModel) -> str | None:
    if type(model).__name__ != type(first).__name__:
        return f"it is a {type(model).__name__}, not a {type(first).__name__}"
    ours, theirs = (_entries(m) for m in (first, model))
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            return f"{key} is {theirs.get(key)}, not {ours.get(key)}"
    return None


def _entries(model: PreTrainedModel) -> dict[str, Any]:
    return {key: value for key, value in model.config.to_dict().items() if key not in _MAY_DIFFER}


def _different_pattern(first: nn.Module, model: nn.Module) -> str | None:
    built = [{name: part for name, _, part in built_places(m)} for m in (first, model)]
    for name in built[0] | built[1]:
        options = [of_one[name].option if name in of_one else "plain" for of_one in built]
        if options[0] != options[1]:
            return f"{name} is {options[1]}, not {options[0]}"
    ours, theirs = (dict(named_sparse_layers(m)) for m in (first, model))
    for name in ours | theirs:
        if name not in ours or name not in theirs:
            return f"{name} is sparse in one of them only"
        one, other = ours[name], theirs[name]
        sizes = [(x.out_features, x.in_features, x.block_size) for x in (one, other)]
        if sizes[0] != sizes[1]:
            return f"{name} has {sizes[1][2]}x{sizes[1][2]} blocks or another shape, not {sizes[0][2]}x{sizes[0][2]}"
        missing = set(one.topology.keys().tolist()) ^ set(other.topology.keys().tolist())
        if missing:
            return (
                f"their patterns differ: {len(missing)} positions of {name} hold a block in one only; "
                "train all from one model with --method static"
            )
    return None


def _shapes(model: nn.Module) -> list[tuple[str, list[int]]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, list(tensor.shape)) for name, tensor in named]


def _number(value: float, what: str) -> float:
    if math.isnan(float(value)):
        raise RegrowError(f"{what} is not a number")
    return float(value)
