"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the name ``path`` if the block succeeds.

    The temporary file lies in the folder of ``path`` (made if it is missing), so that the renaming
    cannot cross file systems, and it has the same extension, since some writers append their own
    to other names. If the block raises, an earlier file at ``path`` stays as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes the place of ``path`` if the block succeeds.

    If the block raises, what was at ``path`` stays as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_of(results: str | Path, experiment: str, made: str, seed: int) -> Path:
    """Where the files of a run are kept; ``made`` is its method, or the layer of rows solved together."""
    return Path(results) / "runs" / experiment / made / f"seed{seed}"
