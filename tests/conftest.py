"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A busy machine is not a defect: examples are not timed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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
