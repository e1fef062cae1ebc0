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
for told_by_make in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(told_by_make, None)  # a make that a test starts is no part of the one that runs the tests


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """The command line sets up its own process; tests that call it share theirs."""
    yield
    gc.enable()
    torch.set_flush_denormal(False)


TESTS = Path(__file__).parent

LONG = (
    *("workflow/test_slurm", "workflow/test_interruption", "workflow/test_images", "workflow/test_pipeline"),
    *("workflow/test_environments", "workflow/test_toy_domain"),
    *("control/test_adjoint_matching", "domains/images/test_checkpoint", "domains/images/test_stages"),
)
"""Files whose tests take longest, behind those that read runs of the pipeline. They are started first: at the
end they would have one process work while the others have none left."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put every test into its tier, and into the group whose tests one process runs one after another.

    Tests that run Snakemake are slow unless they are marked as fast, and of a long grid all cases but the
    first ones. A group is a file, so that what its tests share is made once; but all tests of a run of the
    pipeline that takes minutes are one group, whatever file they are in.
    """
    cases: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("slow_after"):
            test = item.nodeid.partition("[")[0]
            cases[test] += 1
            if cases[test] > marker.args[0]:
                item.add_marker("slow")
        file = file_of(item)
        if file.startswith("workflow/"):
            item.add_marker("pipeline")
            if item.get_closest_marker("fast") is None:
                item.add_marker("slow")
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(run_of(item) or file))
    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a pytest whose names of tests pytest-xdist does not change: groups would be spread, silently."""
    grouped = getattr(session.config.option, "loadgroup", False)  # in the processes that run tests
    if grouped and any("@" not in item.nodeid for item in session.items):
        raise pytest.UsageError("groups of tests are lost: install the pytest of envs/constraints.txt")


def file_of(item: pytest.Item) -> str:
    """The file of a test below this folder, without its ending."""
    return item.path.relative_to(TESTS).with_suffix("").as_posix()


def run_of(item: pytest.Item) -> str | None:
    """The run of the pipeline that the whole tier of a test may wait for; None for none."""
    fixtures = getattr(item, "fixturenames", ())
    if "whole" in fixtures:
        return "whole"
    return "short" if "finished" in fixtures and item.get_closest_marker("slow") is None else None


def place(item: pytest.Item) -> int:
    """Where a test stands in the order in which tests are started."""
    if run_of(item) is not None:
        return 0
    file = file_of(item)
    if file in LONG:
        return 1 + LONG.index(file)
    return 1 + len(LONG) + (item.get_closest_marker("pipeline") is None)
