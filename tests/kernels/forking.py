"""What a forked child computes, its parent's thread pool being gone."""

import multiprocessing
import os
from collections.abc import Callable

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


def in_forked_child(compute: Callable[[], float]) -> float:
    """``compute()``, in a child with one thread: it may start none, not even a queue's, under ThreadSanitizer."""

    def run() -> None:
        torch.set_num_threads(1)
        there.send(compute())

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=run)
    child.start()
    assert here.poll(30), "the child is stuck"
    result = here.recv()
    child.join()
    return result
