"""What made a set of results: commit, configuration, versions, machine, and time per stage."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowtilt.files import one_line, read_json, read_text, write_text
from flowtilt.pipeline.domain import known_domains

SOURCES = Path(__file__).resolve().parents[2]
"""Folder of the package that runs."""

REDIRECTING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")
"""Variables by which git takes another repository for that of its folder."""

ABSENT = "not in this environment"
"""In the place of a version."""

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


def write_provenance(
    config_hash: str,
    benchmarks: Path,
    output: Path,
    earlier: Path | None = None,
    environments: Sequence[Path] = (),
    snakemake: str = "",
) -> None:
    """Write the provenance of a finished run.

    Args:
        benchmarks: folder of Snakemake's benchmark files, one folder a stage.
        output: JSON file to write.
        earlier: provenance of an earlier run whose results are kept beside those of this one; its commit,
            configuration, versions and machine are kept under ``earlier``, and its stages' costs are added.
        environments: versions in each environment of the run, from :func:`write_versions`, which their files
            are named for; none if all stages ran in this one.
        snakemake: version of it, where it runs in an environment of its own.

    Raises:
        ResultsError: if a benchmark, an environment's versions, or the earlier provenance, is malformed.
    """
    # What reads tables is slow to import, and stages that record what made a model do not need it.
    from flowtilt.pipeline.report.costs import added_costs, stage_costs
    from flowtilt.pipeline.report.measurements import ResultsError

    record: dict[str, Any] = {
        "commit": commit(),
        "config_hash": config_hash,
        "versions": {**versions(), **({"snakemake": snakemake} if snakemake else {})},
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
        "stages": stage_costs(benchmarks),
    }
    if environments:
        record["environments"] = found = _environments(environments)
        for package, own in record["versions"].items():
            if own == ABSENT:  # named where it was used
                others = [each[package] for each in found.values() if each.get(package, ABSENT) != ABSENT]
                record["versions"][package] = others[0] if others else ABSENT
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


def packages() -> list[str]:
    """The packages that numbers may depend on: those of all stages, and those that domains add."""
    return [*PACKAGES, *(package for domain in known_domains() for package in domain.packages)]


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers may depend on, in the environment that this runs in.

    Under conda, stages of each domain run in an environment of their own: a package that this one lacks
    may have been in another.
    """
    return {"python": platform.python_version(), **{package: _version(package) for package in packages()}}


def write_versions(output: Path) -> None:
    """Write the versions in the environment that this runs in, for :func:`write_provenance`."""
    write_text(output, json.dumps(versions(), indent=1) + "\n")


def _environments(files: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Versions of what each environment has, by the environment's name."""
    from flowtilt.pipeline.report.measurements import ResultsError

    found = {}
    for file in files:
        try:
            found[file.stem] = {name: own for name, own in read_json(file).items() if own != ABSENT}
        except (OSError, ValueError, AttributeError) as error:
            raise ResultsError(
                f"{file}: not the versions of an environment ({one_line(error)}); delete it and run again"
            ) from None
    return found


def _version(package: str) -> str:
    """Of a package; of this one what its sources say, which may not be those that are installed."""
    project = SOURCES.parent / "pyproject.toml"
    try:
        if package == "flowtilt" and project.is_file():
            return str(tomllib.loads(read_text(project))["project"]["version"])
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def commit() -> dict[str, Any]:
    """The commit of the sources that run, and whether they, or what lies beside them, differ from it.

    A repository around them whose files they are not, as that of another project, is not asked. What they
    are is said in any case, by a hash.

    Returns:
        ``sources``, the SHA-256 of names and contents of the package's modules; ``hash`` and ``modified``,
        None if no repository has these sources; then ``reason`` says why.
    """
    record: dict[str, Any] = {"hash": None, "modified": None, "sources": _hash_of(SOURCES)}
    try:
        tracked = set(_git("ls-files", "--", "*.py").splitlines())
        if not tracked:
            return record | {"reason": "the sources are not tracked by the git repository around them"}
        beside = [str(SOURCES.parents[1] / name) for name in ("config", "workflow", "Snakefile")]
        present = {file.relative_to(SOURCES).as_posix() for file in SOURCES.rglob("*.py")}
        changed = _git("status", "--porcelain", "--untracked-files=all", "--", ".", *beside)
        return record | {
            "hash": _git("rev-parse", "HEAD"),
            "modified": bool(changed) or not present <= tracked,
        }
    except OSError as error:
        return record | {"reason": f"git cannot be run ({error.strerror})"}
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split()).replace(str(SOURCES.parents[1]), ".")
        return record | {"reason": f"git does not know the sources ({said})"}


def _git(*arguments: str) -> str:
    """What git says in the folder of the sources, wherever its own variables point."""
    own = {name: value for name, value in os.environ.items() if name not in REDIRECTING}
    text: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(["git", *arguments], cwd=SOURCES, env=own, check=True, **text)
    return done.stdout.strip()


def _hash_of(folder: Path) -> str:
    """SHA-256 of the names and contents of all modules in a folder."""
    contents = {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.py"))
    }
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _processor() -> str:
    """Model name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in read_text(info).splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
