"""One smoke run for all tests of the pipeline, and fresh copies for those that must not start one."""

from __future__ import annotations

from pathlib import Path

import pytest

from workflow_copy import SMOKE, Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project in which nothing has been run."""
    return Project.copied_to(tmp_path / "project")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the smoke configuration has been run; tests leave it complete."""
    project = Project.copied_to(tmp_path_factory.mktemp("smoke") / "project")
    run = project.snakemake(*SMOKE)
    if run.returncode != 0:
        pytest.fail(f"the smoke run failed, it ended with:\n{run.stdout[-4000:]}", pytrace=False)
    return project
