"""Fixtures for all tests."""

import os
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything loads Triton: see the fixture `device`

from regrow.kernels import cpu, gpu

# A busy machine is not a defect: examples are not timed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

NATIVE = os.environ.get("REGROW_NATIVE")
"""A folder with another build of the compiled kernels, for the tests to use: see `make sanitize`."""


def use_build(folder: str) -> None:
    [path] = Path(folder).glob("_native*.so")
    name = "regrow.kernels._native"
    spec = spec_from_file_location(name, path)
    sys.modules[name] = module_from_spec(spec)  # where regrow's own import finds it
    spec.loader.exec_module(sys.modules[name])


if NATIVE:
    use_build(NATIVE)


def pytest_report_header() -> str:
    try:
        return f"compiled kernels: {cpu.native().__file__}"
    except ImportError as error:  # tests of the GPU kernels run without
        return f"compiled kernels: none ({error})"


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, so a number that was never written cannot pass for a right one."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has."""
    native = cpu.native()
    if request.param not in native.available_isas():
        pytest.skip(f"this machine has no {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU; without one the CPU, on which Triton's interpreter then runs the GPU kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with gpu.interpreted():
        yield torch.device("cpu")
