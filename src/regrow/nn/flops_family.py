"""What a family of models has that its layers alone do not tell, for :func:`regrow.count_flops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from regrow.errors import RegrowError
from regrow.nn.flops_report import LayerFlops

ENCODER, ATTENTION, OTHER, EMBEDDINGS = "encoder layers", "attention products", "layers", "embeddings (look-ups)"

Rows = Literal["tokens", "sequences", "predicted"]
Costs = Mapping[nn.Module, LayerFlops]


@dataclass(frozen=True)
class Role:
    """What a layer is in a known module.

    Args:
        part: of the model it is counted under.
        rows: what goes through it: every token, one vector a sequence, or the positions that are predicted.
        beside: it reads what its siblings registered before it read, not what they made of it.
        reads: the type of module whose results it reads, where that is not all that is registered before it.
    """

    part: str
    rows: Rows = "tokens"
    beside: bool = False
    reads: type | None = None


@dataclass(frozen=True)
class Family:
    """What a family of models has that its layers alone do not tell.

    Args:
        roles: by type of a module and name of its child.
        attention: width of the queries, all heads together, of the modules that multiply them with keys.
        recomputed: FLOPs that a module computes again in the backward pass, from the costs of what is in it.
        without_products: types whose own parameters take part in no product.
        refused: types that cannot be counted, and why.
    """

    roles: Mapping[tuple[type, str], Role]
    attention: Mapping[type, Callable[[nn.Module], int]]
    recomputed: Mapping[type, Callable[[nn.Module, Costs], int]]
    without_products: tuple[type, ...] = ()
    refused: Mapping[type, str] = field(default_factory=dict)


_FAMILIES: list[Family] = []


def register_family(family: Family) -> None:
    """Make :func:`count_flops` know a family of models."""
    _FAMILIES.append(family)


def role_of(modules: Mapping[str, nn.Module], name: str) -> tuple[str, Role]:
    """What a layer is by its place, and that place; a module that stands for a layer may have several inside."""
    place = name
    while place:
        parent, _, child = place.rpartition(".")
        for family in _FAMILIES:
            for (kind, known), role in family.roles.items():
                if known == child and isinstance(modules[parent], kind):
                    return place, role
        place = parent
    return name, Role(OTHER)


def attention_width(module: nn.Module) -> int | None:
    """Of the queries that this very module multiplies with keys; None if it does not."""
    for family in _FAMILIES:
        for kind, width in family.attention.items():
            if isinstance(module, kind):
                return width(module)
    return None


def recomputed_by(module: nn.Module, costs: Costs) -> int:
    """What this very module computes again in the backward pass."""
    return sum(
        count(module, costs)
        for family in _FAMILIES
        for kind, count in family.recomputed.items()
        if isinstance(module, kind)
    )


def has_no_product(module: nn.Module) -> bool:
    """Whether a family says that the module's own parameters take part in no product."""
    return any(isinstance(module, family.without_products) for family in _FAMILIES)


def refuse_unknown(modules: Iterator[tuple[str, nn.Module]]) -> None:
    """Raise :class:`RegrowError` for what a family says cannot be counted."""
    for name, module in modules:
        for family in _FAMILIES:
            for kind, why in family.refused.items():
                if isinstance(module, kind):
                    raise RegrowError(f"{name}: {why}")
