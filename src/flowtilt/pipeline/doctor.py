"""What this machine, or the SLURM cluster that it submits jobs to, can run of a configuration."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowtilt.pipeline import slurm
from flowtilt.pipeline.checks import read_plan
from flowtilt.pipeline.configuration import merge, read_yaml
from flowtilt.pipeline.places import located
from flowtilt.pipeline.plan import Plan
from flowtilt.pipeline.resources import REPORT, Needs
from flowtilt.pipeline.rules import rule_name

CONFIG = Path("config/config.yaml")


def examine(files: Sequence[Path], partition: str, gpu: int | None = None) -> list[str]:
    """What there is, in lines.

    Args:
        files: configurations over ``config/config.yaml``, of which the last one wins, as in Snakemake.
        partition: of SLURM; the cluster's default one if empty.
        gpu: GPUs of a job, if they are not the configuration's.

    Raises:
        ConfigError: if the configuration cannot be used.
        ClusterError: if the cluster cannot run what it plans; the message says what to change.
    """
    data: dict[str, Any] = read_yaml(located(CONFIG))
    for file in files:
        data = merge(data, read_yaml(file))
    if gpu is not None:
        data = {**data, "gpu": gpu}
    where = ", ".join(str(path) for path in (*reversed(files), CONFIG))
    return [*machine(), *cluster(read_plan(data, where), partition)]


def machine() -> list[str]:
    """This machine, in lines."""
    conda = shutil.which("conda")
    without = "not found; run without --use-conda, in the environment of `make env` or in a container"
    return [
        f"Python {platform.python_version()}, {os.cpu_count()} cores",
        f"NVIDIA's driver: {shutil.which('nvidia-smi') or 'not found'}",
        f"conda: {conda or without}",
    ]


def cluster(plan: Plan, partition: str) -> list[str]:
    """The SLURM cluster, in lines, if there is one. Raises ClusterError if it cannot run what is planned."""
    if shutil.which("sbatch") is None:
        return ["SLURM: not found; jobs run where Snakemake does"]
    found = slurm.ask_cluster()
    jobs = submissions(plan)
    slurm.check_submissions(found, partition, jobs)
    partitions = ", ".join(
        f"{each.name} ({each.minutes or 'any'} min{', GPUs' if each.gpus else ''})"
        for each in found.partitions.values()
    )
    longest = max(job.minutes for job in jobs)
    command = slurm.status_command(found, 20)
    return [
        f"SLURM: partitions {partitions}; the state of jobs is asked of {command}",
        f"SLURM: what is planned fits; the longest submission asks for at least {longest} min",
    ]


def submissions(plan: Plan) -> list[slurm.Submission]:
    """A job of each rule, and the shortest submission that jobs of a group share."""
    found: list[slurm.Submission] = []
    shared: dict[str, int] = {}
    for name, needs in planned(plan).items():
        if needs.local:
            continue
        minutes = needs.minutes(plan.config)
        found.append(slurm.Submission(name, minutes, needs.gpus(plan.config)))
        if group := needs.group_in(plan.config):
            shared[group] = shared.get(group, 0) + minutes
    return [*(slurm.Submission(f"the group {name}", time) for name, time in shared.items()), *found]


def planned(plan: Plan) -> dict[str, Needs]:
    """The rules that a configuration has jobs of; a rule of each file is one here."""
    stages = {rule_name(rule.domain, rule.stage): rule.stage.needs for rule in plan.rules}
    theory = {"theory": REPORT["theory"]} if plan.theory else {}
    return {**stages, **theory}
