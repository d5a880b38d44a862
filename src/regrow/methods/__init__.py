"""Sparse-training methods, one file each; :func:`available` lists them."""

from regrow.methods.base import DenseLayoutMethod, LayerSize, Method, available, create, method_class, register
from regrow.methods.signals import Gradient, Signals
from regrow.methods.transform import WeightTransform

__all__ = [
    "DenseLayoutMethod",
    "Gradient",
    "LayerSize",
    "Method",
    "Signals",
    "WeightTransform",
    "available",
    "create",
    "method_class",
    "register",
]
