"""What differs between two saved models: values that stayed what they were, and blocks that moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regrow.entries import listed
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, named_sparse_layers

SMALL = 1e-5
"""A change of less counts as none: what bfloat16 could not hold for weights of usual size."""


@dataclass(frozen=True)
class Changes:
    """Update sparsity between two models.

    Args:
        n_values: entries that both models have.
        equal: share of them that are bitwise the same.
        small: share of them that differ by less than 1e-5, in float32.
        n_blocks: blocks of the second model's sparse layers; 0 if it has none.
        churn: share of these at positions where the first model has none; their values are not in ``n_values``.
    """

    n_values: int
    equal: float
    small: float
    n_blocks: int
    churn: float


class _Counts(NamedTuple):
    values: int = 0
    equal: int = 0
    small: int = 0
    blocks: int = 0
    new: int = 0

    def plus(self, other: _Counts) -> _Counts:
        return _Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def shares(self) -> Changes:
        of_values, of_blocks = max(self.values, 1), max(self.blocks, 1)
        return Changes(self.values, self.equal / of_values, self.small / of_values, self.blocks, self.new / of_blocks)


@listed(
    "tool",
    "changes",
    paper="Mukherjee et al., Reinforcement Learning Finetunes Small Subnetworks in Large Language Models",
    year=2025,
    link="https://arxiv.org/abs/2505.11711",
    always_sparse=True,
    command="regrow evaluate MODEL --against OTHER",
    does="How many weights two models share bitwise, how many nearly, and how many blocks have moved.",
)
@torch.no_grad()
def changes(before: nn.Module, after: nn.Module) -> dict[str, Changes]:
    """Update sparsity of the sparse weights, of all other parameters, and of all of them.

    Blocks are compared by their position, not by their slot, so that moved ones do not pass for changed values.

    Returns:
        by ``"sparse weights"`` (if there are any), ``"other parameters"`` and ``"all"``.

    Raises:
        RegrowError: the models have no parameter of one name and shape, or sparse layers of other shapes.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> b.load_state_dict(a.state_dict())
        <All keys matched successfully>
        >>> with torch.no_grad():
        ...     _ = b.weight[0, 0].add_(1.0)
        >>> round(changes(a, b)["all"].equal, 3)
        0.833

    Reference: Mukherjee et al. 2025, *Reinforcement Learning Finetunes Small Subnetworks in Large Language Models*,
    https://arxiv.org/abs/2505.11711.
    """
    sparse_before, sparse_after = dict(named_sparse_layers(before)), dict(named_sparse_layers(after))
    of_sparse, of_others = _Counts(), _Counts()
    for name in sparse_before.keys() & sparse_after.keys():
        of_sparse = of_sparse.plus(_compare_layers(name, sparse_before[name], sparse_after[name]))
    blocks = {f"{name}.values" for name in sparse_before | sparse_after}
    old = dict(before.named_parameters())
    for name, new in after.named_parameters():
        if name not in blocks and name in old and old[name].shape == new.shape:
            of_others = of_others.plus(_compare(old[name], new))
    both = of_sparse.plus(of_others)
    if both.values == 0:
        raise RegrowError("the two models have no parameter in common; are they of one architecture?")
    found = {"sparse weights": of_sparse} if sparse_before or sparse_after else {}
    return {name: counts.shares() for name, counts in (found | {"other parameters": of_others, "all": both}).items()}


def _compare_layers(name: str, before: BlockSparseLinear, after: BlockSparseLinear) -> _Counts:
    shapes = [(layer.out_features, layer.in_features, str(layer.block_shape)) for layer in (before, after)]
    if shapes[0] != shapes[1]:
        raise RegrowError(f"{name} is of {shapes[0]} in one model and of {shapes[1]} in the other (out, in, block)")
    old, new = before.topology.keys(), after.topology.keys()
    slot_of = torch.full((before.topology.n_positions,), -1, dtype=torch.int64)
    slot_of[old] = torch.arange(len(old))
    found = slot_of[new]
    kept = found >= 0
    counts = _compare(before.values[found[kept]], after.values[kept])
    return counts._replace(blocks=len(new), new=int((~kept).sum()))


def _compare(before: Tensor, after: Tensor) -> _Counts:
    equal = int((before == after).sum()) if before.dtype == after.dtype else 0
    small = int(((before.float() - after.float()).abs() < SMALL).sum())
    return _Counts(after.numel(), equal, small)
