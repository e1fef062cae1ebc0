"""The lowest and the newest Snakemake that the package allows, beside the one that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workflow_copy import ROOT, SHORT, Project, jobs_planned

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
(ALLOWED,) = (one for one in map(Requirement, EXTRAS["workflow"]) if one.name == "snakemake")
(LOWEST,) = (one.version for one in ALLOWED.specifier if one.operator == ">=")


@pytest.fixture(scope="module", params=[f"snakemake=={LOWEST}.*", str(ALLOWED)], ids=["lowest", "newest"])
def packages(request: pytest.FixtureRequest) -> Path:
    """A folder with that Snakemake, to go before what is installed; it is kept in pytest's cache."""
    folder = request.config.cache.mkdir(f"snakemake-{request.param_index}")
    wanted = [request.param]
    while wanted:
        if not install(folder, wanted) and not (folder / "snakemake").exists():
            pytest.skip(f"the package registry is out of reach: {request.param} cannot be had")
        wanted = missing(folder)
    return folder


def install(folder: Path, packages: list[str]) -> bool:
    """Put packages alone into a folder; whether that went well."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder]
    return subprocess.run([*pip, *packages], timeout=300, check=False).returncode == 0


def missing(folder: Path) -> list[str]:
    """What the packages of a folder need that neither the folder nor the environment has."""
    own = list(Distribution.discover(path=[str(folder)]))
    held = {canonicalize_name(one.name): one.version for one in [*distributions(), *own]}
    needed = [Requirement(line) for one in own for line in one.requires or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = [(one, held.get(canonicalize_name(one.name))) for one in needed]
    return [f"{one.name}{one.specifier}" for one, has in found if has is None or has not in one.specifier]


def test_the_workflow_is_read_and_run(packages: Path, project: Project) -> None:
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])

    def snakemake(*arguments: str) -> str:
        run = project.snakemake(*arguments, PYTHONPATH=path)
        assert run.returncode == 0, run.stdout
        return run.stdout

    (installed,) = (one for one in Distribution.discover(path=[str(packages)]) if one.name == "snakemake")
    assert snakemake("--version").split()[-1] == installed.version
    assert installed.version in ALLOWED.specifier
    assert "good condition" in snakemake("--lint")
    assert jobs_planned(snakemake("--dry-run", "--quiet", "rules"))["planar_finetune"] > 100
    target = ("theories", "results/smoke/pages/theory_threshold.html")
    assert "Finished jobid" in snakemake(*SHORT, "--", *target)
    assert "Nothing to be done" in snakemake(*SHORT, "--", *target)
    snakemake(*SHORT, "--report", "report.html", "--", *target)
    assert (project.folder / "report.html").stat().st_size > 100_000
