"""What stands in the place of a linear layer: options, and how they are found by name.

An option is a frozen dataclass in one file. Its fields are its options; it builds modules. Which layers of a model are
replaced, and what a saved file says of them, is the business of :mod:`regrow.nn.sparsify` and its siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.errors import RegrowError
from regrow.nn.linear import BlockSparseLinear
from regrow.nn.options.composite import DenseFactor
from regrow.registry import Registry
from regrow.topology import blocks_at_density

ENTRY_POINT_GROUP = "regrow.layers"


@dataclass(frozen=True)
class Place:
    """The linear layer that is to be replaced, in numbers.

    Args:
        in_features, out_features, bias: of that layer.
        block_size, density: that are asked for.
        device: ``"cpu"``, or ``"meta"`` for a skeleton that a file will fill.
        dtype: of its weight.
        generator: of patterns and of values of blocks.
        extra: of everything else, so that patterns and blocks do not depend on what is beside them.
    """

    in_features: int
    out_features: int
    bias: bool
    block_size: int
    density: float
    device: str = "cpu"
    dtype: torch.dtype | None = None
    generator: torch.Generator | None = None
    extra: torch.Generator | None = None

    @property
    def is_meta(self) -> bool:
        """Whether nothing is drawn."""
        return self.device == "meta"

    @property
    def n_blocks(self) -> int:
        """Blocks of a :class:`BlockSparseLinear` here."""
        b = self.block_size
        return blocks_at_density(self.out_features // b, self.in_features // b, self.density)

    def of(self, in_features: int, out_features: int, **changes: Any) -> Place:
        """The same, of another shape."""
        return replace(self, in_features=in_features, out_features=out_features, **changes)

    def blocks(self) -> BlockSparseLinear:
        """A plain sparse layer of this shape."""
        return BlockSparseLinear(
            self.in_features,
            self.out_features,
            block_size=self.block_size,
            density=self.density,
            bias=self.bias,
            generator=self.generator,
            device=self.device,
            dtype=self.dtype,
        )

    def factor(self) -> DenseFactor:
        """A dense matrix of this shape, all zeros."""
        return DenseFactor(self.in_features, self.out_features, device=self.device, dtype=self.dtype)


class Pair(NamedTuple):
    """A feed-forward half: ``second(activation(first(x)))``."""

    first: nn.Module
    activation: nn.Module
    second: nn.Module


class LayerOption:
    """What a linear layer is replaced by.

    Subclass as a frozen dataclass with a default for every field, decorate with :func:`register_layer`, and override
    :meth:`build`, or :meth:`build_pair` with ``pairs = True``.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Authors and title."""
    year: ClassVar[int] = 0
    link: ClassVar[str] = ""
    always_sparse: ClassVar[bool] = True
    """Nothing of a dense weight's size or cost is ever computed."""
    pairs: ClassVar[bool] = False
    """It replaces feed-forward halves, two layers with an activation between; other layers get plain blocks."""

    @property
    def shardable(self) -> bool:
        """Whether its parameters can be shared out over processes (FSDP)."""
        return True

    def build(self, place: Place) -> nn.Module:
        """The module for a layer: a :class:`BlockSparseLinear` or a :class:`~regrow.nn.options.Composite`.

        Raises:
            RegrowError: the option does not suit the layer.
        """
        return place.blocks()

    def build_pair(self, first: Place, activation: nn.Module, second: Place) -> Pair:
        """The modules for a feed-forward half; ``activation`` is the one that is there now.

        Raises:
            RegrowError: the option does not suit the layers.
        """
        raise RegrowError(f"layer {self.name!r} replaces layers one by one")

    def weights(self, place: Place) -> int:
        """Elements of matrices that a token is multiplied with at a layer: half its forward FLOPs."""
        return place.n_blocks * place.block_size**2

    def pair_weights(self, first: Place, second: Place) -> int:
        """The same of a feed-forward half."""
        return self.weights(first) + self.weights(second)

    def reference(self, modules: Sequence[Any], x: Tensor) -> Tensor:
        """What the modules that were built compute, with dense matrices in plain PyTorch: slow, and obvious.

        Args:
            modules: the one of :meth:`build`, or the three of :meth:`build_pair`.
            x: ``[n, in]``.
        """
        (module,) = modules
        return F.linear(x, dense_weight(module), module.bias)


def dense_weight(module: Any) -> Tensor:
    """``W [out, in]`` of a sparse layer or a composite, with gradients to what it is made of."""
    if not isinstance(module, BlockSparseLinear):
        return module.dense_weight()
    b, (rows, cols) = module.block_size, module.topology.coordinates()
    grid = module.values.new_zeros(module.topology.n_block_rows, module.topology.n_block_cols, b, b)
    grid = grid.index_put((rows, cols), module.values)
    return grid.permute(0, 2, 1, 3).reshape(module.out_features, module.in_features)


_REGISTRY: Registry[LayerOption] = Registry("layer", __package__, ENTRY_POINT_GROUP)
register_layer = _REGISTRY.register
restore = _REGISTRY.restore


def available() -> list[str]:
    """Names of all options: this package's and those of the entry-point group ``regrow.layers``.

    Example:
        >>> {"blocks", "lowrank"} <= set(available())
        True
    """
    return _REGISTRY.available()


def layer_class(name: str) -> type[LayerOption]:
    """The class registered under ``name``.

    Raises:
        RegrowError: unknown name; the message lists the known ones.
    """
    return _REGISTRY.find(name)


def create(name: str, **options: Any) -> LayerOption:
    """Build an option by name.

    Raises:
        RegrowError: unknown name or option, or a value the option refuses.

    Example:
        >>> create("lowrank", rank=8).rank
        8
    """
    return _REGISTRY.create(name, **options)
