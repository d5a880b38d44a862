"""Dropout by a seed: the generator's known answers, and one mask for every implementation."""

import pytest
import torch

from regrow.errors import RegrowError
from regrow.kernels.dropout import dropout, dropout_factors, dropout_threshold, philox, signed_seed

from .problems import normal

OP = torch.ops.regrow.dropout.default
ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


# From the file kat_vectors of the authors' library, Random123.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    assert [int(w) for w in philox((c0, c1, c2, c3), key)] == list(words)


def test_each_element_takes_its_own_16_bits() -> None:
    """The layout, element by element: every bit of a mask follows from the words of its counter."""
    seed, rows, cols, p = 0x123456789ABCDEF, 3, 300, 0.3
    factors = dropout_factors(seed, rows, cols, p, torch.float64, first_row=2**32 - 1)
    for row in range(rows):
        for col in range(0, cols, 7):
            at = row + 2**32 - 1
            counter = [torch.tensor(c) for c in (col // 128 * 16 + col % 16, at % 2**32, at // 2**32, 0)]
            words = philox(tuple(counter), (seed % 2**32, seed // 2**32))
            j = col // 16 % 8
            bits = int(words[j // 2]) >> 16 * (j % 2) & 0xFFFF
            assert factors[row, col] == (65536 / (65536 - 19661) if bits >= 19661 else 0)


# The last is stored around the caches.
SHAPES = [(1, 1), (3, 16), (2, 127), (2, 128), (5, 129), (7, 300), (130, 64), (2, 3, 40), (5,), (), (2200, 512)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 2**-16])
def test_the_compiled_mask_is_the_reference(shape: tuple[int, ...], p: float, isa: str) -> None:
    x = normal(*shape)
    cols = shape[-1] if shape else 1
    for seed in (0, 7, -1, 0x123456789ABCDEF):
        factors = dropout_factors(seed, x.numel() // cols, cols, p)
        assert torch.equal(dropout(x, p, seed), x * factors.view(x.shape))


def test_any_number_of_threads(isa: str) -> None:
    x, before = normal(37, 200), torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(dropout(x, 0.2, 5))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_shares_means_and_independence() -> None:
    """The share dropped, over seeds, rows and columns; and no row, seed or half of a word repeats another."""
    for p in (0.1, 0.5):
        kept = dropout_factors(3, 512, 1024, p, torch.float64) > 0
        assert abs(kept.double().mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
        assert (kept.double().mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 512) ** 0.5
        assert (kept.double().mean(1) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 1024) ** 0.5
    a = dropout_factors(3, 256, 1024, 0.5, torch.float64) - 1  # of mean 0
    for b in (
        dropout_factors(4, 256, 1024, 0.5, torch.float64) - 1,
        dropout_factors(3 << 32, 256, 1024, 0.5, torch.float64) - 1,
        a.roll(1, 0),
        a.roll(16, 1),
        a.roll(128, 1),
    ):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_first_row_continues_a_matrix() -> None:
    whole = dropout_factors(9, 10, 50, 0.4)
    assert torch.equal(whole[4:], dropout_factors(9, 6, 50, 0.4, first_row=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_has_the_same_mask(dtype: torch.dtype) -> None:
    x = normal(9, 33, dtype=dtype).T.requires_grad_()
    g = normal(9, 33, seed=1, dtype=dtype).T
    y = dropout(x, 0.3, 11)
    factors = dropout_factors(11, 33, 9, 0.3, dtype)
    assert y.dtype is dtype
    assert torch.equal(y, x * factors)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g * factors)


def test_nothing_dropped_is_a_copy() -> None:
    x = normal(3, 4)
    for p in (0.0, 1e-6):
        y = dropout(x, p, 1)
        assert torch.equal(x, y)
        assert y.data_ptr() != x.data_ptr()
    assert dropout(torch.empty(0, 5), 0.5, 1).shape == (0, 5)
    assert dropout(torch.empty(5, 0), 0.5, 1).shape == (5, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    for x in (normal(5, 40, dtype=dtype), normal(2, 3, 40, dtype=dtype).transpose(0, 1)):
        torch.library.opcheck(OP, (x.requires_grad_(), 0.3, 3))


def test_gradcheck() -> None:
    x = normal(3, 20, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(dropout, (x, 0.3, 4))
    assert torch.autograd.gradgradcheck(dropout, (x, 0.3, 4))


def test_bad_arguments_are_named() -> None:
    for p in (-0.1, 1.0, 1 - 1e-9, float("nan")):
        with pytest.raises(RegrowError, match="p is"):
            dropout(normal(2, 2), p, 0)
        with pytest.raises(RegrowError, match="p is"):
            dropout_threshold(p)
    with pytest.raises(RegrowError, match=r"x is torch\.int64"):
        dropout(torch.ones(2, 2, dtype=torch.int64), 0.1, 0)
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(RegrowError, match="seed is"):
            dropout(normal(2, 2), 0.1, seed)
    assert signed_seed((1 << 64) - 5) == -5
