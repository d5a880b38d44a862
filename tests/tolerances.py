"""Every tolerance of the tests, in one place.

An operation may be at most so many times worse, against float64, than the ordinary dense operation in the
same dtype on the same numbers. There are no per-test numbers. Fuzzing looks for numbers from the wrong place and not
for the last digits, which no dense operation bounds for all inputs: there is one number for all of it.
"""

import torch
from torch import Tensor

VALUE_FACTOR = 2.0
GRADIENT_FACTOR = 5.0
"""Errors of PyTorch's own dense gradients differ threefold from one path of its library to another (MKL for Intel's
processors, and for others), on the same numbers."""
SAME = 1e-4
HALF = 0.1
"""A whole model in bfloat16, with 8 bits and many roundings in a row, beside the same in float32."""


def assert_as_good_as_dense(actual: Tensor, dense: Tensor, exact: Tensor, factor: float = VALUE_FACTOR) -> None:
    """``max |actual - exact| <= factor * max |dense - exact|``, where ``exact`` is the float64 result.

    The dense error is taken as no less than three roundings of the largest number: over a handful of numbers
    the dense operation can be exact, or nearly so, by luck.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == dense.dtype
    if not exact.numel():
        return
    rounding = 3 * torch.finfo(dense.dtype).eps * exact.abs().max().item()
    budget = factor * max((dense.double() - exact).abs().max().item(), rounding)
    error = (actual.double() - exact).abs().max().item()
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g}"


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """``max |actual - expected| <= SAME * max(1, max |expected|)``; NaN in both or none, infinities alike."""
    assert actual.shape == expected.shape
    broken, same = (bool(t.isnan().any()) for t in (actual, expected))
    assert broken == same, f"NaN here: {broken}, NaN expected: {same}"
    assert torch.equal(actual.isinf(), expected.isinf()), "infinities in other places"
    finite = expected.isfinite()
    actual, expected = actual.double()[finite], expected.double()[finite]
    if expected.numel() and not same:
        error, scale = (t.abs().max().item() for t in (actual - expected, expected))
        assert error <= SAME * max(1.0, scale), f"error {error:.3g} beside numbers up to {scale:.3g}"
