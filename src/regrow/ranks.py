"""The processes of a distributed run: which one this is, and the few things they tell each other.

A process that runs alone is rank 0 of 1, and its tensors come back as they are. Nothing is pickled on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train together.

    >>> world_size(), rank()
    (1, 0)
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; rank 0 is the one that writes."""
    return dist.get_rank() if world_size() > 1 else 0


def started_by_torchrun() -> bool:
    """Whether there are other processes to meet."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def restarts() -> int:
    """How often torchrun has started this process anew after one of its group died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join(backend: str) -> None:
    """Meet the other processes that torchrun started.

    torchrun gives processes that it starts anew the same store to find each other in, where the addresses of the dead
    still stand (PyTorch issue 135712). Those of one machine count restarts alike, so here they use a part of the store
    that nobody has used before.
    """
    store, number, count = next(iter(dist.rendezvous("env://")))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt-{restarts()}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks; ``tensor`` itself may be overwritten by it."""
    return _reduced(tensor, dist.ReduceOp.SUM) if world_size() > 1 else tensor


def highest(tensor: Tensor) -> Tensor:
    """The element-wise maximum over all ranks; ``tensor`` itself may be overwritten by it."""
    return _reduced(tensor, dist.ReduceOp.MAX) if world_size() > 1 else tensor


def gathered(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank; shapes and types must agree.

    >>> gathered(torch.tensor([1, 2]))
    [tensor([1, 2])]
    """
    if world_size() == 1:
        return [tensor]
    sent = _within_reach(tensor)
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent)
    return [part.to(tensor.device) for part in received]


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Part from the others, at the end of a program."""
    if world_size() > 1:
        dist.destroy_process_group()


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """What is inside is done by one process of a machine; then the others do it too, and find it in the cache."""
    if world_size() == 1:
        yield
        return
    # Preparing a large corpus takes longer than a group of processes that trains should ever wait.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    leads = int(os.environ.get("LOCAL_RANK", rank())) == 0
    if not leads:
        dist.barrier(group)
    yield
    if leads:
        dist.barrier(group)


def _reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    sent = _within_reach(tensor)
    dist.all_reduce(sent, operation)
    return sent.to(tensor.device)


def _within_reach(tensor: Tensor) -> Tensor:
    """Contiguous, and on the GPU if the processes can talk only from there."""
    if "nccl" in dist.get_backend() and not tensor.is_cuda:
        tensor = tensor.cuda()
    return tensor.contiguous()
