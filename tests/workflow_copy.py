"""Snakemake on a copy of the project's workflow, so that nothing is written into the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from environments import FILES, MOLECULES, StandInConda

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ("--workflow-profile", "workflow/profiles/default")
SMOKE = ("--configfile", "config/smoke.yaml")
SHORT = (*SMOKE, "config/short.yaml")
"""A part of the smoke configuration that goes through every rule: the file is tests/workflow/short.yaml."""

PARTS = ("Snakefile", "config", "envs", "profiles", "pyproject.toml", "resources", "src", "workflow")


@dataclass(frozen=True)
class Project:
    """A folder with the workflow and its configuration."""

    folder: Path

    @classmethod
    def copied_to(cls, folder: Path) -> Project:
        folder.mkdir(parents=True)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        shutil.copy(ROOT / "tests" / "workflow" / "short.yaml", folder / "config")
        if not MOLECULES:
            for config in (folder / "config" / name for name in ("config.yaml", "short.yaml")):
                listed = re.sub(r"^ +- molecules_\w+\n", "", config.read_text(), flags=re.MULTILINE)
                config.write_text(listed)
        return cls(folder)

    @property
    def smoke(self) -> Path:
        """The results folder of the smoke configuration."""
        return self.folder / "results" / "smoke"

    def snakemake(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake as a user would; both streams are in ``stdout``."""
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *PROFILE, "--cores", "2", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=3600,
            check=False,
            env={**os.environ, **environment},
        )

    def deploy(self, conda: StandInConda | None, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake with environments for its jobs, and with a conda on the PATH or none."""
        shown = [str(conda.bin)] if conda else []
        path = os.environ["PATH"].split(os.pathsep)
        held = [part for part in path if not (Path(part) / "conda").exists()]
        return self.snakemake(
            "--software-deployment-method", "conda", *arguments, PATH=os.pathsep.join([*shown, *held])
        )

    def planned(self, *arguments: str) -> dict[str, int]:
        """Jobs that a dry run would start, by rule."""
        run = self.snakemake("--dry-run", "--quiet", "rules", *arguments)
        assert run.returncode == 0, run.stdout
        return jobs_planned(run.stdout)


def jobs_planned(output: str) -> dict[str, int]:
    """Jobs by rule, in the table that a dry run prints."""
    table = re.search(r"^Job stats:\njob +count\n[- ]+\n(.*?)\n\n", output, re.DOTALL | re.MULTILINE)
    if table is None:
        assert "Nothing to be done" in output, output
        return {}
    jobs = {rule: int(count) for rule, count in map(str.split, table[1].splitlines())}
    return {rule: count for rule, count in jobs.items() if rule not in ("total", "all")}


def environments_of(project: Project) -> dict[str, Path]:
    """The environments that Snakemake had made, by the name of their file."""
    names = {file.read_text(): file.stem for file in FILES}
    copies = (project.folder / ".snakemake" / "conda").glob("*.yaml")
    return {names[copy.read_text()]: copy.with_suffix("") for copy in copies}


def check_metrics(results: Path) -> set[str]:
    """Check that every run has metrics, under the rows of its method, and that all of them are numbers.

    Returns:
        The experiments that have runs.
    """
    files = list((results / "runs").rglob("metrics.json"))
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)["rows"]
        method = file.parent.parent.name
        if method in ("exact", "resolved"):
            assert all(row.endswith(f"_{method}") for row in rows), file
        else:  # on a functional, with the rows that its own problem has on the grid
            solved = [f"{method}_exact", f"{method}_optimum"]
            assert list(rows) in ([method], [method, *solved[:1]], [method, *solved]), file
    return {file.relative_to(results).parts[1] for file in files}
