"""Sparse-training methods, one file each; :func:`available` lists them."""

from regrow.methods.base import Method, Signals, available, create, method_class, register

__all__ = ["Method", "Signals", "available", "create", "method_class", "register"]
