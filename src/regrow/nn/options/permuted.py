"""PA-DST: the inputs of a sparse layer in another order, fixed or learned. Always sparse, but not while it learns.

A. Tyagi, A. Iyer, L. Young, W. H. Renninger, C. Kanan, Y. Zhu, *Efficient Dynamic Structured Sparse Training with
Learned Shuffles*, 2025, https://arxiv.org/abs/2510.14812. The penalty is that of J. Lyu, S. Zhang, Y. Qi, J. Xin,
*AutoShuffleNet: Learning Permutation Matrices via an Exact Lipschitz Continuous Penalty*, 2019,
https://arxiv.org/abs/1901.08624.

.. math:: y = S P x + b

Blocks can only join inputs that are neighbours; a permutation ``P`` decides which are. ``identity`` and ``random``
(drawn once from the seed) are the free controls: an index gather. ``learned`` begins as a dense matrix ``M``, half
identity and half nearly uniform, whose elements are never negative and whose rows and columns sum to 1: ``sweeps``
after every optimizer step (Sinkhorn) bring it back to that. Such a matrix is a permutation exactly if

.. math:: penalty = \\sum_{rows} (\\|m\\|_1 - \\|m\\|_2) + \\sum_{columns} (\\|m\\|_1 - \\|m\\|_2)

is zero. ``penalty`` times its gradient is added to that of ``M`` in every backward pass, and of both the part that
would change those sums is left out (of the 1-norms, all). Once the penalty per row is below ``threshold``, or a share
``harden_by`` of training is over, ``M`` becomes the permutation nearest to it, an index gather, and is given up with
its optimizer state. Until then the layer costs ``in^2`` multiplications a token more than its blocks: it is then *not*
sparse. It takes a :class:`~regrow.TopologyUpdater` (so also ``regrow pretrain`` and the Trainer callback, with any
method) to see to that.

Two by two, three quarters on the diagonal: each row and column misses 1 - sqrt(.75^2 + .25^2) = .209, so the
penalty is .419 a row, and the nearest permutation is the identity:

    >>> import torch
    >>> matrix = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    >>> round(float(penalty(matrix)) / 2, 3), nearest_permutation(matrix).tolist()
    (0.419, [0, 1])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.errors import RegrowError
from regrow.nn.options.base import LayerOption, Place, dense_weight, register_layer
from regrow.nn.options.composite import Composite, DenseFactor
from regrow.shards import is_sharded

_SOFT = "soft"
_SMALLEST = 1e-9  # of an element, so that no row is zero


def penalty(matrix: Tensor) -> Tensor:
    """How far a matrix of which no element is negative is from a permutation: see the module's equation."""
    return sum(((matrix.sum(d) - torch.linalg.vector_norm(matrix, dim=d)).sum() for d in (0, 1)), matrix.new_zeros(()))


def nearest_permutation(matrix: Tensor) -> Tensor:
    """int32 ``[n]``: the column of each row, distinct, with the greatest sum of elements."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(matrix.detach().double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(torch.int32)


class _Penalised(torch.autograd.Function):
    """The identity; in the backward pass the penalty's gradient joins, and what would only change the sums goes."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.strength = strength
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        rows, columns = (torch.linalg.vector_norm(matrix, dim=d, keepdim=True).clamp_min(1e-30) for d in (1, 0))
        return tangent(grads[0] - ctx.strength * matrix * (1 / rows + 1 / columns)), None


def tangent(gradient: Tensor) -> Tensor:
    """The part that leaves the sums of all rows and columns as they are.

    Adam steps as far along a small gradient as along a large one. So one that all elements share, which
    normalisation would undo under plain descent, would make them all alike.

    >>> tangent(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    return gradient - gradient.mean(0, keepdim=True) - gradient.mean(1, keepdim=True) + gradient.mean()


class _Permute(torch.autograd.Function):
    """``x[:, order]``. PyTorch would add every gradient to zeros, one by one; here they are put in the order back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(1, order.argsort()), None


class ShuffleMatrix(DenseFactor):
    """``x M^T`` with a doubly stochastic ``M``, which is becoming a permutation.

    Args:
        n: features.
        strength: of the penalty.
        sweeps: of Sinkhorn's normalisation after a step.
    """

    def __init__(self, n: int, strength: float, sweeps: int, **factory: Any) -> None:
        super().__init__(n, n, **factory)
        self.strength, self.sweeps = strength, sweeps

    @property
    def matrix(self) -> Tensor:
        """``M`` with the penalty's gradient."""
        penalised: Tensor = _Penalised.apply(self.weight, self.strength)
        return penalised

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    @torch.no_grad()
    def draw_(self, generator: torch.Generator | None) -> None:
        """Half identity, and half all ways alike but for a tenth of noise."""
        n = self.in_features
        noise = torch.rand(n, n, generator=generator).to(self.weight)
        self.weight.copy_(0.5 * torch.eye(n).to(self.weight) + (0.5 / n) * (0.95 + 0.1 * noise))
        self.normalise_()

    @torch.no_grad()
    def normalise_(self) -> None:
        """No element negative, rows and columns of sum 1."""
        self.weight.clamp_(min=_SMALLEST)
        for _ in range(self.sweeps):
            self.weight.div_(self.weight.sum(0, keepdim=True))
            self.weight.div_(self.weight.sum(1, keepdim=True))


