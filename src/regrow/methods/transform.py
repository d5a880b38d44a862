"""Methods whose effective weight is a transform of ordinary dense weights: N:M patterns, soft and learned masks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.methods.base import Method
from regrow.methods.signals import Signals
from regrow.nn.transformed import LayerView


class WeightTransform(Method):
    """Trains dense weights and multiplies by a transform of them; not always sparse, and nothing is saved meanwhile.

    Its functions are pure but for :meth:`advance_`. :class:`regrow.nn.TransformedLinear` calls them, and
    ``training/transformed.py`` carries the method out.
    """

    always_sparse = False
    dense_layout = True
    moves = False  # there are no topology updates: the pattern follows from the weights, step by step

    leaves_out: ClassVar[tuple[str, ...]] = ()
    """Globs of names of layers that stay dense."""
    trained: ClassVar[tuple[str, ...]] = ()
    """Names of the state that trains as parameters of the layer; the rest are buffers."""
    frozen: ClassVar[bool] = False
    """Whether the weights do not train; where a pre-trained model is sparsified, all of its encoder."""

    @property
    def pattern(self) -> tuple[int, int] | None:
        """``(n, m)`` if ``n`` of every ``m`` consecutive inputs stay; None if the share is the run's density."""
        return None

    @abstractmethod
    def effective(self, layer: LayerView) -> Tensor:
        """The weight that training multiplies by now, differentiable, ``[out_features, in_features]``."""

    @abstractmethod
    def final(self, layer: LayerView) -> Tensor:
        """What evaluation multiplies by and the end saves; if training ended now, this would be the result."""

    def initial_state(self, layer: LayerView, generator: torch.Generator) -> dict[str, Tensor]:
        """What is kept with a layer besides its weight, by name, when training begins."""
        return {}

    def advance_(self, layer: LayerView) -> bool:
        """Change ``layer.state`` in place for the step to come; before the first step and after each.

        Returns:
            whether anything has changed that all ranks must agree on.
        """
        return False

    def wrong_state(self, layer: LayerView) -> str | None:
        """What is wrong with a state that was read from a file; its types and shapes are right."""
        return None

    def check_shape(self, name: str, out_features: int, in_features: int, block_size: int) -> None:
        """Raise :class:`RegrowError` if a layer cannot be trained with this method."""
        if self.pattern is not None and in_features % self.pattern[1]:
            n, m = self.pattern
            raise RegrowError(
                f"{name}: {self.name} keeps {n} of every {m} inputs, and {m} does not divide "
                f"in_features={in_features}; choose an m that does"
            )

    def propose(self, signals: Signals) -> None:
        raise RegrowError(f"{self.name} trains dense layers; it cannot move the blocks of a sparse one")


def straight_through(weight: Tensor, value: Tensor, penalty: Tensor | None = None) -> Tensor:
    r"""``value`` forward; backward the gradient goes to ``weight`` as if it were that, plus ``penalty``.

    Example:
        >>> w = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> straight_through(w, torch.tensor([3.0, 0.0]), penalty=torch.tensor([0.0, 0.5])).sum().backward()
        >>> w.grad
        tensor([1.0000, 1.5000])

    Source: Bengio et al. 2013, arXiv 1308.3432.
    """
    return _StraightThrough.apply(weight, value, penalty)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, penalty: Tensor | None) -> Tensor:
        ctx.save_for_backward(penalty)
        return value.detach().view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (penalty,) = ctx.saved_tensors
        return gradients[0] if penalty is None else gradients[0] + penalty, None, None
