"""What a sparse-training method is, and how it is found by name.

A method is a frozen dataclass in one file. Its fields are its options; its functions are pure: they look at
:class:`~regrow.methods.Signals` and return data. Applying it is the updater's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.signals import Signals
from regrow.nn.flops import LayerSize
from regrow.registry import Registry
from regrow.topology import BlockTopology, TopologyUpdate

ENTRY_POINT_GROUP = "regrow.methods"


class Method(ABC):
    """A sparse-training method: decides which blocks of one layer move where.

    Subclass as a frozen dataclass with a default for every field and decorate with :func:`register`.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Authors and title."""
    year: ClassVar[int] = 0
    link: ClassVar[str] = ""
    always_sparse: ClassVar[bool] = True
    """Nothing of a dense weight's size or cost is ever computed."""
    moves: ClassVar[bool] = True
    """Whether the pattern changes at all."""
    needs_gradient: ClassVar[bool] = False
    """``signals.gradient`` is present; :meth:`propose` is then called during the backward pass of the update step."""

    dense_layout: ClassVar[bool] = False
    """Trains ordinary dense weights and only masks them: see :class:`DenseLayoutMethod`."""

    exact_budget: ClassVar[bool] = True
    """A layer ends an update with exactly ``signals.n_after`` blocks; else it may lack less than one per block row."""

    @property
    def resizes(self) -> bool:
        """Whether a layer may have another number of blocks after an update."""
        return type(self).allocate is not Method.allocate or not self.exact_budget

    @abstractmethod
    def propose(self, signals: Signals) -> TopologyUpdate | None:
        """The blocks to move, or ``None`` to leave the layer alone. Must not change anything."""

    def allocate(self, layers: Mapping[str, Signals]) -> dict[str, int]:
        """How many blocks each layer has after this update; by default as many as before.

        Called once per update, before any :meth:`propose`, without ``gradient``.
        """
        return {name: signals.topology.n_blocks for name, signals in layers.items()}

    def density_at(self, progress: float, start: float) -> float | None:
        """Share of all blocks that exist after an update at ``progress``, to whole blocks; ``start`` was the first.

        What :func:`regrow.training.mean_density` averages. By default ``start`` if no layer changes its size, else
        ``None``: not known beforehand. A method whose :meth:`allocate` follows a plan says so here.
        """
        return None if self.resizes else start

    def check_layer(self, name: str, topology: BlockTopology) -> None:
        """Raise :class:`RegrowError` if a layer cannot be trained with this method; called before the first step."""

    def check_layers(self, layers: Mapping[str, BlockTopology]) -> None:
        """The same of all layers together; by default of each. A resumed training asks again, of what it has by now."""
        for name, topology in layers.items():
            self.check_layer(name, topology)

    def regularise_(self, values: Tensor, lr: float) -> None:
        """Decoupled shrinkage of ``values`` in place, once after every optimizer step; nothing by default."""

    def optimizer_options(self) -> dict[str, Any]:
        """Arguments of :class:`regrow.optim.AdamW` that belong to the method."""
        return {}

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        """FLOPs of one update of a layer beyond ordinary training, comparisons not counted."""
        return 0


class Schedule(Protocol):
    """What a method needs to know of :class:`regrow.training.UpdateSchedule`."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the training."""

    @property
    def n_updates(self) -> int:
        """Segments it is cut into."""


class DenseLayoutMethod(Method):
    """A control that keeps dense weights and decides, phase by phase, which of their blocks train.

    It never moves blocks of a :class:`~regrow.BlockSparseLinear`, and costs what dense training costs.
    """

    always_sparse = False
    dense_layout = True

    unused: Literal["zero", "freeze"]
    """What becomes of blocks that do not train."""

    @abstractmethod
    def phase(self, schedule: Schedule, step: int) -> int | None:
        """``None`` where the step after ``step`` is dense; in a sparse phase what its random choice depends on."""

    @abstractmethod
    def choose(self, norms: Tensor, n_active: int, generator: torch.Generator) -> Tensor:
        """The ``n_active`` blocks to train, as a mask of the shape of ``norms``, the L1 norms of all blocks."""

    def propose(self, signals: Signals) -> None:
        raise RegrowError(f"{self.name} trains dense layers; it cannot move the blocks of a sparse one")


_REGISTRY: Registry[Method] = Registry("method", __package__, ENTRY_POINT_GROUP)
register = _REGISTRY.register


def available() -> list[str]:
    """Names of all methods: this package's and those of the entry-point group ``regrow.methods``.

    Example:
        >>> {"dynsparse", "static"} <= set(available())
        True
    """
    return _REGISTRY.available()


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        RegrowError: unknown name; the message lists the known ones.
    """
    return _REGISTRY.find(name)


def create(name: str, **options: Any) -> Method:
    """Build a method by name with its options.

    Raises:
        RegrowError: unknown name or option, or a value the method refuses.

    Example:
        >>> create("dynsparse", norm="l2").norm
        'l2'
    """
    return _REGISTRY.create(name, **options)
