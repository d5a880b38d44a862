"""Gradients of a layer's full weight, seen only on the steps that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regrow import kernels
from regrow.nn import BlockSparseLinear


class GradientCapture:
    """Calls ``see(name, x, g)`` in the backward pass of every watched layer, while it is on.

    ``x`` [N, in] are the layer's inputs, which autograd has kept anyway, and ``g`` [N, out] the gradient of ``x W^T +
    bias``. Whoever sees them reduces them there and then; nothing is stored here. Between :meth:`stop` and
    :meth:`start` the layers carry no hook at all. With several backward passes a step, the last one is what counts.
    """

    def __init__(self, layers: Mapping[str, BlockSparseLinear], see: Callable[[str, Tensor, Tensor], None]) -> None:
        self.layers, self.see = layers, see
        self._handles: list[RemovableHandle] = []

    def start(self, names: Iterable[str]) -> None:
        """Watch the named layers from their next forward pass on."""
        self.stop()
        for name in names:
            self._handles.append(self.layers[name].register_forward_hook(partial(self._watch, name)))

    def stop(self) -> None:
        """Watch nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watch(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda g: self._seen(name, x, g))

    @torch.no_grad()
    def _seen(self, name: str, x: Tensor, g: Tensor) -> None:
        layer = self.layers[name]
        x, g = x.flatten(0, -2).to(g.dtype), g.flatten(0, -2)
        if layer.activation == "gelu":  # g is behind the activation, which the layer computes in one pass
            before = kernels.spmm(x, layer.values, layer.bias, *layer.topology.indices())
            g = torch.ops.aten.gelu_backward(g, before)
        self.see(name, x, g)
