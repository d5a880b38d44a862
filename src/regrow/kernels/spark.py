"""A feed-forward half that chooses its hidden units token by token: ``regrow::spark_ffn`` and its gradient.

A dense product with the first part of the input decides which units are active; all else is computed for those alone,
forward and backward. float32 on a CPU runs the compiled kernels, everything else dense products and masks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu, reference
from regrow.kernels.checks import check_data, check_tensor
from regrow.kernels.gather import Lists, gather_dot, gather_sum, transposed
from regrow.kernels.register import register_operator

torch.library.define(
    "regrow::spark_ffn",
    "(Tensor x, Tensor gate, Tensor? gate_bias, Tensor up, Tensor down, Tensor? bias, float quantile, bool with_z)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "regrow::spark_ffn_backward",
    "(Tensor g, Tensor x, Tensor z, Tensor gate, Tensor? gate_bias, Tensor up, Tensor down, float quantile,"
    " bool need_x, bool need_gate, bool need_gate_bias, bool need_up, bool need_down, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_SPARK_FFN, _SPARK_FFN_BACKWARD = torch.ops.regrow.spark_ffn.default, torch.ops.regrow.spark_ffn_backward.default


class SparkWeights(NamedTuple):
    """``gate [hidden, r]``, ``gate_bias [hidden]`` or None, ``up [hidden, in - r]``, ``down [hidden, out]``."""

    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    down: Tensor


def spark_ffn(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    quantile: float,
) -> Tensor:
    r"""A feed-forward half of which each token uses a few hidden units, those whose gate is among its highest.

    With ``r`` the width of ``gate``, for every token

    .. math::
        z = K_1 x_{:r} + b_1, \quad \theta = \text{mean}(z) + q \cdot \text{std}(z), \quad
        y = V^T \big( \text{gelu}(\max(z - \theta, 0)) \cdot K_2 x_{r:} \big) + b_2

    The standard deviation is that of all of ``z`` (divided by their number), as in the code published for Gemma 3n, and
    the gradient flows through the threshold as it does there. It is therefore not zero for units that are not active,
    but there it is ``share + beta (z - mean(z))`` with two numbers per token. What it adds to the gradients of ``K1``
    and ``x`` therefore follows from ``r x r`` matrices, ``K1^T K1`` and ``x^T diag(beta) x``, without a product of the
    hidden width for every token. Differentiable once.

    Args:
        x: ``[N, in]``, any strides.
        gate: ``K1 [hidden, r]``, with ``0 < r < in``.
        gate_bias: ``b1 [hidden]`` or None.
        up: ``K2 [hidden, in - r]``.
        down: ``V [hidden, out]``: what a unit adds to the output is contiguous.
        bias: ``b2 [out]`` or None.
        quantile: ``q``, that of the normal distribution above which the share of units lies that is to be active.

    Returns:
        ``y [N, out]``.

    Raises:
        RegrowError: shapes, dtypes or devices disagree, or the quantile is not finite.

    Two units; the second is above the mean of both:

    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> gate, up, down = torch.tensor([[0.0], [4.0]]), torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> spark_ffn(x, gate, None, up, down, None, 0.0)  # gelu(4 - 2) * (2 + 3)
    tensor([[0.0000, 9.7725]])

    Reference: You et al. 2025, *Spark Transformer*, arXiv 2506.06644, sections 2 and 3.
    """
    with_z = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, gate, gate_bias, up, down, bias)
    )
    return _SPARK_FFN(x, gate, gate_bias, up, down, bias, quantile, with_z)[0]


# ---- what is active ---------------------------------------------------------------------------------


class _Active(NamedTuple):
    lists: Lists
    over: Tensor
    """``[n]`` gates less the thresholds."""
    mean: Tensor
    deviation: Tensor


def _active(z: Tensor, quantile: float) -> _Active:
    n, hidden = z.shape
    mean, deviation, limit = (z.new_empty(n) for _ in range(3))
    ptr = torch.empty(n + 1, dtype=torch.int32)
    cpu.call("spark_thresholds", (z, mean, deviation, limit, ptr), n, hidden, quantile)
    total = int(ptr[-1])
    idx, over = torch.empty(total, dtype=torch.int32), z.new_empty(total)
    cpu.call("spark_select", (z, limit, ptr, idx, over), n, hidden, total)
    return _Active(Lists(ptr, idx, hidden), over, mean, deviation)


def _gates(x: Tensor, gate: Tensor, gate_bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x[:, : gate.shape[1]], gate, gate_bias)


# ---- operators --------------------------------------------------------------------------------------


def _check(x: Tensor, weights: SparkWeights, bias: Tensor | None, quantile: float) -> None:
    gate, gate_bias, up, down = weights
    check_data("x", x, {"gate": gate, "gate_bias": gate_bias, "up": up, "down": down, "bias": bias})
    for name, matrix in (("x", x), ("gate", gate), ("down", down)):
        if matrix.dim() != 2 or not matrix.shape[1]:
            raise RegrowError(f"{name} is {list(matrix.shape)}; it must be a matrix with at least one column")
    (hidden, r), width = gate.shape, x.shape[1]
    if not 0 < r < width or not hidden:
        raise RegrowError(f"gate is {list(gate.shape)}; x of {width} features needs [hidden, from 1 to {width - 1}]")
    shapes = {"gate_bias": (hidden,), "up": (hidden, width - r), "down": (hidden, down.shape[1])}
    for name, tensor in (("gate_bias", gate_bias), ("up", up), ("down", down), ("bias", bias)):
        shape = shapes.get(name, (down.shape[1],))
        if tensor is not None:
            check_tensor(name, tensor, shape, x.dtype, x.device)
    if not math.isfinite(quantile):
        raise RegrowError(f"quantile is {quantile}; it must be finite")


def _spark_ffn(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *weights, bias, quantile, with_z = rest
    w = SparkWeights(*weights)
    _check(x, w, bias, quantile)
    if not cpu.supports_rows(x):
        z = _gates(x, w.gate, w.gate_bias)
        return reference.spark_ffn(x, z, w.up, w.down, bias, quantile), z if with_z else x.new_empty(0)
    x, down = x.contiguous(), w.down.contiguous()
    z = _gates(x, w.gate, w.gate_bias)
    lists, over, _, _ = _active(z, quantile)
    h = gather_dot(lists, x, w.up.contiguous(), lead_at=w.gate.shape[1])
    cpu.call("spark_hidden", (over, h, h), h.shape[0])
    return gather_sum(lists, h, down, start=bias), z if with_z else x.new_empty(0)


def _spark_ffn_backward(g: Tensor, x: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *weights, quantile = rest[:5]
    needed, w = rest[5:], SparkWeights(*weights)
    _check(x, w, None, quantile)
    check_tensor("g", g, (x.shape[0], w.down.shape[1]), x.dtype, x.device)
    check_tensor("z", z, (x.shape[0], w.gate.shape[0]), x.dtype, x.device)
    if cpu.supports_rows(x):
        grads = _gradients(g.contiguous(), x.contiguous(), z.contiguous(), w, quantile, needed)
    else:
        grads = reference.spark_ffn_backward(g, x, z, w.gate, w.up, w.down, quantile)
    return tuple(grad if need else x.new_empty(0) for grad, need in zip(grads, needed, strict=True))


def _gradients(
    g: Tensor, x: Tensor, z: Tensor, w: SparkWeights, quantile: float, needed: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """In x, gate, gate_bias, up, down and bias; empty where it is not needed."""
    need_x, need_gate, need_gate_bias, need_up, need_down, need_bias = needed
    active = _active(z, quantile)
    lists, over, up_table, r = active.lists, active.over, w.up.contiguous(), w.gate.shape[1]
    up, dh = gather_dot(lists, x, up_table, lead_at=r), gather_dot(lists, g, w.down.contiguous())
    h, dup, dover = (torch.empty_like(over) for _ in range(3))
    total = x.new_empty(x.shape[0])
    cpu.call("spark_slopes", (lists.ptr, over, up, dh, h, dup, dover, total), x.shape[0], over.shape[0])

    dx = dgate = dgate_bias = dup_weight = ddown = x.new_empty(0)
    if need_gate or need_gate_bias or need_up or need_down:
        by_unit, (h, dup_t, dover_t), dgate_bias = transposed(lists, (h, dup, dover))
        if need_down:
            ddown = gather_sum(by_unit, h, g)
        if need_up:
            dup_weight = gather_sum(by_unit, dup_t, x, columns=slice(r, None))
        if need_gate:
            dgate = gather_sum(by_unit, dover_t, x, columns=slice(r))
    if need_x:
        dx = torch.empty_like(x)
        gather_sum(lists, dover, w.gate.contiguous(), out=dx)
        gather_sum(lists, dup, up_table, out=dx, out_at=r)
    gradients = dx[:, :r] if need_x else None, dgate if need_gate else None, dgate_bias if need_gate_bias else None
    _add_through_threshold(x[:, :r], w, active, quantile, total, *gradients)
    return dx, dgate, dgate_bias, dup_weight, ddown, g.sum(0) if need_bias else x.new_empty(0)


def _add_through_threshold(
    x: Tensor,
    w: SparkWeights,
    active: _Active,
    quantile: float,
    total: Tensor,
    dx: Tensor | None,
    dgate: Tensor | None,
    dgate_bias: Tensor | None,
) -> None:
    """What reaches every gate because the threshold moves with all: ``dz = share + beta (z - mean)`` for each token."""
    # The threshold's slope in z is 1 / hidden + quantile * (z - mean) / (hidden * deviation); the second is none at all
    # where all gates are equal.
    share = -total / w.gate.shape[0]
    beta = torch.where(active.deviation > 0, share * quantile / active.deviation, 0.0)
    gate = w.gate - w.gate.mean(0)  # z - mean = gate x + b
    b = None if w.gate_bias is None else w.gate_bias - w.gate_bias.mean()
    x_beta, x_share = beta @ x, share @ x
    if dgate is not None:
        dgate.addmm_(gate, (x * beta[:, None]).T @ x).add_(x_share)
        if b is not None:
            dgate.addr_(b, x_beta)
    if dgate_bias is not None:
        dgate_bias.add_(gate @ x_beta).add_(share.sum())
        if b is not None:
            dgate_bias.add_(b * beta.sum())
    if dx is not None:
        through = x @ (gate.T @ gate)
        if b is not None:
            through.add_(b @ gate)
        dx.addcmul_(through, beta[:, None]).addr_(share, w.gate.sum(0))


def _spark_ffn_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gate, _, _, down, _, _, with_z = rest
    return x.new_empty(x.shape[0], down.shape[1]), x.new_empty((x.shape[0], gate.shape[0]) if with_z else 0)


def _spark_ffn_backward_fake(g: Tensor, x: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gate, _, up, down, _, *needed = rest
    shapes = x.shape, gate.shape, gate.shape[:1], up.shape, down.shape, g.shape[1:]
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, gate_bias, up, down, _, ctx.quantile, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a gradient of z would be made, of zeros
    ctx.save_for_backward(x, output[1], gate, gate_bias, up, down)


def _gradient(ctx: Any, g: Tensor | None, _g_z: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 8
    needed = ctx.needs_input_grad[:6]
    grads = _SPARK_FFN_BACKWARD(g, *ctx.saved_tensors, ctx.quantile, *needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("spark_ffn has no second derivative")


register_operator("spark_ffn", _spark_ffn, _spark_ffn_fake, _gradient, _setup)
register_operator(
    "spark_ffn_backward", _spark_ffn_backward, _spark_ffn_backward_fake, _no_second_gradient, lambda *context: None
)
