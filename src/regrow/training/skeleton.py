"""What a file's layout asks for, built without memory around the weights that are to come. All of it is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear
from regrow.nn.linear import check_block_size
from regrow.nn.options import Composite, Place, restore
from regrow.nn.replace import built_places, feed_forward_pairs, install, install_pair, resize_skeleton
from regrow.topology.blocks import check_counts
from regrow.topology.distribution import check_density

_ENTRY = {"option", "fields", "block_size", "density"}


def build_layers(
    model: nn.Module, layers: Mapping[str, Mapping[str, int]], options: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replace linear layers of a model without memory by what its file lists, in place.

    Args:
        layers: ``block_size`` and ``n_blocks`` of sparse layers, by name.
        options: what else stands there, by the name of a layer or of the first of a feed-forward half.

    Returns:
        the two by the names that the layers have in this model, to be written when it is saved.

    Raises:
        RegrowError: the model has no such layer, or it cannot be so.
    """
    built = _build_options(model, options)
    done: dict[str, Any] = {}
    for name, entry in layers.items():
        try:
            found, module = _find(model, name)
            if found in done:
                raise RegrowError("listed twice")
            done[found] = entry
            if isinstance(module, BlockSparseLinear):  # an option made it
                if module.block_size != entry["block_size"]:
                    raise RegrowError(f"block_size is {entry['block_size']}, but its option has {module.block_size}")
                check_counts(module.topology.n_block_rows, module.topology.n_block_cols, entry["n_blocks"])
                resize_skeleton(module, entry["n_blocks"])
            else:
                parent, _, leaf = found.rpartition(".")
                setattr(model.get_submodule(parent), leaf, _sparse(module, **entry))
        except RegrowError as error:
            raise RegrowError(f"config.json, layer {name!r}: {error}") from None
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear) and name not in done:
            raise RegrowError(f"config.json lists no blocks of {name!r}, which its option needs")
    return done, built


def check_entries(options: object) -> None:
    """Raise :class:`RegrowError` unless it has the shape of a layout's ``options``."""
    fits = isinstance(options, dict) and all(isinstance(e, dict) and _is_entry(e) for e in options.values())
    if not fits:
        raise RegrowError(
            "config.json: quantization_config.options must map names to option, fields, block_size and density"
        )


def belongs_to_option(model: nn.Module, name: str) -> bool:
    """Whether a tensor is part of what an option built."""
    return any(name.startswith(f"{place}.") for place, _, _ in built_places(model))


def _is_entry(entry: dict[str, Any]) -> bool:
    if not (_ENTRY <= entry.keys() <= _ENTRY | {"numbers"}):
        return False
    numbers = entry.get("numbers", {})
    return (
        isinstance(entry["option"], str)
        and isinstance(entry["fields"], dict)
        and type(entry["block_size"]) is int
        and type(entry["density"]) in (int, float)
        and math.isfinite(entry["density"])
        and isinstance(numbers, dict)
        and all(type(number) is int for number in numbers.values())
    )


def _build_options(model: nn.Module, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    pairs, built = {pair.first: pair for pair in feed_forward_pairs(model)}, {}
    for name, entry in options.items():
        try:
            option = restore(entry["option"], entry["fields"])
            found, dense = _find(model, name)
            first = _place(dense, entry["block_size"], entry["density"])
            if not option.pairs:
                install(model, found, option, first)
            elif found in pairs:
                second = model.get_submodule(pairs[found].second)
                install_pair(model, pairs[found], option, first, _place(second, entry["block_size"], entry["density"]))
            else:
                raise RegrowError(f"layer {option.name!r} replaces feed-forward halves, and there is none")
            built[found] = entry
            module = model.get_submodule(found)
            if isinstance(module, Composite):
                module.set_numbers_(dict(entry.get("numbers", {})))
            elif entry.get("numbers"):
                raise RegrowError(f"layer {option.name!r} has no numbers")
        except RegrowError as error:
            raise RegrowError(f"config.json, option of {name!r}: {error}") from None
    return built


def _place(dense: Any, block_size: int, density: float) -> Place:
    if type(dense) is not nn.Linear:
        raise RegrowError("there is another option at this place already")
    check_block_size(dense.in_features, dense.out_features, block_size)
    check_density(density)
    return Place(
        dense.in_features,
        dense.out_features,
        dense.bias is not None,
        block_size,
        density,
        device="meta",
        dtype=dense.weight.dtype,
    )


def _find(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """A layer saved from ``BertForPreTraining`` is ``bert.encoder...`` there and ``encoder...`` in ``BertModel``."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        module = modules.get(candidate)
        if type(module) is nn.Linear or isinstance(module, BlockSparseLinear):
            return candidate, module
    raise RegrowError("the model has no linear layer of that name")


def _sparse(dense: Any, block_size: int, n_blocks: int) -> BlockSparseLinear:
    rows, cols = dense.out_features // max(block_size, 1), dense.in_features // max(block_size, 1)
    check_counts(rows, cols, n_blocks)
    return BlockSparseLinear(
        dense.in_features,
        dense.out_features,
        block_size=block_size,
        density=n_blocks / (rows * cols),
        bias=dense.bias is not None,
        device="meta",
        dtype=dense.weight.dtype,
    )
