"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from regrow.kernels import cpu


def describe_machine(device: torch.device | None = None) -> dict[str, str | int]:
    """Processor, cores, threads, instruction set of the kernels, versions: the columns every result carries.

    With a GPU as ``device`` its name, and the version of Triton instead of an instruction set.
    """
    gpu = device is not None and device.type == "cuda"
    own = (
        {"gpu": torch.cuda.get_device_name(device), "triton": version("triton")} if gpu else {"isa": cpu.native().isa()}
    )
    return {
        **own,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
