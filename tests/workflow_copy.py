"""Snakemake on a copy of the project's workflow, so that nothing is written into the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from environments import MOLECULES

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ("--workflow-profile", "workflow/profiles/default")
SMOKE = ("--configfile", "config/smoke.yaml")
PARTS = ("Snakefile", "config", "envs", "resources", "workflow")


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
        if not MOLECULES:
            config = folder / "config" / "config.yaml"
            config.write_text(re.sub(r"^ +- molecules_\w+\n", "", config.read_text(), flags=re.MULTILINE))
        return cls(folder)

    @property
    def smoke(self) -> Path:
        """The results folder of the smoke configuration."""
        return self.folder / "results" / "smoke"

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake as a user would; both streams are in ``stdout``."""
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *PROFILE, "--cores", "2", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
            check=False,
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
