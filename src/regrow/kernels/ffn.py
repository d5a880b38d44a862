"""The feed-forward half of a transformer layer as one operator: ``regrow::ffn`` and its gradient.

Two block-sparse products with a GELU between them, tile of tokens by tile, so that nothing of the hidden width exists
outside a cache. The backward pass computes the hidden activations again instead of reading them. float32 on a CPU runs
the compiled kernels, everything else a composition of the reference operations.
"""

from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu, reference
from regrow.kernels.checks import check_tensor
from regrow.kernels.pair import (
    INDEX1,
    INDEX2,
    check_pair,
    check_pair_contents,
    chosen,
    empty_gradients,
    pair_gradients,
    pair_of,
)
from regrow.kernels.reference import Weight
from regrow.kernels.register import register_operator

torch.library.define(
    "regrow::ffn",
    f"(Tensor x, Tensor values1, Tensor? bias1, {INDEX1}, Tensor values2, Tensor? bias2, {INDEX2}) -> Tensor",
)
torch.library.define(
    "regrow::ffn_backward",
    f"(Tensor g, Tensor x, Tensor values1, Tensor? bias1, {INDEX1}, Tensor values2, {INDEX2},"
    " bool need_x, bool need_values1, bool need_bias1, bool need_values2, bool need_bias2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_FFN, _FFN_BACKWARD = torch.ops.regrow.ffn.default, torch.ops.regrow.ffn_backward.default


def ffn(
    x: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    row_ptr1: Tensor,
    col_idx1: Tensor,
    slot1: Tensor,
    values2: Tensor,
    bias2: Tensor | None,
    row_ptr2: Tensor,
    col_idx2: Tensor,
    slot2: Tensor,
) -> Tensor:
    """Two sparse linear layers around the exact (erf) GELU: ``y = gelu(x W1^T + bias1) W2^T + bias2``.

    ``x`` and the weights are all that is kept for the backward pass, which computes ``gelu(x W1^T + bias1)`` again.
    Differentiable once.

    Args:
        x: ``[N, in]``, any strides.
        values1: ``[n_blocks1, b, b]``, the blocks of ``W1 [hidden, in]``, the dtype of ``x``.
        bias1: ``[hidden]`` or None.
        row_ptr1, col_idx1, slot1: of ``W1``, see :mod:`regrow.kernels`.
        values2: ``[n_blocks2, b, b]``, the blocks of ``W2 [out, hidden]``, the block size and dtype of ``values1``.
        bias2: ``[out]`` or None.
        row_ptr2, col_idx2, slot2: of ``W2``.

    Returns:
        ``y [N, out]``.

    Raises:
        RegrowError: shapes, dtypes, devices or block sizes disagree, or an index is out of range or order.

    Both weights 2 x 2, of one block:

    >>> index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [0], [0])]
    >>> w1, w2 = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]), torch.tensor([[[1.0, 0.0], [10.0, 100.0]]])
    >>> ffn(torch.tensor([[1.0, 1.0]]), w1, None, *index, w2, None, *index)
    tensor([[ 0.8413, -7.4521]])

    Reference: Hendrycks and Gimpel 2016, arXiv 1606.08415, for the GELU; Chen et al. 2016, arXiv 1604.06174, for
    computing activations again.
    """
    return _FFN(x, values1, bias1, row_ptr1, col_idx1, slot1, values2, bias2, row_ptr2, col_idx2, slot2)


# ---- operators ------------------------------------------------------------------------------------


def _compiled(x: Tensor, first: Weight, second: Weight) -> bool:
    """Whether the compiled kernels do it; if not, the indices are checked here."""
    if cpu.supports(x, first.values.shape[1]) and first.out_features:
        return True
    check_pair_contents(x, first, first.out_features, second)
    return False


def _sizes(x: Tensor, first: Weight, second: Weight) -> tuple[int, ...]:
    n_blocks1, b, _ = first.values.shape
    widths = x.shape[1], first.out_features, second.out_features
    return x.shape[0], *(width // b for width in widths), n_blocks1, second.values.shape[0], b


def _ffn(x: Tensor, *weights: Any) -> Tensor:
    first, second = pair_of(weights)
    check_pair(x, first, second)
    if not _compiled(x, first, second):
        return reference.ffn(x, first, second)
    y = _ffn_fake(x, *weights)
    cpu.call("ffn", (x, *weights, y), *_sizes(x, first, second))
    return y


def _ffn_backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, needed = rest[:9], rest[9:]
    first, second = pair_of(weights)
    check_pair(x, first, second)
    check_tensor("g", g, (x.shape[0], second.out_features), x.dtype, x.device)
    grads = empty_gradients(g, x, first, second, needed)
    if not _compiled(x, first, second):
        return chosen(needed, reference.ffn_backward(g, x, first, second), grads)
    cpu.call("ffn_backward", (g, x, *weights, *chosen(needed, grads)), *_sizes(x, first, second))
    return grads


def _ffn_fake(x: Tensor, *weights: Any) -> Tensor:
    return x.new_empty(x.shape[0], pair_of(weights)[1].out_features)


def _ffn_backward_fake(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_gradients(g, x, *pair_of(rest[:9]), rest[9:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7], *inputs[8:])  # all but the second bias


def _gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    need_x, *needs = ctx.needs_input_grad
    return pair_gradients(_FFN_BACKWARD, (g, *ctx.saved_tensors), need_x, needs)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RegrowError("ffn has no second derivative; use spmm(gelu(spmm(...)))")


register_operator("ffn", _ffn, _ffn_fake, _gradient, _setup)
register_operator("ffn_backward", _ffn_backward, _ffn_backward_fake, _no_second_gradient, lambda *context: None)
