"""What a SLURM cluster can run, asked before anything is submitted to it.

SLURM refuses some jobs when they are submitted, one by one, and lets others wait for ever: those that ask
for more time than their partition gives. Snakemake's plugin can wait for ever too, if the command that it
asks for the state of jobs forgets them before it looks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Snakemake's plugin looks at least this often (s); a command that it waits for ends within a minute.
LONGEST_BETWEEN_LOOKS = 180
SLACK = 60


class ClusterError(ValueError):
    """A cluster that cannot run what it is asked to; the message says what to change."""


@dataclass(frozen=True)
class Partition:
    """Nodes that jobs are submitted to under one name.

    Attributes:
        name: as ``sbatch --partition`` takes it.
        default: whether jobs that name no partition go there.
        minutes: the longest time that a job may ask for, None for any.
        gpus: whether some node has GPUs to ask for.
    """

    name: str
    default: bool
    minutes: int | None
    gpus: bool


@dataclass(frozen=True)
class Cluster:
    """A SLURM cluster as its controller describes it.

    Attributes:
        partitions: by name.
        accounts: whether finished jobs are kept in an accounting database, which ``sacct`` asks.
        remembered: seconds for which the controller itself, and so ``squeue``, knows of a finished job.
    """

    partitions: Mapping[str, Partition]
    accounts: bool
    remembered: int


def ask_cluster() -> Cluster:
    """The cluster that this machine submits jobs to. Raises ClusterError if SLURM's commands are not here, or
    its controller does not answer."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "SLURM's command sbatch was not found: run Snakemake on a machine that submits jobs, such as a "
            "login node, or without the profile slurm"
        )
    listed = _answer("sinfo", "--noheader", "--format=%P|%l|%G")
    settings = dict(re.findall(r"^(\w+) *= (.*)$", _answer("scontrol", "show", "config"), re.MULTILINE))
    return Cluster(
        partitions=read_partitions(listed),
        accounts=settings.get("AccountingStorageType", "").strip()
        not in ("", "accounting_storage/none", "(null)"),
        remembered=int(settings.get("MinJobAge", "0").split()[0]),
    )


def state_command(first_look: int) -> str | None:
    """The command that the profile asks for the state of jobs; None on a machine without SLURM.

    Args:
        first_look: as of :func:`status_command`.

    Raises:
        ClusterError: as by :func:`ask_cluster` and :func:`status_command`.
    """
    return status_command(ask_cluster(), first_look) if shutil.which("sbatch") else None


def _answer(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"SLURM does not answer: {error}") from None
    if run.returncode != 0:
        raise ClusterError(f"SLURM does not answer: {' '.join(command)}: {run.stderr.strip()}")
    return run.stdout


def read_partitions(listed: str) -> dict[str, Partition]:
    """Partitions by name, from lines ``name|time limit|generic resources`` of ``sinfo``. A partition whose
    nodes differ has several lines; the default one has a star behind its name."""
    partitions: dict[str, Partition] = {}
    for line in listed.splitlines():
        name, limit, resources = line.split("|", 2)
        bare = name.strip().rstrip("*")
        gpus = re.search(r"(^|,)gpu\b", resources.strip()) is not None
        partitions[bare] = Partition(
            name=bare,
            default=name.strip().endswith("*"),
            minutes=read_minutes(limit.strip()),
            gpus=gpus or (bare in partitions and partitions[bare].gpus),
        )
    return partitions


def read_minutes(limit: str) -> int | None:
    """Minutes of a limit as ``sinfo`` prints it, ``[[days-]hours:]minutes:seconds``; None for any."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):\d+", limit)
    if match is None:
        return None
    days, hours, minutes = (int(part or 0) for part in match.groups())
    return 1440 * days + 60 * hours + minutes


@dataclass(frozen=True)
class Submission:
    """What is asked for at once: its name, minutes, and GPUs."""

    name: str
    minutes: int
    gpus: int = 0


def check_submissions(cluster: Cluster, partition: str, submissions: Iterable[Submission]) -> None:
    """Refuse submissions that the cluster could not run.

    Args:
        partition: where; several names with commas between them, or the cluster's default one if empty.

    Raises:
        ClusterError: if there is no such partition; or for the first submission that asks for GPUs where
            there are none, or for more time than its partition gives.
    """
    partitions = _partitions_of(cluster, partition)
    names = ", ".join(each.name for each in partitions)
    times = ", ".join(f"{each.name} ({each.minutes} min)" for each in partitions)
    for asked in submissions:
        if asked.gpus and not any(each.gpus for each in partitions):
            raise ClusterError(
                f"{asked.name} asks for a GPU, and no node of the partition {names} has one; name a "
                "partition that has (SBATCH_PARTITION=NAME, or --set-resources RULE:slurm_partition=NAME for "
                "single rules), or do without: --config gpu=0"
            )
        if all(each.minutes is not None and each.minutes < asked.minutes for each in partitions):
            raise ClusterError(
                f"{asked.name} asks for {asked.minutes} min, more than its partition gives, {times}; it "
                "would wait for ever. Name another partition, or ask for less: --set-resources "
                "RULE:runtime=MINUTES, or let fewer jobs share a submission: --group-components GROUP=NUMBER"
            )


def _partitions_of(cluster: Cluster, named: str) -> list[Partition]:
    known = ", ".join(cluster.partitions)
    how = "SBATCH_PARTITION=NAME in the environment, or --default-resources slurm_partition=NAME"
    if not named:
        default = [partition for partition in cluster.partitions.values() if partition.default]
        if not default:
            raise ClusterError(
                f"no partition is named, and the cluster has no default one; name one of {known}: {how}"
            )
        return default
    names = named.split(",")
    if unknown := [name for name in names if name not in cluster.partitions]:
        raise ClusterError(f"the cluster has no partition {unknown[0]}; name one of {known}: {how}")
    return [cluster.partitions[name] for name in names]


def status_command(cluster: Cluster, first_look: int) -> str:
    """The command that can tell what became of a job: ``sacct`` or ``squeue``.

    The plugin would take ``sacct`` wherever it is installed, though without an accounting database it knows
    of no job.

    Args:
        first_look: seconds before the plugin first asks.

    Raises:
        ClusterError: if neither can, since there is no database and the controller forgets too soon.
    """
    if cluster.accounts:
        return "sacct"
    needed = max(LONGEST_BETWEEN_LOOKS + SLACK, 3 * first_look)
    if cluster.remembered < needed:
        raise ClusterError(
            f"the cluster has no accounting database and forgets a finished job after {cluster.remembered} s "
            f"(MinJobAge), so that Snakemake could wait for it for ever; {needed} s are needed in slurm.conf"
        )
    return "squeue"
