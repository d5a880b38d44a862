"""What a file must say so that a model can be rebuilt around its sparse weights.

transformers stores ``config.quantization_config`` with every saved model and hands it to a registered loader
before the weights are read. The layout is a plain dictionary there, so this room needs no transformers.

Format 1 lists sparse layers alone. Format 2 lists besides what options built around them; a model without any is still
written in format 1, which older versions read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from regrow.nn.replace import Built, built_places

if TYPE_CHECKING:
    from regrow.nn.linear import BlockSparseLinear

QUANT_METHOD = "regrow"
FORMAT_VERSION, FORMAT_OF_OPTIONS = 1, 2


def record_layout(model: nn.Module, layers: Mapping[str, BlockSparseLinear]) -> None:
    """Write the layout of ``layers`` and of what options built into ``model.config``; no layers remove it.

    A model without a ``config`` attribute is left alone: its state dictionary already holds all there is.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    if layers:
        config.quantization_config = layout(
            layers, {name: _entry(module, built) for name, module, built in built_places(model)}
        )
        return
    for owner, attribute in (
        (config, "quantization_config"),
        (config, "_is_quantized"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)


def layout(
    layers: Mapping[str, BlockSparseLinear], options: Mapping[str, Mapping[str, Any] | None] | None = None
) -> dict[str, Any]:
    """``{"quant_method", "format_version", "layers": {name: {"block_size", "n_blocks"}}}``.

    With ``options`` another entry of this name: by the name of a layer, or of the first of a feed-forward half, which
    ``option`` with which ``fields`` built what is there, for which ``block_size`` and ``density``, and ``numbers``
    that follow from nothing else.
    """
    document: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "layers": {
            name: {"block_size": layer.block_size, "n_blocks": layer.topology.n_blocks}
            for name, layer in layers.items()
        },
    }
    entries = {name: dict(entry) for name, entry in (options or {}).items() if entry is not None}
    if entries:
        document |= {"format_version": FORMAT_OF_OPTIONS, "options": entries}
    return document


def _entry(module: Any, built: Built) -> dict[str, Any] | None:
    """What a file says of a place; the second layer of a feed-forward half goes with the first."""
    if built.part == "second":
        return None
    numbers: dict[str, int] = getattr(module, "numbers", dict)()
    return {
        "option": built.option.name,
        "fields": dataclasses.asdict(built.option),  # type: ignore[call-overload]
        "block_size": built.block_size,
        "density": built.density,
        **({"numbers": numbers} if numbers else {}),
    }
