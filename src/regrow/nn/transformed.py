"""A dense linear layer that multiplies by a transform of its weight: N:M patterns, soft and learned masks.

The weight is stored and trained in full and the products are dense ones, so time and memory are those of ``nn.Linear``
or more. What the transform is, a method says (:class:`regrow.methods.WeightTransform`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.errors import RegrowError
from regrow.nn.layout import record_transform
from regrow.nn.sparsify import Globs, Model, chosen_layers, replace_module


@dataclass(frozen=True)
class Moment:
    """Where a training is. Every random draw depends on nothing else, so a resumed run repeats it.

    Args:
        step: optimizer steps taken.
        total_steps: optimizer steps of the training.
        seed: of this layer in this step.
        backward_passes: how many add up to the gradient of one step.

    Example:
        >>> Moment(step=3, total_steps=12).progress
        0.25
    """

    step: int = 0
    total_steps: int = 1
    seed: int = 0
    backward_passes: int = 1

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return self.step / self.total_steps

    def generator(self) -> torch.Generator:
        """A new generator, the same at every call."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class LayerView:
    """What a transform sees of a layer.

    Args:
        weight: dense ``[out_features, in_features]``, as it is trained.
        state: what the transform keeps with the layer, by name.
        moment: of the training.
        density: share of the weights that are not zero in the end.
        block_size: edge of a block, for transforms that prune blocks.
    """

    weight: Tensor
    state: Mapping[str, Tensor]
    moment: Moment
    density: float
    block_size: int


class Transform(Protocol):
    """What the layer asks of a method; :class:`regrow.methods.WeightTransform` explains it."""

    @property
    def name(self) -> str: ...
    @property
    def pattern(self) -> tuple[int, int] | None: ...
    @property
    def leaves_out(self) -> tuple[str, ...]: ...
    @property
    def trained(self) -> tuple[str, ...]: ...
    @property
    def frozen(self) -> bool: ...
    def check_shape(self, name: str, out_features: int, in_features: int, block_size: int) -> None: ...
    def initial_state(self, layer: LayerView, generator: torch.Generator) -> dict[str, Tensor]: ...
    def effective(self, layer: LayerView) -> Tensor: ...
    def final(self, layer: LayerView) -> Tensor: ...


class TransformedLinear(nn.Linear):
    r"""``y = x \tilde W^T + bias`` with the effective weight :math:`\tilde W`, a transform of the dense ``weight``.

    In training mode the transform is that of the present ``moment``, which whoever trains moves on; in evaluation mode
    it is the final one. So what is evaluated, at any time, is what would be saved.

    Args:
        dense: the layer to take weight and bias from; the parameters are shared, not copied.
        transform: the method.
        density, block_size: see :class:`LayerView`.
        generator: of the transform's initial state.

    Attributes:
        moment: of the training.

    Shape:
        as ``nn.Linear``.

    Example:
        >>> from regrow.methods import create
        >>> layer = TransformedLinear(nn.Linear(8, 3), create("srste"), density=0.5)
        >>> (layer.effective() != 0).view(3, 2, 4).sum(-1).tolist()
        [[2, 2], [2, 2], [2, 2]]
    """

    def __init__(
        self,
        dense: nn.Linear,
        transform: Transform,
        *,
        density: float,
        block_size: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
        self.weight, self.bias = dense.weight, dense.bias
        self.transform, self.density, self.block_size, self.moment = transform, density, block_size, Moment()
        self._kept: tuple[str, ...] = ()
        state = transform.initial_state(self.view, generator or torch.Generator().manual_seed(0))
        for name, tensor in state.items():
            if name in transform.trained:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self._kept = tuple(state)
        if transform.frozen:
            self.weight.requires_grad_(False)

    @property
    def view(self) -> LayerView:
        """What the transform sees now."""
        return LayerView(self.weight, self.state, self.moment, self.density, self.block_size)

    @property
    def state(self) -> dict[str, Tensor]:
        """What the transform keeps here: buffers and parameters, saved with the weight."""
        return {name: getattr(self, name) for name in self._kept}

    def effective(self) -> Tensor:
        """The weight that is multiplied now, ``[out_features, in_features]``."""
        return self.transform.effective(self.view) if self.training else self.transform.final(self.view)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, transform={self.transform.name}, density={self.density:.4g}"


def named_transformed_layers(model: nn.Module) -> Iterator[tuple[str, TransformedLinear]]:
    """Every :class:`TransformedLinear` of a model with its qualified name, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, TransformedLinear):
            yield name, module


def transform_linears(
    model: Model,
    transform: Transform,
    *,
    density: float | None = None,
    block_size: int = 1,
    include: Globs = "*",
    seed: int = 0,
) -> Model:
    """Replace the chosen ``nn.Linear`` modules by :class:`TransformedLinear`, in place.

    Args:
        transform: the method, as ``regrow.methods.create("srste")``; layers that it leaves out stay as they are.
        density: share of the weights that are not zero in the end; of methods that keep N of every M it is N/M.
        block_size: edge of a block, for methods that prune blocks.
        include: one glob or several over qualified module names.
        seed: of the initial state; the global random state is not touched.

    Raises:
        RegrowError: nothing matches, a layer does not suit the method, or the density is missing.

    Example:
        >>> from regrow.methods import create
        >>> transform_linears(nn.Sequential(nn.Linear(32, 64)), create("srste"))[0].density
        0.5
    """
    chosen = chosen_layers(model, include, transform.leaves_out)
    if not chosen:
        raise RegrowError(f"no nn.Linear that {transform.name} transforms matches include={include!r}")
    if transform.pattern is not None:
        n, m = transform.pattern
        density = n / m
    if density is None:
        raise RegrowError(f"method {transform.name!r} needs a density: the share of the weights to keep")
    for name, dense in chosen.items():
        if dense.weight.is_meta:
            raise RegrowError(f"{name or 'the layer'} is on the meta device; transform it when it has weights")
        transform.check_shape(name or "the layer", dense.out_features, dense.in_features, block_size)
    generator = torch.Generator().manual_seed(seed)
    for name, dense in chosen.items():
        layer = TransformedLinear(dense, transform, density=density, block_size=block_size, generator=generator)
        model = replace_module(model, name, layer.train(dense.training))
    record_transform(model, transform.name)
    return model


@torch.no_grad()
def harden(model: Model) -> Model:
    """Replace every :class:`TransformedLinear` by the ``nn.Linear`` of its final weight, in place.

    To be called after training: from then on the model is an ordinary dense one, with zeros, that any program loads.

    Example:
        >>> from regrow.methods import create
        >>> model = transform_linears(nn.Sequential(nn.Linear(4, 1)), create("srste"))
        >>> type(harden(model)[0]).__name__, int((model[0].weight != 0).sum())
        ('Linear', 2)
    """
    for name, layer in list(named_transformed_layers(model)):
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.transform.final(layer.view), requires_grad=layer.weight.requires_grad)
        dense.bias = layer.bias
        model = replace_module(model, name, dense.train(layer.training))
    record_transform(model, None)
    return model
