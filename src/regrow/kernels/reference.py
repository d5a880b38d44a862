"""The three operations in plain PyTorch: the ground truth for values and gradients.

Any dtype and device, differentiable by ordinary autograd, and slow. Blocks are gathered, multiplied and added
a chunk at a time, so nothing of the size of the dense weight is allocated.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

# Numbers gathered at a time: bounds the memory without making small problems slow.
_CHUNK = 1 << 20


class Weight(NamedTuple):
    """A block-sparse weight and the bias that goes with it: what :func:`spmm` takes besides ``x``."""

    values: Tensor
    bias: Tensor | None
    indices: Sequence[Tensor]
    """``row_ptr, col_idx, slot``."""

    @property
    def out_features(self) -> int:
        return (self.indices[0].shape[0] - 1) * self.values.shape[1]


def spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor]) -> Tensor:
    """``y = x W^T + bias``: ``x [N, C*w]``, ``values [n_blocks, b, w]`` -> ``y [N, R*b]``.

    ``index`` is ``(row_ptr, col_idx, slot)``.
    """
    row_ptr, col_idx, slot = index
    y = _gather_multiply_add(x, values.transpose(1, 2), col_idx, owners(row_ptr), slot, row_ptr.numel() - 1)
    return y if bias is None else y + bias


def spmm_t(g: Tensor, values: Tensor, index: Sequence[Tensor], in_features: int) -> Tensor:
    """``dx = g W``: ``g [N, R*b]``, ``values [n_blocks, b, w]`` -> ``dx [N, in_features = C*w]``.

    ``index`` is ``(row_ptr, col_idx, slot)``.
    """
    row_ptr, col_idx, slot = index
    return _gather_multiply_add(g, values, owners(row_ptr), col_idx, slot, in_features // values.shape[2])


def sddmm(g: Tensor, x: Tensor, index: Sequence[Tensor], block_size: int, block_cols: int) -> Tensor:
    """``dvalues[slot] = g[:, block row]^T x[:, block column]``: -> ``[n_blocks, b, w]``.

    ``index`` is ``(row_ptr, col_idx, slot)``.
    """
    row_ptr, col_idx, slot = index
    g_blocks, x_blocks = _by_block(g, block_size), _by_block(x, block_cols)
    rows, cols, slots = owners(row_ptr), col_idx.long(), slot.long()
    parts = [
        torch.bmm(g_blocks[rows[part]].transpose(1, 2), x_blocks[cols[part]])
        for part in _chunks(slots.numel(), g.shape[0] * block_size)
    ]
    dvalues = g.new_zeros(slots.numel(), block_size, block_cols)
    return dvalues.index_add(0, slots, torch.cat(parts)) if parts else dvalues


def spmm_backward(g: Tensor, x: Tensor, weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`spmm` in ``x``, ``values`` and ``bias``, from ``g [N, R*b]``."""
    values, _, index = weight
    return spmm_t(g, values, index, x.shape[1]), sddmm(g, x, index, *values.shape[1:]), g.sum(0)


def gelu_with_slope(h: Tensor) -> tuple[Tensor, Tensor]:
    """``h Phi(h)`` and its derivative ``Phi(h) + h phi(h)``, with the normal distribution and its density."""
    density = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    return gelu(h), 0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * density


def ffn(x: Tensor, first: Weight, second: Weight) -> Tensor:
    """``y = gelu(x W1^T + bias1) W2^T + bias2``: ``x [N, in]`` -> ``y [N, out]``."""
    return spmm(gelu(spmm(x, *first)), *second)


def ffn_backward(g: Tensor, x: Tensor, first: Weight, second: Weight) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`ffn` in ``x``, ``values1``, ``bias1``, ``values2`` and ``bias2``, from ``g [N, out]``."""
    f, slope = gelu_with_slope(spmm(x, *first))
    df, dvalues2, dbias2 = spmm_backward(g, f, second)
    return *spmm_backward(df * slope, x, first), dvalues2, dbias2


def spark_ffn(x: Tensor, z: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, quantile: float) -> Tensor:
    """``y`` from ``x [N, in]`` and the gates ``z [N, hidden]``; see :func:`regrow.kernels.spark.spark_ffn`."""
    over, _, _ = _above_threshold(z, quantile)
    y = (gelu(over) * (x[:, -up.shape[1] :] @ up.T)) @ down
    return y if bias is None else y + bias


def spark_ffn_backward(
    g: Tensor, x: Tensor, z: Tensor, gate: Tensor, up: Tensor, down: Tensor, quantile: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the whole in ``x``, ``gate``, its bias, ``up``, ``down`` and the bias, from ``g [N, out]``."""
    r, hidden = gate.shape[1], gate.shape[0]
    over, off, deviation = _above_threshold(z, quantile)
    first, second = x[:, :r], x[:, r:]
    f, slope = gelu_with_slope(over)
    up_x, dh = second @ up.T, g @ down.T
    dup = dh * f
    dover = torch.where(over != 0, dh * up_x * slope, 0.0)
    through = dover.sum(1, keepdim=True) / hidden
    dz = dover - through - torch.where(deviation > 0, through * quantile / deviation, 0.0) * off
    dx = torch.cat([dz @ gate, dup @ up], 1)
    return dx, dz.T @ first, dz.sum(0), dup.T @ second, (f * up_x).T @ g, g.sum(0)


def _above_threshold(z: Tensor, quantile: float) -> tuple[Tensor, Tensor, Tensor]:
    """``max(z - threshold, 0)``; ``z`` less its mean; and its standard deviation ``[N, 1]``."""
    off = z - z.mean(1, keepdim=True)
    deviation = off.square().mean(1, keepdim=True).sqrt()
    return torch.relu(off - quantile * deviation), off, deviation


def owners(row_ptr: Tensor) -> Tensor:
    """The block row of each position: ``row_ptr [R+1]`` -> ``[n_blocks]``.

    >>> owners(torch.tensor([0, 2, 2, 3]))
    tensor([0, 0, 2])
    """
    counts = row_ptr.diff().long()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=row_ptr.device), counts)


def _gather_multiply_add(x: Tensor, blocks: Tensor, in_of: Tensor, out_of: Tensor, slot: Tensor, n_out: int) -> Tensor:
    """Adds ``x[:, in_of] @ blocks[slot]`` to the output block ``out_of`` of each position."""
    n, b = x.shape[0], blocks.shape[2]
    x_blocks, (sources, targets, slots) = _by_block(x, blocks.shape[1]), (i.long() for i in (in_of, out_of, slot))
    y = x.new_zeros(n_out, n, b)
    for part in _chunks(slots.numel(), n * max(blocks.shape[1:])):
        y = y.index_add(0, targets[part], torch.bmm(x_blocks[sources[part]], blocks[slots[part]]))
    return y.transpose(0, 1).reshape(n, y.shape[0] * b).contiguous()  # of single columns it was a view


def _by_block(x: Tensor, b: int) -> Tensor:
    """``[N, C*b]`` -> ``[C, N, b]``."""
    return x.reshape(x.shape[0], x.shape[1] // b, b).transpose(0, 1)


def _chunks(n_blocks: int, block_cost: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, block_cost))
    return (slice(i, i + step) for i in range(0, n_blocks, step))
