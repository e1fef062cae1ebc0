"""What made a set of results: commit, configuration, versions, machine, and time per stage."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowtilt.costs import added_costs, stage_costs
from flowtilt.files import one_line, read_json, read_text, write_text
from flowtilt.measurements import ResultsError

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
    "qm9pack",
    "rdkit",
    "tblite",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
    "open_clip_torch",
    "vendi-score",
)


def write_provenance(config_hash: str, benchmarks: Path, output: Path, earlier: Path | None = None) -> None:
    """Write the provenance of a finished run.

    Args:
        config_hash: of the workflow's configuration.
        benchmarks: folder of Snakemake's benchmark files, one folder a stage.
        output: JSON file to write.
        earlier: provenance of an earlier run whose results are kept beside those of this one; its commit,
            configuration, versions and machine are kept under ``earlier``, and its stages' costs are added.
    """
    record: dict[str, Any] = {
        "commit": commit(),
        "config_hash": config_hash,
        "versions": versions(),
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
        "stages": stage_costs(benchmarks),
    }
    if earlier is not None:
        try:
            other = read_json(earlier)
            record["stages"] = added_costs(other.pop("stages"), record["stages"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(
                f"{earlier}: not a provenance ({one_line(error)}); name the provenance.json of a run"
            ) from None
        record["earlier"] = other
    write_text(output, json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that numbers may depend on; None of those that are not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The commit that is checked out, and whether sources or configuration differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, encoding="utf-8", check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "config", "workflow", "Snakefile")
        return {"hash": git("rev-parse", "HEAD"), "modified": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"hash": None, "modified": None}


def _processor() -> str:
    """Model name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in read_text(info).splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
