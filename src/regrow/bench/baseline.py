"""Whether PyTorch's dense products are as fast as this processor allows, which every ratio to them takes for granted.

PyTorch's builds for x86 multiply float32 matrices with MKL, which asks for the maker of the processor before it asks
for its instructions: on others than Intel's it leaves out AVX-512. oneDNN, which the same builds carry, asks for
instructions alone. So one product by both of them tells. What to do about it stands in docs/performance.md.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear

from regrow.bench.place import Place
from regrow.kernels.machine import describe_machine

_NOTICEABLE = 1.2


def onednn_over_linear(place: Place | None = None, *, rounds: int = 15) -> float | None:
    """How many times as fast as ``torch.nn.functional.linear`` oneDNN multiplies; None on a GPU, or without oneDNN.

    Example:
        >>> ratio = onednn_over_linear(rounds=3)
        >>> ratio is None or ratio > 0
        True
    """
    place = place or Place()
    if place.is_gpu or not torch.backends.mkldnn.is_available():
        return None
    x, weight = place.randn(2048, 512), place.randn(1024, 512, seed=1)
    tasks = {"linear": partial(linear, x, weight), "onednn": partial(linear, x.to_mkldnn(), weight.to_mkldnn())}
    with torch.inference_mode():
        seconds = place.medians(tasks, rounds=rounds)
    return seconds["linear"] / seconds["onednn"]


def measured_machine(place: Place | None = None) -> dict[str, str | int | float | None]:
    """:func:`~regrow.kernels.machine.describe_machine`, and ``onednn_over_linear``."""
    place = place or Place()
    return {**describe_machine(place.device), "onednn_over_linear": onednn_over_linear(place)}


def handicap(ratio: float | None) -> str | None:
    """What to tell someone who reads ratios to such a dense product; None if there is nothing to tell.

    Example:
        >>> handicap(1.02), handicap(2.4)[:55]
        (None, 'PyTorch could multiply dense matrices 2.4 times as fast')
    """
    if ratio is None or ratio < _NOTICEABLE:
        return None
    return (
        f"PyTorch could multiply dense matrices {ratio:.1f} times as fast on this processor, which its MKL takes for "
        "one without AVX-512: ratios to dense are too high, and dense parts of a sparse model too slow; "
        "docs/performance.md has a remedy"
    )
