"""Puts what an option builds into a model, and tells later what was put where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from regrow.errors import RegrowError
from regrow.nn.linear import BlockSparseLinear
from regrow.nn.options.base import LayerOption, Place

Model = TypeVar("Model", bound=nn.Module)
DEFAULT = "blocks"
_MARK = "regrow_built"
_FAMILIES = (
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),  # BERT, RoBERTa, ELECTRA, ViT
    ("fc1", "activation_fn", "fc2"),  # BART and its kin
    ("ffn.lin1", "ffn.activation", "ffn.lin2"),  # DistilBERT
)
"""Names of a feed-forward half within a layer: first, activation, second."""


class PairNames(NamedTuple):
    """Where the parts of a feed-forward half are."""

    first: str
    activation: str
    second: str


@dataclass(frozen=True)
class Built:
    """What stands at a place, and what stood there.

    Args:
        option: that built it.
        in_features, out_features, bias: of the ``nn.Linear`` before.
        block_size, density: that were asked for.
        part: of a feed-forward half, or a layer of its own.
    """

    option: LayerOption
    in_features: int
    out_features: int
    bias: bool
    block_size: int
    density: float
    part: Literal["single", "first", "second"] = "single"

    @property
    def dense_elements(self) -> int:
        """Parameters of the ``nn.Linear`` before."""
        return self.out_features * (self.in_features + self.bias)


def built_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, Built]]:
    """Every module that another option than plain blocks has put into a model: name, module and what it is."""
    for name, module in model.named_modules():
        built = vars(module).get(_MARK)
        if built is not None:
            yield name, module, built


def feed_forward_pairs(model: nn.Module) -> list[PairNames]:
    """Feed-forward halves: by the names that transformers gives them, and in every ``nn.Sequential``.

    Only those of two ``nn.Linear`` whose widths fit, with a module without parameters between.

    Example:
        >>> feed_forward_pairs(nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 2)))
        [PairNames(first='0', activation='1', second='2')]
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        prefix = name + "." if name else ""
        candidates = [PairNames(*(prefix + part for part in names)) for names in _FAMILIES]
        if isinstance(module, nn.Sequential):
            children = [prefix + child for child in module._modules]
            candidates += [PairNames(*children[i : i + 3]) for i in range(len(children) - 2)]
        found += [pair for pair in candidates if _is_pair(modules, pair)]
    return found


def replace_layers(
    model: Model,
    chosen: Mapping[str, nn.Linear],
    places: Mapping[str, Place],
    option: LayerOption,
) -> Model:
    """Put what ``option`` builds where the chosen layers are, each at its place; in place.

    Raises:
        RegrowError: the option does not suit a layer, or it is for feed-forward halves and there is none.
    """
    pairs = {p.first: p for p in feed_forward_pairs(model) if {p.first, p.second} <= chosen.keys()}
    if option.pairs and not pairs:
        raise RegrowError(
            f"layer {option.name!r} replaces feed-forward halves, and the chosen layers hold none; "
            "choose both linear layers of one, with nothing but an activation between"
        )
    done: set[str] = set()
    for name in chosen:
        if name in done:
            continue
        if option.pairs and name in pairs:
            done.add(pairs[name].second)
            model = install_pair(model, pairs[name], option, places[name], places[pairs[name].second])
        else:
            model = install(model, name, option, places[name])
    return model


def install(model: Model, name: str, option: LayerOption, place: Place) -> Model:
    """Replace one ``nn.Linear``."""
    try:
        module = place.blocks() if option.pairs else option.build(place)
    except RegrowError as error:
        raise RegrowError(f"{name or 'the layer'}: {error}") from None
    if option.name != DEFAULT and not option.pairs:
        _mark(module, option, place, "single")
    return replace_module(model, name, _like(module, model.get_submodule(name)))


def install_pair(model: Model, names: PairNames, option: LayerOption, first: Place, second: Place) -> Model:
    """Replace a feed-forward half."""
    old = [model.get_submodule(name) for name in names]
    try:
        built = option.build_pair(first, old[1], second)
    except RegrowError as error:
        raise RegrowError(f"{names.first}: {error}") from None
    _mark(built.first, option, first, "first")
    _mark(built.second, option, second, "second")
    for name, module, before in zip(names, built, old, strict=True):
        if module is not before:
            model = replace_module(model, name, _like(module, before))
    return model


def replace_module(model: Model, name: str, module: nn.Module) -> Model:
    """Put ``module`` where ``name`` is; returns the model, which is ``module`` itself if ``name`` is empty."""
    if not name:
        return module  # type: ignore[return-value]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return model


def resize_skeleton(layer: BlockSparseLinear, n_blocks: int) -> None:
    """Make a layer without memory one of another number of blocks.

    Raises:
        RegrowError: it cannot have so many.
    """
    if n_blocks != layer.topology.n_blocks:
        layer.topology.resize(n_blocks)
        layer.values = nn.Parameter(layer.values.new_empty(n_blocks, layer.block_size, layer.block_size))


def dense_elements(model: nn.Module) -> int:
    """Parameters the model would have if every sparse layer were the ``nn.Linear`` it stands for.

    >>> dense_elements(nn.Sequential(BlockSparseLinear(32, 64, block_size=16, density=0.25)))
    2112
    """
    elements = sum(parameter.numel() for parameter in model.parameters())
    inside: set[int] = set()
    for _, module, built in built_places(model):
        elements += built.dense_elements - sum(parameter.numel() for parameter in module.parameters())
        inside |= {id(part) for part in module.modules()}
    for module in model.modules():
        if isinstance(module, BlockSparseLinear) and id(module) not in inside:
            elements += module.in_features * module.out_features - module.values.numel()
    return elements


def _is_pair(modules: Mapping[str, nn.Module], names: PairNames) -> bool:
    first, activation, second = (modules.get(name) for name in names)
    linear = type(first) is nn.Linear and type(second) is nn.Linear
    if not linear or activation is None or any(True for _ in activation.parameters()):
        return False
    return first.out_features == second.in_features and not isinstance(activation, nn.Dropout)  # type: ignore[union-attr]


def _mark(module: nn.Module, option: LayerOption, place: Place, part: Any) -> None:
    built = Built(option, place.in_features, place.out_features, place.bias, place.block_size, place.density, part)
    vars(module)[_MARK] = built


def _like(module: nn.Module, before: nn.Module) -> nn.Module:
    """On the device and in the mode of what it replaces; a skeleton's layers stay where they are."""
    weight: Any = getattr(before, "weight", None)
    meta = any(tensor.is_meta for tensor in module.parameters())
    if isinstance(weight, torch.Tensor) and not weight.is_meta and not meta:
        module = module.to(weight.device)
    return module.train(before.training)
