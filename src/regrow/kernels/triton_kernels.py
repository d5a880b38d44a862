"""The block-sparse products as Triton programs. :mod:`regrow.kernels.gpu` prepares the tensors and launches them.

Names: a program makes ``TOKENS`` rows of one or several *targets*, the output blocks of ``TARGET`` features; each is
the sum over its *entries* of a block of ``SOURCE`` input features times a block of the weight. In the forward pass
targets are block rows and sources block columns, in the input gradient the other way round. ``COUNT`` entries are taken
together, so that one matrix product has ``COUNT * SOURCE`` terms however small the blocks are.

``WIDEN`` is for the interpreter, whose matrix product takes the bits of bfloat16 for integers.

An index that is out of range is clamped: it gives wrong numbers, as in any program that is fed them, but never an
access outside the arrays. All sums are in float32 and in one order, so results are the same bits every time.
"""

import triton
import triton.language as tl


@triton.jit
def product(
    x,
    values,
    bias,
    y,
    slope,
    pointer,
    source,
    slot,
    n_tokens,
    n_targets,
    n_sources,
    n_blocks,
    x_token,
    x_feature,
    y_token,
    y_feature,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET_STRIDE: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNT: tl.constexpr,
    TARGETS: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``y[:, t] = sum over entries e of t: x[:, source[e]] * values[slot[e]]``, plus bias, through GELU.

    ``pointer [n_targets + 1]`` says which entries a target has. Element ``(i, j)`` of a block, target feature by source
    feature, is at ``i * TARGET_STRIDE + j * SOURCE_STRIDE``.
    """
    # Programs of the same tokens follow each other, so that these tokens stay in the caches.
    n_groups = tl.cdiv(n_targets, TARGETS)
    program = tl.program_id(0)
    tokens = (program // n_groups).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    known = tokens < n_tokens
    features = tl.arange(0, TARGET)
    k = tl.arange(0, COUNT * SOURCE)
    rows = x + tokens * x_token
    first_target = (program % n_groups) * TARGETS
    for target in range(first_target, tl.minimum(first_target + TARGETS, n_targets)):
        start = tl.maximum(tl.load(pointer + target), 0)
        end = tl.minimum(tl.load(pointer + target + 1), n_blocks)
        total = tl.zeros((TOKENS, TARGET), tl.float32)
        for first in range(start, end, COUNT):
            entry = first + k // SOURCE
            there = entry < end
            at = tl.load(source + entry, mask=there, other=0)
            column = tl.minimum(tl.maximum(at, 0), n_sources - 1) * SOURCE + k % SOURCE
            column = tl.max_contiguous(tl.multiple_of(column, SOURCE), SOURCE)  # or loads would be single numbers
            inputs = tl.load(
                rows[:, None] + column[None, :].to(tl.int64) * x_feature,
                mask=known[:, None] & there[None, :],
                other=0.0,
            )
            row = tl.minimum(tl.maximum(tl.load(slot + entry, mask=there, other=0), 0), n_blocks - 1)
            place = row.to(tl.int64) * (TARGET * SOURCE) + (k % SOURCE) * SOURCE_STRIDE
            if SOURCE_STRIDE == 1:
                place = tl.max_contiguous(tl.multiple_of(place, SOURCE), SOURCE)
            weights = tl.load(
                values + place[:, None] + features[None, :] * TARGET_STRIDE, mask=there[:, None], other=0.0
            )
            if WIDEN:
                inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
            total = tl.dot(inputs, weights, total, input_precision=PRECISION)
        column = target * TARGET + features
        if WITH_BIAS:
            total += tl.load(bias + column).to(tl.float32)[None, :]
        place = tokens[:, None] * y_token + column[None, :].to(tl.int64) * y_feature
        if GELU:
            half = 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
            if WITH_SLOPE:
                density = tl.exp(-0.5 * total * total) * 0.3989422804014327
                # a huge number's square is infinite, and infinity times zero no number
                steep = half + tl.where(tl.abs(total) < 1e18, total * density, 0.0)
                tl.store(slope + place, steep.to(slope.dtype.element_ty), mask=known[:, None])
            total = total * half
        tl.store(y + place, total.to(y.dtype.element_ty), mask=known[:, None])


@triton.jit
def block_products(
    g,
    x,
    sums,
    row_ptr,
    col_idx,
    slot,
    n_tokens,
    n_cols,
    n_blocks,
    tokens_each,
    g_token,
    g_feature,
    x_token,
    x_feature,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``sums[part, slot[e]] = g[:, row]^T x[:, col_idx[e]]`` over the tokens of a part, for the entries of a block row.

    A program has one block row and one part of the tokens; the products of ``COUNT`` blocks stay in registers while
    the tokens stream by.
    """
    row = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    features = row * HEIGHT + tl.arange(0, HEIGHT)
    k = tl.arange(0, COUNT * WIDTH)
    start = tl.maximum(tl.load(row_ptr + row), 0)
    end = tl.minimum(tl.load(row_ptr + row + 1), n_blocks)
    last = tl.minimum((part + 1) * tokens_each, n_tokens)
    for first in range(start, end, COUNT):
        entry = first + k // WIDTH
        there = entry < end
        at = tl.load(col_idx + entry, mask=there, other=0)
        column = tl.minimum(tl.maximum(at, 0), n_cols - 1) * WIDTH + k % WIDTH
        column = tl.max_contiguous(tl.multiple_of(column, WIDTH), WIDTH)
        total = tl.zeros((COUNT * WIDTH, HEIGHT), tl.float32)
        for begin in range(part * tokens_each, last, TOKENS):
            tokens = begin + tl.arange(0, TOKENS).to(tl.int64)
            known = tokens < last
            inputs = tl.load(
                x + tokens[None, :] * x_token + column[:, None].to(tl.int64) * x_feature,
                mask=known[None, :] & there[:, None],
                other=0.0,
            )
            gradients = tl.load(
                g + tokens[:, None] * g_token + features[None, :].to(tl.int64) * g_feature,
                mask=known[:, None],
                other=0.0,
            )
            if WIDEN:
                inputs, gradients = inputs.to(tl.float32), gradients.to(tl.float32)
            total = tl.dot(inputs, gradients, total, input_precision=PRECISION)
        at = tl.load(slot + entry, mask=there, other=-1)
        good = there & (at >= 0) & (at < n_blocks)
        place = (part * n_blocks + at) * (HEIGHT * WIDTH) + k % WIDTH
        tl.store(sums + place[:, None] + tl.arange(0, HEIGHT)[None, :] * WIDTH, total, mask=good[:, None])


@triton.jit
def by_columns(col_idx, owner, slot, col_ptr, row_idx, slot_t, n_cols, n_blocks, CHUNK: tl.constexpr):
    """The index arrays of the transposed weight: a program finds the entries of one block column, in order."""
    column = tl.program_id(0)
    place = 0
    for first in range(0, n_blocks, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        at = tl.load(col_idx + entry, mask=entry < n_blocks, other=n_cols)
        place += tl.sum((at < column).to(tl.int32), 0)
    tl.store(col_ptr + column, place)
    for first in range(0, n_blocks, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        here = tl.load(col_idx + entry, mask=entry < n_blocks, other=n_cols) == column
        at = place + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(row_idx + at, tl.load(owner + entry, mask=here, other=0), mask=here)
        tl.store(slot_t + at, tl.load(slot + entry, mask=here, other=0), mask=here)
        place += tl.sum(here.to(tl.int32), 0)
    if column == n_cols - 1:
        tl.store(col_ptr + n_cols, place)


@triton.jit
def adamw(values, gradient, mean, square, size, root, n, elements, rest1, beta2, rest2, keep, eps, CHUNK: tl.constexpr):
    """One AdamW step of ``n`` numbers in place; a block of ``elements`` has its own step size and correction.

    ``rest1`` and ``rest2`` are 1 - beta, which float32 would lose digits of.
    """
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    there = at < n
    block = at // elements
    g = tl.load(gradient + at, mask=there, other=0.0)
    m = tl.load(mean + at, mask=there, other=0.0)
    m += (g - m) * rest1
    s = tl.load(square + at, mask=there, other=0.0) * beta2 + g * g * rest2
    step = tl.load(size + block, mask=there, other=0.0) * m
    under = tl.sqrt_rn(s) * tl.load(root + block, mask=there, other=0.0) + eps
    value = tl.load(values + at, mask=there, other=0.0) * keep - step / under
    tl.store(mean + at, m, mask=there)
    tl.store(square + at, s, mask=there)
    tl.store(values + at, value, mask=there)
