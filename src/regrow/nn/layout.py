"""What a file must say so that a model can be rebuilt around its sparse weights.

transformers stores ``config.quantization_config`` with every saved model and hands it to a registered loader
before the weights are read. The layout is a plain dictionary there, so this room needs no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from regrow.nn.linear import BlockSparseLinear

QUANT_METHOD = "regrow"
FORMAT_VERSION = 1
TRANSFORM = "regrow_transform"
"""Entry of ``model.config`` while a method transforms the dense weights: they alone are not what is evaluated."""


def record_layout(model: nn.Module, layers: Mapping[str, BlockSparseLinear]) -> None:
    """Write the layout of ``layers`` into ``model.config``; an empty mapping removes it.

    A model without a ``config`` attribute is left alone: its state dictionary already holds all there is.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    if layers:
        config.quantization_config = layout(layers)
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


def layout(layers: Mapping[str, BlockSparseLinear]) -> dict[str, Any]:
    """``{"quant_method", "format_version", "layers": {name: {"block_size", "n_blocks"}}}``."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "layers": {
            name: {"block_size": layer.block_size, "n_blocks": layer.topology.n_blocks}
            for name, layer in layers.items()
        },
    }


def record_transform(model: nn.Module, name: str | None) -> None:
    """Write into ``model.config`` that the method ``name`` transforms its weights; ``None`` removes it."""
    config = getattr(model, "config", None)
    if config is not None and name is not None:
        setattr(config, TRANSFORM, name)
    elif config is not None and TRANSFORM in vars(config):
        delattr(config, TRANSFORM)
