"""Starting the workflow as its users do: by some Snakemake's path, in some folder, or as a module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from environments import StandInConda
from workflow_copy import ROOT, Project

THEORY = "results/smoke/tables/theory_threshold.csv"
MODEL = "results/smoke/runs/risk_averse_2d/pretrained/seed0/model.safetensors"
"""Of the smoke run, each by a job or two."""

READ_ONLY = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; cd "$PWD"; exec "$@"'


def start(
    snakemake: Path,
    folder: Path,
    *arguments: str,
    conda: StandInConda | None = None,
    read_only: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake by its path in a folder, with nothing on the PATH but the system and a conda.

    A folder that shall be there for reading only needs a user who can mount; else the test is skipped.
    """
    mounted = ["unshare", "--mount", "sh", "-euc", READ_ONLY, str(read_only)] if read_only else []
    if mounted and subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a folder for reading only")
    held = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    places = [snakemake.parent, *([conda.bin] if conda else []), "/usr/local/bin", "/usr/bin", "/bin"]
    return subprocess.run(
        [*mounted, snakemake, "--cores", "2", *arguments],
        cwd=folder,
        env={**held, "PATH": os.pathsep.join(map(str, places))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


HERE = Path(sys.executable).parent / "snakemake"
"""Of an environment that holds what jobs need, which is not activated."""


def assert_same(folder: Path, finished: Project, files: Iterable[str]) -> None:
    for file in files:
        assert (folder / file).read_bytes() == (finished.folder / file).read_bytes(), file


DEPLOYED = """\
configfile: "config/config.yaml"


module flowtilt:
    snakefile:
        {snakefile}
    config:
        config
    {prefix}


use rule * from flowtilt{names}
"""
"""The file workflow/Snakefile as snakedeploy writes it, with the path of a clone."""


def module(folder: Path, snakefile: Path | str, prefix: str = "", names: str = "") -> None:
    """A folder that uses the workflow as a module, with the smoke configuration as its own.

    The workflow is a file, or what Snakemake shall make of some text.
    """
    named = f'"{snakefile}"' if isinstance(snakefile, Path) else snakefile
    text = DEPLOYED.format(snakefile=named, prefix=f'prefix: "{prefix}"' if prefix else "", names=names)
    (folder / "workflow").mkdir()
    (folder / "workflow" / "Snakefile").write_text(text, encoding="utf-8")
    (folder / "config").mkdir()
    whole, smoke = (
        yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("config", "smoke")
    )
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump({**whole, **smoke}), encoding="utf-8")
