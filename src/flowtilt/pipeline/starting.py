"""What is done as a run begins, once it has the folder's lock, and before its first job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flowtilt.files import atomic_path
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import domain_of
from flowtilt.pipeline.places import CURE, SOURCES, lacking
from flowtilt.pipeline.plan import Plan


def start(plan: Plan, here: bool = True) -> None:
    """Write what the jobs read, and refuse what no job could use.

    Args:
        here: whether jobs run in the Python that runs Snakemake, and in no environment of their own.

    Raises:
        ConfigError: naming the file, the key and the fix, or the packages that the jobs lack.
    """
    if here and lacking():
        raise ConfigError(cure())
    write_configs(plan)
    check_experiments(plan)


def cure() -> str:
    """What the Python that runs Snakemake lacks for jobs, and where they would have it."""
    lacks = ", ".join(lacking())
    return f"the Python that runs Snakemake, {sys.executable}, lacks {lacks}, which jobs need: {CURE}"


def write_configs(plan: Plan) -> None:
    """Write the resolved configurations that are not there yet; one that is there is never changed."""
    for name, file in plan.config_files.items():
        path = Path(file)
        if not path.is_file():
            with atomic_path(path) as temporary:
                temporary.write_text(plan.resolved(name), encoding="utf-8")


def check_experiments(plan: Plan) -> None:
    """Refuse experiments that no job could use, where telling so takes torch.

    In a process of its own: torch would stay in this one, which every job is started from. Where this Python
    has no torch, each job says it itself.
    """
    if lacking():
        return
    files = [plan.config_files[name] for name, one in plan.experiments.items() if domain_of(one).verify]
    if not files:
        return
    program = "from flowtilt.pipeline.cli import run; raise SystemExit(run())"
    command = [sys.executable, "-c", program, "check", *files]
    found = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    told = {**os.environ, "PYTHONPATH": found}
    checked = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", env=told, check=False)
    if checked.returncode != 0:
        said = checked.stderr.strip().splitlines() or [f"flowtilt check ended with {checked.returncode}"]
        raise ConfigError(said[-1].removeprefix("check: "))
