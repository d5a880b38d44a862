"""What stands in the place of a linear layer, one file an option; :func:`available` lists them."""

from regrow.nn.options.base import (
    LayerOption,
    Pair,
    Place,
    available,
    create,
    dense_weight,
    layer_class,
    register_layer,
    restore,
)
from regrow.nn.options.composite import Composite, DenseFactor

__all__ = [
    "Composite",
    "DenseFactor",
    "LayerOption",
    "Pair",
    "Place",
    "available",
    "create",
    "dense_weight",
    "layer_class",
    "register_layer",
    "restore",
]
