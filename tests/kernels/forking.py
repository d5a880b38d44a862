"""What a forked child computes, its parent's thread pool being gone."""

import multiprocessing
import os
from collections.abc import Callable

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


def in_forked_child(compute: Callable[[], float]) -> float:
    """``compute()``, in a child with one thread."""

    def run() -> None:
        torch.set_num_threads(1)
        queue.put(compute())

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=run)
    child.start()
    result = queue.get(timeout=30)
    child.join()
    return result
