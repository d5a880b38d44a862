"""A layer made of several matrices, of which some are sparse."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.errors import RegrowError
from regrow.kernels import gpu


class DenseFactor(nn.Module):
    """``y = x W^T`` with a dense ``weight [out, in]``: a small matrix within a :class:`Composite`.

    Not ``nn.Linear``: that transformers would initialise anew, and :func:`regrow.sparsify` would replace.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Composite(nn.Module):
    """The base of modules that stand for a linear layer and hold several matrices.

    A subclass makes them its children, :class:`~regrow.BlockSparseLinear` or :class:`DenseFactor`, and says in
    :meth:`compute` what becomes of ``[n, in]`` tokens. So blocks move, FLOPs are counted and files are written without
    its help. It must call its sparse children, not take their values: a method that needs gradients watches the calls.

    Args:
        in_features, out_features: of the whole.
    """

    inner: ClassVar[tuple[str, ...]] = ()
    """Names of children that read what other children made of the layer's input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise RegrowError(
                f"{type(self).__name__} expects inputs of {self.in_features} features, got shape {list(x.shape)}"
            )
        tokens = x.reshape(-1, self.in_features)
        if torch.is_autocast_enabled(x.device.type) and not gpu.handles(x.device):  # as BlockSparseLinear does
            with torch.autocast(x.device.type, enabled=False):
                y = self.compute(tokens.to(next(self.parameters()).dtype))
        else:
            y = self.compute(tokens)
        return y.view(*x.shape[:-1], self.out_features)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """``[n, in] -> [n, out]``."""

    @property
    def is_linear(self) -> bool:
        """Whether one dense matrix and a bias do the same."""
        return type(self).dense_weight is not Composite.dense_weight

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, that of the child that adds it."""
        biases = (getattr(child, "bias", None) for child in self.children())
        return next((bias for bias in biases if isinstance(bias, Tensor)), None)

    def dense_weight(self) -> Tensor:
        """The ``W [out, in]`` of equal function, with gradients to what it is made of.

        Raises:
            RegrowError: there is none.
        """
        raise RegrowError(f"{type(self).__name__} computes what no one dense matrix does")

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """:meth:`dense_weight` without gradients."""
        return self.dense_weight().detach().clone()

    def after_step_(self, progress: float) -> list[nn.Parameter]:
        """Called by :class:`regrow.TopologyUpdater` after every optimizer step, before blocks move.

        Args:
            progress: share of the training that is over.

        Returns:
            parameters that the module has given up; the optimizer forgets its state of them.
        """
        return []

    def numbers(self) -> dict[str, int]:
        """What of the module's shape the option, the layer's shape and its blocks do not tell; saved with a model."""
        return {}

    def set_numbers_(self, numbers: dict[str, Any]) -> None:
        """Take the shape that :meth:`numbers` told.

        Raises:
            RegrowError: they are not those of such a module.
        """
        if numbers:
            raise RegrowError(f"unknown number {sorted(numbers)[0]!r}")

    def validate(self) -> None:
        """Check buffers that came from a file; those of sparse layers check themselves.

        Raises:
            RegrowError: naming the buffer.
        """

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
