"""Deployment by conda, as far as it goes without one; test_whole.py runs jobs in what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from environments import FILES, StandInConda
from workflow_copy import SMOKE, Project


def test_a_dry_run_plans_every_environment_and_makes_none(project: Project, tmp_path: Path) -> None:
    conda = StandInConda.in_folder(tmp_path / "conda")
    run = project.deploy(conda, *SMOKE, "--dry-run")
    assert run.returncode == 0, run.stdout
    for file in FILES:
        assert f"Conda environment envs/{file.name} will be created" in run.stdout
    assert not [call for call in conda.calls() if call[:2] == ["env", "create"]]


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--conda-create-envs-only",)])
def test_without_conda_snakemake_says_so(project: Project, arguments: tuple[str, ...]) -> None:
    """What to do instead, `flowtilt doctor` says."""
    run = project.deploy(None, *SMOKE, *arguments)
    assert run.returncode != 0
    assert "Is conda installed and accessible?" in run.stdout
    assert "Traceback" not in run.stdout
    assert not (project.smoke / "configs").exists()