class PermutedLinear(Composite):
    """``y = S P x + bias``.

    Attributes:
        shuffle: ``M`` while it is learned, else None.
        permutation: int32 ``[in]``, which input the blocks read at each of their columns; None for the identity.
        sparse: ``S`` and the bias.
    """

    inner = ("sparse",)
    permutation: Tensor | None

    def __init__(self, place: Place, option: Permuted) -> None:
        super().__init__(place.in_features, place.out_features)
        n, kind = place.in_features, option.permutation
        self.threshold, self.harden_by = option.threshold, option.harden_by
        self.shuffle: ShuffleMatrix | None = None
        if kind == "learned":
            self.shuffle = ShuffleMatrix(n, option.penalty, option.sweeps, device=place.device, dtype=place.dtype)
        self.sparse = place.blocks()
        order = torch.arange(n, dtype=torch.int32, device=place.device)
        if not place.is_meta and kind == "random":
            order = torch.randperm(n, generator=place.extra).to(torch.int32)
        if not place.is_meta and self.shuffle is not None:
            self.shuffle.draw_(place.extra)
        self.register_buffer("permutation", None if kind == "identity" else order)

    def compute(self, x: Tensor) -> Tensor:
        if self.shuffle is not None:
            x = self.shuffle(x)
        elif self.permutation is not None:
            x = _Permute.apply(x, self.permutation)
        return self.sparse(x)

    def dense_weight(self) -> Tensor:
        weight = dense_weight(self.sparse)
        if self.shuffle is not None:
            return weight @ self.shuffle.matrix
        return weight if self.permutation is None else weight[:, self.permutation.long().argsort()]

    def after_step_(self, progress: float) -> list[nn.Parameter]:
        if self.shuffle is None:
            return []
        if is_sharded(self):
            raise RegrowError("permutation='learned' cannot be shared out over processes; train it with --parallel ddp")
        self.shuffle.normalise_()
        distance = float(penalty(self.shuffle.weight.detach())) / self.in_features
        return self.harden_() if distance < self.threshold or progress >= self.harden_by else []

    @torch.no_grad()
    def harden_(self) -> list[nn.Parameter]:
        """Make ``M`` the permutation nearest to it; returns the parameter that is given up, emptied."""
        if self.shuffle is None:
            return []
        assert self.permutation is not None
        self.permutation.copy_(nearest_permutation(self.shuffle.weight))
        return [self._drop()]

    def _drop(self) -> nn.Parameter:
        assert self.shuffle is not None
        weight, self.shuffle = self.shuffle.weight, None
        weight.grad, weight.data = None, weight.data.new_empty(0, 0)  # the optimizer still lists it
        return weight

    def numbers(self) -> dict[str, int]:
        return {} if self.shuffle is None else {_SOFT: 1}

    def set_numbers_(self, numbers: dict[str, Any]) -> None:
        if self.shuffle is not None and numbers != {_SOFT: 1}:
            if numbers:
                raise RegrowError(f"numbers must be {{{_SOFT!r}: 1}} or absent, got {numbers}")
            self.shuffle = None
        elif self.shuffle is None and numbers:
            raise RegrowError("only permutation='learned' has numbers")

    def validate(self) -> None:
        n, order = self.in_features, self.permutation
        if order is None:
            return
        fits = order.dtype is torch.int32 and order.shape == (n,) and bool(((order >= 0) & (order < n)).all())
        if not fits or bool((torch.bincount(order.long(), minlength=n) != 1).any()):
            raise RegrowError(f"permutation must name each of {n} inputs exactly once, as int32")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        order = state_dict.get(prefix + "permutation")
        if self.shuffle is not None and prefix + "shuffle.weight" not in state_dict and order is not None:
            self._drop()  # it was saved after it had hardened
        if isinstance(order, Tensor) and order.dtype is not torch.int32:
            raise RegrowError(f"{prefix}permutation must be int32, got {order.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.permutation is not None and not self.permutation.is_meta:
            try:
                self.validate()
            except RegrowError as error:
                raise RegrowError(f"{prefix}{error}") from None


@register_layer("permuted")
@dataclass(frozen=True)
class Permuted(LayerOption):
    """Blocks that read their inputs in another order: a random one, or one that is learned."""

    paper = "Tyagi et al., Efficient Dynamic Structured Sparse Training with Learned Shuffles"
    year = 2025
    link = "https://arxiv.org/abs/2510.14812"
    always_sparse = False

    permutation: Literal["identity", "random", "learned"] = field(
        default="learned", metadata={"help": "order of the inputs; learned is not sparse until it has hardened"}
    )
    penalty: float = field(default=1e-3, metadata={"help": "strength of what makes a learned one a permutation"})
    threshold: float = field(default=0.22, metadata={"help": "penalty per row below which a learned one hardens"})
    harden_by: float = field(default=0.5, metadata={"help": "share of the training after which it hardens anyhow"})
    sweeps: int = field(default=5, metadata={"help": "normalisations of rows and columns after a step"})

    def __post_init__(self) -> None:
        if self.permutation not in ("identity", "random", "learned"):
            raise RegrowError(f"permutation must be 'identity', 'random' or 'learned', got {self.permutation!r}")
        if not 0 <= self.penalty < float("inf"):
            raise RegrowError(f"penalty must be >= 0, got {self.penalty}")
        for name in ("threshold", "harden_by"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RegrowError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 1 <= self.sweeps <= 1000:
            raise RegrowError(f"sweeps must lie between 1 and 1000, got {self.sweeps}")

    @property
    def shardable(self) -> bool:
        return self.permutation != "learned"  # a matrix is normalised as a whole

    def build(self, place: Place) -> PermutedLinear:
        return PermutedLinear(place, self)

    def weights(self, place: Place) -> int:
        return super().weights(place) + (place.in_features**2 if self.permutation == "learned" else 0)
