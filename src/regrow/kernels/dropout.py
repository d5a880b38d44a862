r"""Dropout whose mask follows from a seed: ``regrow::dropout``, and the mask in plain PyTorch.

Random numbers come from Philox4x32-10, a function of a counter and a key. The element ``(row, col)`` of a matrix takes
the counter ``(col // 128 * 16 + col % 16, row % 2^32, row // 2^32, 0)`` under the key ``(seed % 2^32, seed // 2^32)``.
With ``j = col // 16 % 8``, its 16 random bits are the low (``j`` even) or high (``j`` odd) half of the word ``j // 2``.
It is kept, and multiplied by ``65536 / (65536 - threshold)``, where they are at least ``threshold = round(65536 p)``.
So nothing is stored for the backward pass, and the mask is the same for any number of threads, on any machine.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi 10.1145/2063384.2063405.
"""

import torch
from torch import Tensor

from regrow.errors import RegrowError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


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
