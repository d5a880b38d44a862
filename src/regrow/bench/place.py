"""Where a benchmark runs, in which dtype, and how time is taken there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regrow.bench.timing import Name, Task, interleaved_medians
from regrow.errors import RegrowError

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_WARM_UP, _REPEATS = 3, 10


@dataclass(frozen=True)
class Place:
    """A device and a dtype.

    On a GPU the host only hands out work: there a task is recorded as a CUDA graph and replayed several times between
    two looks at the clock, so that the device's time is measured and not Python's.

    Example:
        >>> Place.named("cpu").randn(2, 3).dtype
        torch.float32
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def named(cls, device: str = "cpu", dtype: str | None = None) -> Place:
        """By names as on the command line; by default float32 on a CPU and bf16 on a GPU.

        Raises:
            RegrowError: there is no such device or dtype here, or a CPU is to compute in 16 bits.
        """
        try:
            place = torch.device(device)
        except RuntimeError:
            raise RegrowError(f"device must be cpu or cuda, got {device!r}") from None
        if place.type not in ("cpu", "cuda"):
            raise RegrowError(f"device must be cpu or cuda, got {device!r}")
        if place.type == "cuda" and not torch.cuda.is_available():
            raise RegrowError(f"device={device!r} needs a CUDA GPU and a build of PyTorch for it; there is none here")
        name = dtype or ("bf16" if place.type == "cuda" else "float32")
        if name not in DTYPES:
            raise RegrowError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        if place.type == "cpu" and name != "float32":
            raise RegrowError(f"dtype={name!r} needs device='cuda'; the kernels for a CPU are for float32")
        return cls(place, DTYPES[name])

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        """The same numbers on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def medians(
        self,
        tasks: Mapping[Name, Task],
        *,
        rounds: int,
        recorded: bool = True,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
        warm_up: int = 2,
    ) -> dict[Name, float]:
        """:func:`interleaved_medians` of the tasks.

        Args:
            recorded: whether a GPU's tasks can be recorded: nothing in them may wait for the device.
        """
        if not self.is_gpu:
            return interleaved_medians(tasks, rounds=rounds, progress=progress, warm_up=warm_up)
        runs = {name: _recorded(task) if recorded else task for name, task in tasks.items()}
        seconds = interleaved_medians(
            {name: partial(_repeat, run) for name, run in runs.items()},
            rounds=rounds,
            warm_up=warm_up,
            wait=partial(torch.cuda.synchronize, self.device),
            progress=progress,
        )
        return {name: value / _REPEATS for name, value in seconds.items()}


def _recorded(task: Task) -> Task:
    """A task as a CUDA graph; it runs a few times beforehand, so that kernels are compiled and chosen."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            task()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        task()
    return graph.replay


def _repeat(task: Task) -> None:
    for _ in range(_REPEATS):
        task()
