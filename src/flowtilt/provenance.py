"""What made a set of results: commit, configuration, versions, machine, and time per stage."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from flowtilt.files import atomic_path

PACKAGES = (
    "flowtilt",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "pydantic",
    "safetensors",
    "matplotlib",
    "snakemake",
)


def write_provenance(config_hash: str, benchmarks: Path, output: Path) -> None:
    """Write the provenance of a finished run.

    Args:
        config_hash: of the workflow's configuration.
        benchmarks: folder of Snakemake's benchmark files, one folder a stage.
        output: JSON file to write.
    """
    record = {
        "commit": _commit(),
        "config_hash": config_hash,
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
        "stages": stage_costs(benchmarks),
    }
    with atomic_path(output) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def stage_costs(benchmarks: Path) -> dict[str, dict[str, float]]:
    """Jobs, wall time in seconds and peak memory in MB of each stage, from Snakemake's benchmarks."""
    costs = {}
    for folder in sorted(p for p in benchmarks.iterdir() if p.is_dir()) if benchmarks.is_dir() else []:
        files = sorted(folder.rglob("*.tsv"))
        if not files:
            continue  # of the job that is running this
        jobs = pd.concat([pd.read_csv(f, sep="\t", na_values="-") for f in files])
        memory = jobs["max_rss"].max()
        costs[folder.name] = {
            "jobs": len(jobs),
            "wall_seconds": round(float(jobs["s"].sum()), 1),
            "peak_memory_mb": round(float(memory), 1) if pd.notna(memory) else 0.0,
        }
    return costs


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The commit that is checked out, and whether sources or configuration differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "config", "workflow", "Snakefile")
        return {"hash": git("rev-parse", "HEAD"), "modified": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"hash": None, "modified": None}


def _processor() -> str:
    """Model name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
