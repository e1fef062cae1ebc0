"""One smoke run for all tests of the pipeline, and fresh copies for those that must not start one."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from filelock import FileLock

from workflow_copy import PARTS, ROOT, SMOKE, Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project in which nothing has been run."""
    return Project.copied_to(tmp_path / "project")


@pytest.fixture(scope="module")
def finished(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the smoke configuration has been run; tests leave it complete.

    A copy for each file of tests. The run itself is made once for this state of the sources: it is kept in
    pytest's cache, where the slow tests find the one of the fast tests.
    """
    cache = pytestconfig.cache.mkdir("smoke")
    with FileLock(cache / "lock"):
        kept = cache / state_of_sources()
        failed = cache / f"failed-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}.txt"
        if not kept.exists() and not failed.exists():
            make_smoke_run(cache, kept, failed)
        if failed.exists():
            pytest.fail(failed.read_text(encoding="utf-8"), pytrace=False)
    return Project(Path(shutil.copytree(kept, tmp_path_factory.mktemp("smoke") / "project", symlinks=True)))


def state_of_sources() -> str:
    """A digest of all that the smoke run depends on."""
    digest = hashlib.sha256()
    installed = sorted({f"{one.name} {one.version}" for one in distributions()})
    digest.update(repr((sys.version, installed)).encode())
    for part in (*PARTS, "src", "tests/workflow/conftest.py", "tests/workflow_copy.py"):
        found = ROOT / part
        for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
            if file.is_file() and "__pycache__" not in file.parts and ".egg-info" not in str(file):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def make_smoke_run(cache: Path, kept: Path, failed: Path) -> None:
    """Run the smoke configuration; keep it in place of those of other states, or keep what it says."""
    for old in cache.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.suffix == ".txt":
            old.unlink()
    project = Project.copied_to(cache / "running" / "project")
    run = project.snakemake(*SMOKE)
    if run.returncode != 0:
        failed.write_text(f"the smoke run failed, it ended with:\n{run.stdout[-4000:]}", encoding="utf-8")
    else:
        project.folder.rename(kept)
