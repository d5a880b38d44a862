r"""Dropout whose mask follows from a seed: ``regrow::dropout``, and the mask in plain PyTorch.

Random numbers come from Philox4x32-10, a function of a counter and a key. The element ``(row, col)`` of a matrix takes
the counter ``(col // 128 * 16 + col % 16, row % 2^32, row // 2^32, 0)`` under the key ``(seed % 2^32, seed // 2^32)``.
With ``j = col // 16 % 8``, its 16 random bits are the low (``j`` even) or high (``j`` odd) half of the word ``j // 2``.
It is kept, and multiplied by ``65536 / (65536 - threshold)``, where they are at least ``threshold = round(65536 p)``.
So nothing is stored for the backward pass, and the mask is the same for any number of threads, on any machine.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi 10.1145/2063384.2063405.
"""

from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu
from regrow.kernels.register import register_operator

torch.library.define("regrow::dropout", "(Tensor x, float p, SymInt seed) -> Tensor")
_DROPOUT = torch.ops.regrow.dropout.default

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Dropout: ``y = x * f``, with ``f`` from :func:`dropout_factors`, for the last dimension as columns.

    The gradient makes the mask anew: ``dx = g * f``.

    Args:
        x: ``[..., cols]``, floating point, any strides.
        p: share of elements that are dropped, in [0, 1); in steps of ``2^-16``.
        seed: 64 bits, as a number with or without sign. One seed gives one mask.

    Returns:
        ``y``, of the shape of ``x``.

    Raises:
        RegrowError: ``p`` or ``seed`` is out of range, or ``x`` is not floating point.

    >>> dropout(torch.ones(2, 6), 0.5, seed=1)
    tensor([[0., 0., 2., 2., 0., 2.],
            [2., 0., 0., 2., 2., 0.]])

    Source: Srivastava et al. 2014, "Dropout", JMLR 15; the mask: see the module.
    """
    return _DROPOUT(x, p, signed_seed(seed))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four random words for each counter.

    Args:
        counter: four int64 tensors of one shape, of numbers in ``[0, 2^32)``.
        key: two numbers in ``[0, 2^32)``.

    Returns:
        Four int64 tensors of that shape, of numbers in ``[0, 2^32)``.

    The first known answer of the authors' library:

    >>> zero = torch.tensor(0)
    >>> [hex(int(word)) for word in philox((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0, k1 = ((k + i * step) & _MASK for k, step in zip(key, _KEY_STEPS, strict=True))
        (high0, low0), (high1, low1) = (_multiply(c, m) for c, m in zip((c0, c2), _MULTIPLIERS, strict=True))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product, in halves of ``m`` so that no int64 overflows."""
    upper = a * (m >> 16)
    low = a * (m & 0xFFFF) + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (low >> 32), low & _MASK


def signed_seed(seed: int) -> int:
    """The same 64 bits as an int64, which is what an operator takes.

    Raises:
        RegrowError: it has more bits.

    >>> signed_seed(2**64 - 1)
    -1
    """
    if isinstance(seed, int) and not -(1 << 63) <= seed < 1 << 64:
        raise RegrowError(f"seed is {seed}; it must have 64 bits")
    return seed - (1 << 64) if isinstance(seed, int) and seed >= 1 << 63 else seed


def unsigned_seed(seed: int) -> int:
    """The same 64 bits as a number without sign, which is what the compiled kernels take."""
    return seed & 0xFFFFFFFFFFFFFFFF


def dropout_threshold(p: float) -> int:
    """``round(65536 p)``: out of 65536, how many elements are dropped.

    Raises:
        RegrowError: ``p`` is not in [0, 1), or so close to 1 that nothing would be kept.

    >>> dropout_threshold(0.1)
    6554
    """
    threshold = round(p * 65536) if 0 <= p < 1 else 65536
    if threshold > 65535:
        raise RegrowError(f"p is {p}; a share of elements to drop must be at least 0 and below 1 - 2^-17")
    return threshold


def dropout_factors(
    seed: int,
    rows: int,
    cols: int,
    p: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    first_row: int = 0,
) -> Tensor:
    """What dropout multiplies the elements of a matrix by: 0, or ``65536 / (65536 - round(65536 p))``.

    Args:
        seed: 64 bits, as a number with or without sign.
        rows, cols: the shape.
        p: share of elements that are dropped, in [0, 1); in steps of ``2^-16``.
        first_row: the number of the first row.

    Returns:
        ``[rows, cols]``.

    Raises:
        RegrowError: ``p`` is out of range.

    >>> dropout_factors(seed=1, rows=2, cols=6, p=0.5)
    tensor([[0., 0., 2., 2., 0., 2.],
            [2., 0., 0., 2., 2., 0.]])
    """
    threshold = dropout_threshold(p)
    chunks = (cols + 127) // 128
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    index = torch.arange(chunks * 16, device=device)[None, :]
    counter = torch.broadcast_tensors(index, row & _MASK, row >> 32, torch.zeros_like(index))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)])  # [8, rows, chunks * 16]
    bits = halves.view(8, rows, chunks, 16).permute(1, 2, 0, 3).reshape(rows, chunks * 128)[:, :cols]
    return (bits >= threshold).to(dtype) * (65536 / (65536 - threshold))


def _matrix_shape(x: Tensor) -> tuple[int, int]:
    cols = x.shape[-1] if x.dim() else 1
    return x.numel() // max(cols, 1), cols


def _dropout(x: Tensor, p: float, seed: int) -> Tensor:
    if not x.is_floating_point():
        raise RegrowError(f"x is {x.dtype}; it must be floating point")
    threshold = dropout_threshold(p)
    if not threshold or not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    rows, cols = _matrix_shape(x)
    if cpu.supports_rows(x):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        cpu.call("dropout", (x, y), rows, cols, unsigned_seed(seed), threshold)
        return y
    return x.contiguous() * dropout_factors(seed, rows, cols, p, x.dtype, x.device).view(x.shape)


def _dropout_fake(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.p, ctx.seed = inputs[1:]


def _gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return _DROPOUT(g, ctx.p, ctx.seed), None, None


register_operator("dropout", _dropout, _dropout_fake, _gradient, _setup)
