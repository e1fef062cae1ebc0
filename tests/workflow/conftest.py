"""Runs of the pipeline that tests read, each made once, and fresh copies for tests that must not have one."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from filelock import FileLock

from environments import StandInConda
from workflow_copy import PARTS, ROOT, SHORT, SMOKE, Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project in which nothing has been run."""
    return Project.copied_to(tmp_path / "project")


@pytest.fixture(scope="module")
def finished(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the short smoke configuration has been run; tests leave it complete."""
    kept = kept_run(pytestconfig, "short", lambda project: project.snakemake(*SHORT))
    return Project(Path(shutil.copytree(kept, tmp_path_factory.mktemp("smoke") / "project", symlinks=True)))


@pytest.fixture(scope="module")
def whole(pytestconfig: pytest.Config) -> Project:
    """A project in which the whole smoke configuration has been run, each job in its environment.

    Tests change nothing in it. Beside it is the folder ``conda`` of the stand-in that made the environments.
    """
    return Project(kept_run(pytestconfig, "whole", run_in_environments))


def run_in_environments(project: Project) -> CompletedProcess[str]:
    """Make the environments, and then run all jobs in them."""
    conda = StandInConda.in_folder(project.folder / "conda")
    alone = project.deploy(conda, *SMOKE, "--conda-create-envs-only")
    return alone if alone.returncode or project.smoke.exists() else project.deploy(conda, *SMOKE)


def kept_run(config: pytest.Config, name: str, run: Callable[[Project], CompletedProcess[str]]) -> Path:
    """The folder of a run that is made once for this state of the sources.

    It is kept in pytest's cache, where the slow tests find the one of the fast tests.
    """
    cache = config.cache.mkdir(f"smoke-{name}")  # type: ignore[union-attr]
    with FileLock(cache / "lock"):
        kept = cache / state_of_sources()
        failed = cache / f"failed-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}.txt"
        if not (kept / "complete").exists() and not failed.exists():
            for old in cache.iterdir():  # of other states, of other sessions, or cut off
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.suffix == ".txt":
                    old.unlink()
            done = run(Project.copied_to(kept / "project"))
            if done.returncode == 0:
                (kept / "complete").touch()
            else:
                said = f"the smoke run failed, it ended with:\n{done.stdout[-4000:]}"
                failed.write_text(said, encoding="utf-8")
        if failed.exists():
            pytest.fail(failed.read_text(encoding="utf-8"), pytrace=False)
    return kept / "project"


def state_of_sources() -> str:
    """A digest of all that a run depends on."""
    digest = hashlib.sha256()
    installed = sorted({f"{one.name} {one.version}" for one in distributions()})
    digest.update(repr((sys.version, installed)).encode())
    own = ("environments.py", "workflow_copy.py", "workflow/conftest.py", "workflow/short.yaml")
    for part in (*PARTS, *(f"tests/{file}" for file in own)):
        found = ROOT / part
        for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
            if file.is_file() and "__pycache__" not in file.parts and ".egg-info" not in str(file):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


PLAIN = ("snakemake", "pygments", "snakemake-executor-plugin-slurm")
"""What is installed where there is nothing else; the second for reports, the third for clusters."""


@pytest.fixture(scope="session")
def plain(pytestconfig: pytest.Config) -> Path:
    """The folder of commands of an environment with Snakemake and nothing else, kept in pytest's cache."""
    cache = pytestconfig.cache.mkdir("plain-snakemake")
    pins = ROOT / "envs" / "constraints.txt"
    wanted = f"{sys.version}\n{PLAIN}\n{pins.read_text(encoding='utf-8')}"
    kept = cache / "environment"
    done = kept / "wanted.txt"
    with FileLock(cache / "lock"):
        if not (done.is_file() and done.read_text(encoding="utf-8") == wanted):
            shutil.rmtree(kept, ignore_errors=True)
            venv.create(kept, with_pip=True, symlinks=True)
            pip = [kept / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", pins, *PLAIN]
            made = subprocess.run(pip, capture_output=True, text=True, timeout=600, check=False)
            if made.returncode:
                pytest.skip(f"Snakemake cannot be fetched: {made.stderr.strip().splitlines()[-1:]}")
            done.write_text(wanted, encoding="utf-8")
    return kept / "bin"


@pytest.fixture
def conda(tmp_path: Path) -> StandInConda:
    return StandInConda.in_folder(tmp_path / "conda")
