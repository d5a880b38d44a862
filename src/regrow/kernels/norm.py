"""Dropout, residual sum and LayerNorm in one pass: ``regrow::dropout_add_norm`` and its gradient.

``y = LayerNorm(residual + dropout(x))``. Neither the sum nor the mask is stored: the backward pass reads ``x`` and
``residual`` again, and makes the mask anew from the seed. float32 on a CPU runs the compiled kernels, everything else
the functions ``reference_*``.
"""

from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu
from regrow.kernels.dropout import dropout_factors, dropout_threshold, signed_seed, unsigned_seed
from regrow.kernels.register import register_operator

torch.library.define(
    "regrow::dropout_add_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, float p, SymInt seed)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "regrow::dropout_add_norm_backward",
    "(Tensor g, Tensor x, Tensor? residual, Tensor mean, Tensor rstd, Tensor weight, float p, SymInt seed, bool need_x,"
    " bool need_sum) -> (Tensor, Tensor, Tensor, Tensor)",
)
_FORWARD, _BACKWARD = (
    getattr(torch.ops.regrow, name).default for name in ("dropout_add_norm", "dropout_add_norm_backward")
)


def dropout_add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, p: float, seed: int
) -> Tensor:
    r"""LayerNorm of a sum with dropout in it, over the last dimension.

    .. math:: y = \frac{h - mean(h)}{\sqrt{var(h) + eps}} \, weight + bias, \qquad h = residual + dropout(x)

    Differentiable once.

    Args:
        x: ``[N, H]``, any strides.
        residual: ``[N, H]``, or None for zero.
        weight, bias: ``[H]``.
        eps: added to the variance, which divides by H.
        p: share of elements of ``x`` that are dropped, in [0, 1).
        seed: of the mask, 64 bits; see :mod:`regrow.kernels.dropout`.

    Returns:
        ``y [N, H]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or ``p`` or ``seed`` is out of range.

    >>> x, residual = torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    >>> dropout_add_norm(x, residual, torch.tensor([1.0, 10.0]), torch.tensor([0.5, 0.5]), 1e-12, p=0.0, seed=0)
    tensor([[-0.5000, 10.5000],
            [ 0.5000,  0.5000]])

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450, equation 4; Vaswani et al. 2017, arXiv 1706.03762, section 5.4.
    """
    return _FORWARD(x, residual, weight, bias, eps, p, signed_seed(seed))[0]


# ---- reference ------------------------------------------------------------------------------------


def reference_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``y [N, H]``, and the mean and the inverse standard deviation ``[N]`` of each sum, at least in float32."""
    h = _sum(x, residual, p, seed)
    mean = h.mean(1)
    rstd = (h - mean[:, None]).square().mean(1).add(eps).rsqrt()
    return ((h - mean[:, None]) * rstd[:, None] * weight + bias).to(x.dtype), mean, rstd


def reference_backward(
    g: Tensor, x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in ``x``, in the sum, in ``weight`` and in ``bias``: arXiv 1607.06450, section 3, differentiated."""
    normed = (_sum(x, residual, p, seed) - mean[:, None]) * rstd[:, None]
    q = g * weight.to(mean.dtype)
    dh = (q - q.mean(1, keepdim=True) - normed * (q * normed).mean(1, keepdim=True)) * rstd[:, None]
    dx = dh * _factors(x, p, seed)
    return dx.to(x.dtype), dh.to(x.dtype), (g * normed).sum(0).to(x.dtype), g.to(mean.dtype).sum(0).to(x.dtype)


def _factors(x: Tensor, p: float, seed: int) -> Tensor:
    return dropout_factors(seed, x.shape[0], x.shape[1], p, _wide(x), x.device)


def _wide(x: Tensor) -> torch.dtype:
    """What the reference computes in: 16 bits are too few for a mean."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum(x: Tensor, residual: Tensor | None, p: float, seed: int) -> Tensor:
    h = x * _factors(x, p, seed)
    return h if residual is None else h + residual


# ---- operators ------------------------------------------------------------------------------------


def _check(x: Tensor, others: dict[str, tuple[Tensor | None, torch.Size]]) -> None:
    if not x.is_floating_point():
        raise RegrowError(f"x is {x.dtype}; it must be floating point")
    if x.dim() != 2 or not x.shape[1]:
        raise RegrowError(f"x is {list(x.shape)}; it must be [N, H], H > 0")
    for name, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RegrowError(f"{name} is {list(tensor.shape)}; x is {list(x.shape)}, so it must be {list(shape)}")
        dtype = _wide(x) if name in ("mean", "rstd") else x.dtype
        if tensor.dtype is not dtype or tensor.device != x.device:
            raise RegrowError(
                f"{name} is {tensor.dtype} on {tensor.device}; for x, {x.dtype} on {x.device}, it must be {dtype} there"
            )


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    row = x.shape[1:]
    _check(x, {"residual": (residual, x.shape), "weight": (weight, row), "bias": (bias, row)})
    threshold = dropout_threshold(p)
    if not cpu.supports_rows(x):
        return reference_forward(x, residual, weight, bias, eps, p, seed)
    y, mean, rstd = _forward_fake(x)
    sizes = *x.shape, eps, unsigned_seed(seed), threshold
    cpu.call("norm", (x, residual, weight, bias, y, mean, rstd), *sizes)
    return y, mean, rstd


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], dtype=_wide(x))
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _backward(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: int,
    need_x: bool,
    need_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, width = x.shape[:1], x.shape[1:]
    same = {"g": (g, x.shape), "residual": (residual, x.shape)}
    _check(x, {**same, "mean": (mean, n), "rstd": (rstd, n), "weight": (weight, width)})
    threshold = dropout_threshold(p)
    if not cpu.supports_rows(x):
        dx, dh, dweight, dbias = reference_backward(g, x, residual, mean, rstd, weight, p, seed)
        return dx if need_x else x.new_empty(0), dh if need_sum else x.new_empty(0), dweight, dbias
    dx, dh, dweight, dbias = _backward_fake(g, x, residual, mean, rstd, weight, p, seed, need_x, need_sum)
    written = dx if need_x else None, dh if need_sum else None, dweight, dbias
    cpu.call(
        "norm_backward",
        (g, x, residual, weight, mean, rstd, *written),
        *x.shape,
        unsigned_seed(seed),
        threshold,
    )
    return dx, dh, dweight, dbias


def _backward_fake(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dh = (x.new_empty(x.shape if need else 0) for need in rest[-2:])
    return dx, dh, x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _bias, _eps, ctx.p, ctx.seed = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the statistics
    ctx.save_for_backward(x, residual, *output[1:], weight)


def _gradient(ctx: Any, g: Tensor | None, *_of_statistics: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 7
    need_x, need_residual = ctx.needs_input_grad[:2]
    drops = dropout_threshold(ctx.p) > 0
    need_sum = need_residual or (need_x and not drops)
    dx, dh, *of_affine = _BACKWARD(g, *ctx.saved_tensors, ctx.p, ctx.seed, need_x and drops, need_sum)
    # Without dropout both gradients are one tensor, as those of an ordinary sum are: autograd adds to a gradient in
    # place only where nothing else holds it.
    dx = dx if drops else dh
    return dx if need_x else None, dh if need_residual else None, *of_affine, *[None] * 3


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("dropout_add_norm has no second derivative; use torch.nn.functional.layer_norm")


register_operator("dropout_add_norm", _forward, _forward_fake, _gradient, _setup)
register_operator("dropout_add_norm_backward", _backward, _backward_fake, _no_second_gradient, lambda *context: None)
