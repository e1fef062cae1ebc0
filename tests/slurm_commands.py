"""Commands of SLURM that answer as they are told, for tests that need no cluster."""

from __future__ import annotations

from pathlib import Path

LIMITS = "MinJobAge = 300 sec\nAccountingStorageType = accounting_storage/none"
"""What a cluster without accounting says of itself, which remembers jobs for long enough."""


def write_commands(folder: Path, **scripts: str) -> str:
    """Write commands into a folder.

    Returns:
        The PATH that finds them; without any, one that finds nothing at all.
    """
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin" if scripts else str(folder)


def write_cluster(folder: Path, partitions: str, settings: str = LIMITS) -> str:
    """Write the commands of a cluster that runs nothing.

    Args:
        folder: to write to.
        partitions: as ``sinfo`` prints them: ``name|time limit|generic resources``.
        settings: as ``scontrol show config`` prints them.
    """
    shown = f"cat <<'END'\n{settings}\nEND"
    return write_commands(folder, sbatch="exit 1", sinfo=f"echo '{partitions}'", scontrol=shown)
