"""Settings of all tests: one thread, and property-based tests that draw the same examples every time."""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the linear algebra is loaded

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """The command line sets up its own process; tests that call it share theirs."""
    yield
    gc.enable()
    torch.set_flush_denormal(False)
