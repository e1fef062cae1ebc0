"""Settings of all tests: one thread, the same examples every time, and which tests run together and when."""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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


TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put every test into its tier, and into the group whose tests one process runs one after another.

    Tests that run Snakemake are slow unless they are marked as fast, and of a long grid all cases but the
    first ones. A group is a file, so that what its tests share is made once; but all fast tests that read the
    smoke run are one group, which is started first, since the others fill the time that it takes.
    """
    cases: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("slow_after"):
            test = item.nodeid.partition("[")[0]
            cases[test] += 1
            if cases[test] > marker.args[0]:
                item.add_marker("slow")
        file = item.path.relative_to(TESTS).with_suffix("")
        if file.parts[0] == "workflow":
            item.add_marker("pipeline")
            if item.get_closest_marker("fast") is None:
                item.add_marker("slow")
        if item.get_closest_marker("xdist_group") is None:
            group = "smoke" if reads_smoke(item) else file.as_posix()
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (not reads_smoke(item), item.get_closest_marker("pipeline") is None))


def reads_smoke(item: pytest.Item) -> bool:
    """Whether a test is a fast one that reads the smoke run."""
    return "finished" in getattr(item, "fixturenames", ()) and item.get_closest_marker("slow") is None
