"""A feed-forward half that uses a few of its hidden units for each token."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.errors import RegrowError
from regrow.nn.init import initialise_
from regrow.nn.options.composite import Composite


def statistical_top_k(z: Tensor, keep: float) -> Tensor:
    r"""How far each number lies above a threshold that about the share ``keep`` of its row exceeds; 0 below.

    .. math:: \max(z - \theta, 0), \qquad \theta = \text{mean}(z) + \text{std}(z) \, \Phi^{-1}(1 - keep)

    Nothing is sorted. The count is not exact: it is ``keep`` of a row whose numbers follow a normal distribution, of
    which rows of 3,072 have 246 with a standard deviation of 9.5 at ``keep = 0.08``. The threshold is subtracted (a
    soft threshold), so that the result does not jump where a number crosses it, and takes part in the gradient.

    Args:
        z: ``[..., n]``.
        keep: between 0 and 1.

    Raises:
        RegrowError: ``keep`` is not between 0 and 1.

    Example:
        >>> statistical_top_k(torch.tensor([0.0, 0.0, 0.0, 4.0]), 0.5)  # the mean, 1, is subtracted
        tensor([0., 0., 0., 3.])

    Reference: You et al. 2025, *Spark Transformer*, https://arxiv.org/abs/2506.06644, section 3.
    """
    off = z - z.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(off, dim=-1, keepdim=True) / z.shape[-1] ** 0.5  # where 0, with gradient 0
    return torch.relu(off - quantile_of(keep) * deviation)


def quantile_of(keep: float) -> float:
    """Above which a share ``keep`` of the normal distribution lies.

    Example:
        >>> round(quantile_of(0.08), 3)
        1.405
    """
    if not 0 < keep < 1:
        raise RegrowError(f"keep must lie between 0 and 1, got {keep}")
    return NormalDist().inv_cdf(1 - keep)


class SparkFFN(Composite):
    r"""``y = V^T (gelu(statistical_top_k(K1 x[:r] + b1)) * (K2 x[r:])) + b2``: a feed-forward half, few units active.

    A dense product with the first ``r`` features of the input decides which hidden units a token activates. Only for
    those are the rest of the input and the output multiplied, forward and backward, token by token. The parameters are
    as many as those of two linear layers ``hidden -> intermediate -> hidden``; with ``k = keep * intermediate`` a token
    takes about

    .. math:: 2 \, (r \cdot intermediate + k \, (hidden - r) + k \cdot hidden)

    FLOPs forward; :meth:`flops` counts the gradients, :func:`regrow.kernels.spark_ffn` has the formulas. Differentiable
    once. No ``nn.Linear`` can stand for it, so :func:`regrow.densify` refuses it.

    Args:
        hidden: features of the input and the output.
        intermediate: hidden units.
        keep: share of the units that a token activates, on average, between 0 and 1; see :func:`statistical_top_k`.
        r: features of the input that decide; half of them by default.
        bias: ``b1``, of the gates, and ``b2``, of the output. As in BERT's feed-forward half there are two.
        generator: source of the random values; the global one if absent.

    Shape:
        input ``[..., hidden]`` -> output ``[..., hidden]``; any number of leading dimensions, also zero tokens.

    Under ``torch.autocast`` it computes in the dtype of its weights.

    Raises:
        RegrowError: ``keep`` or ``r`` is out of range, or a size is below its least.

    Example:
        >>> half = SparkFFN(64, 256)
        >>> half(torch.ones(3, 5, 64)).shape
        torch.Size([3, 5, 64])
        >>> dense = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
        >>> sum(p.numel() for p in half.parameters()) == sum(p.numel() for p in dense.parameters())
        True

    Reference: You et al. 2025, *Spark Transformer*, https://arxiv.org/abs/2506.06644, section 2.
    """

    gate: nn.Parameter
    gate_bias: nn.Parameter | None
    up: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter | None

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        keep: float = 0.08,
        r: int | None = None,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden, hidden)
        if hidden < 2 or intermediate < 1:
            raise RegrowError(f"hidden must be at least 2 and intermediate at least 1, got {hidden} and {intermediate}")
        r = hidden // 2 if r is None else r
        if not 0 < r < hidden:
            raise RegrowError(f"r must lie between 0 and hidden={hidden}, got {r}")
        self.quantile = quantile_of(keep)
        self.hidden, self.intermediate, self.keep, self.r = hidden, intermediate, keep, r

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.gate, self.gate_bias = empty(intermediate, r), empty(intermediate) if bias else None
        self.up = empty(intermediate, hidden - r)
        self.down, self.down_bias = empty(intermediate, hidden), empty(hidden) if bias else None
        if not self.gate.is_meta:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew as BERT's and zero the biases."""
        for weight in (self.gate, self.up, self.down):
            initialise_(weight, generator)
        for bias in (self.gate_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def compute(self, x: Tensor) -> Tensor:
        """``[n, hidden] -> [n, hidden]``."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.gate.dtype)
        return kernels.spark_ffn(x, self.gate, self.gate_bias, self.up, self.down, self.down_bias, self.quantile)

    @property
    def bias(self) -> Tensor | None:
        """``b2 [hidden]``."""
        return self.down_bias

    def flops(self, rows: int, with_input: bool = True) -> tuple[int, int, int]:
        """Of products: forward, and for the gradients of the input (and the units) and of the weights.

        Counted with ``round(keep * intermediate)`` active units a token:

        >>> half = SparkFFN(64, 1000, keep=0.1)
        >>> half.flops(1)[0] == 2 * (32 * 1000 + 100 * 32 + 100 * 64)
        True
        """
        active, r = round(self.keep * self.intermediate), self.r
        forward = r * self.intermediate + active * (self.hidden - r + self.hidden)
        threshold = r * r * (rows + self.intermediate)  # of the threshold's gradient, in either direction
        through = rows * active * self.hidden  # from the output back to the units
        down = through + rows * active * self.hidden + threshold if with_input else through
        return 2 * rows * forward, 2 * down, 2 * (2 * rows * active * self.hidden + threshold)

    def recomputed_flops(self, rows: int) -> int:
        """``K2 x`` of the active units, which the backward pass computes again: only the gates are kept."""
        return 2 * rows * round(self.keep * self.intermediate) * (self.hidden - self.r)

    @torch.no_grad()
    def active_units(self, x: Tensor) -> Tensor:
        """How many units each token of ``x [..., hidden]`` activates: ``[...]``."""
        z = nn.functional.linear(x[..., : self.r], self.gate, self.gate_bias)
        return (statistical_top_k(z, self.keep) > 0).sum(-1)

    def extra_repr(self) -> str:
        bias = self.down_bias is not None
        return f"hidden={self.hidden}, intermediate={self.intermediate}, keep={self.keep:g}, r={self.r}, bias={bias}"
