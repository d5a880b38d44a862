"""A classifier's last layer and its loss in one, without ever holding all of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regrow.errors import RegrowError
from regrow.kernels import cpu
from regrow.nn.tied import SharedGradient

_ROWS = 1024
"""Rows of logits that exist at a time, at most."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rows: int = _ROWS,
    shared: SharedGradient | None = None,
) -> Tensor:
    r"""Mean cross-entropy of a linear classifier: ``cross_entropy(x W^T + bias, targets)``.

    .. math:: \frac1n \sum_i \Big(\log \sum_c e^{z_{ic}} - z_{i t_i}\Big), \qquad z = x W^T + b

    The logits of a vocabulary are larger than all else in a training step. Here they exist ``rows`` rows at a time,
    and their gradient, softmax minus one-hot, takes their place at once: the forward pass computes the gradients of
    ``x``, ``weight`` and ``bias`` too, and the backward pass only scales them. Differentiable once. On a CPU in
    float32 softmax, loss and gradient are one compiled pass over each row.

    Args:
        x: ``[n, in]``.
        weight: ``[classes, in]``.
        bias: ``[classes]`` or None.
        targets: ``[n]`` int64, the true classes.
        rows: how many rows of logits exist at a time, at most. More cost memory, fewer cost a pass over the weight's
            gradient for each group.
        shared: for a ``weight`` that is the embedding too: see :func:`regrow.nn.tied.tied_embedding`, from whose result
            ``x`` was computed.

    Returns:
        The scalar loss in nats; 0 if ``n`` is 0.

    Raises:
        RegrowError: shapes or dtypes disagree, or a target is no class.

    Example:
        >>> x, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> linear_cross_entropy(x, weight, None, torch.tensor([0, 1]))
        tensor(0.5514)

    Reference: the gradient in the forward pass is that of Hsu et al. 2024, *Liger Kernel* (arXiv 2410.10989).
    """
    _check(x, weight, bias, targets, rows)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, bias, targets, rows, shared)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise RegrowError(f"x must be [n, in] and weight [classes, in], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RegrowError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if targets.shape != x.shape[:1] or targets.dtype is not torch.int64:
        raise RegrowError(f"targets must be int64 [{x.shape[0]}], got {targets.dtype} {list(targets.shape)}")
    if rows < 1:
        raise RegrowError(f"rows must be at least 1, got {rows}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        shared: SharedGradient | None,
    ) -> Tensor:
        n, (with_x, with_weight, with_bias) = x.shape[0], ctx.needs_input_grad[:3]
        gradient = with_x or with_weight or with_bias
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if with_x else None
        dweight: Tensor | None = None
        dbias = weight.new_zeros(weight.shape[0]) if gradient else None
        total = x.new_zeros((), dtype=_at_least_float32(x.dtype))
        parts = max(1, -(-n // rows))
        for part in range(parts):  # of about equal size
            i = slice(n * part // parts, n * (part + 1) // parts)
            logits = x[i] @ weight.t()
            total += _softmax_gradient_(logits, bias, targets[i], 1 / max(n, 1) if gradient else 0.0, dbias)
            if dx is not None:
                torch.mm(logits, weight, out=dx[i])
            if with_weight:
                dweight = logits.t() @ x[i] if dweight is None else dweight.addmm_(logits.t(), x[i])
        # No saved tensors: a gradient is taken over, not copied, only where nothing else refers to it.
        ctx.shared = shared
        ctx.gradients = dx, dweight, dbias if with_bias else None
        return total / max(n, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RegrowError("linear_cross_entropy keeps its gradients for one backward pass; compute the loss again")
        if g.is_cuda or g.item() != 1:  # to look would be to wait for the device
            gradients = [None if gradient is None else gradient * g for gradient in gradients]
        dx, dweight, dbias = gradients
        if ctx.shared is not None:
            ctx.shared.gradient, dweight = dweight, None
        return dx, dweight, dbias, None, None, None


def _softmax_gradient_(
    logits: Tensor, bias: Tensor | None, targets: Tensor, scale: float, dbias: Tensor | None
) -> Tensor:
    """Sum of the losses of ``logits + bias``.

    With a ``scale``, the gradient times it takes the logits' place, and its sum over rows is added to ``dbias``.
    """
    if cpu.supports_dense(logits):
        losses, columns = cpu.cross_entropy_(logits, bias, targets, scale)
    else:
        if bias is not None:
            logits += bias
        top = logits.to(_at_least_float32(logits.dtype)).log_softmax(1)
        losses = F.nll_loss(top, targets, reduction="none")
        if scale:
            gradient = top.exp_()
            gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
            logits.copy_(gradient.mul_(scale))
        columns = logits.sum(0)
    if scale and dbias is not None:
        dbias += columns
    return losses.sum()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
