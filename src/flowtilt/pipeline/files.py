"""Reading and writing the files that pass between stages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from flowtilt.files import atomic_path, read_json, read_npz, read_text, write_text

Metrics = dict[str, float | None]


class StageError(RuntimeError):
    """An input file that a stage cannot use; the message names the file and the fix."""


@contextmanager
def reading(path: Path, what: str, stage: str) -> Iterator[None]:
    """The errors of reading a file that a stage has written, as one sentence. Raises StageError if the file
    is missing, or not ``what`` it should be."""
    try:
        yield
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the {stage} stage first") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise StageError(f"{path}: {what} ({error!r}); delete it and run again") from None


def write_json(data: Any, path: Path) -> None:
    """Write JSON; NaN is refused."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_rows(rows: dict[str, Metrics], path: Path) -> None:
    """Write metrics by row name."""
    write_json({"rows": rows}, path)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def write_history(rows: list[dict[str, float]], path: Path) -> None:
    """Write a training's history, a row an update, in full precision."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_frontier(points: list[dict[str, float]], path: Path) -> None:
    """Write points of a frontier, or see to it that none of an earlier run are left."""
    if points:
        write_history(points, path)
    else:
        path.unlink(missing_ok=True)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Named arrays of numbers from a file of :func:`write_arrays`. Raises StageError if the file is missing,
    not whole, or lacks an array."""
    try:
        data = read_npz(path)
        found = [data[name] for name in names]
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the stage that writes it first") from None
    except (ValueError, KeyError) as error:
        what = f"it has no array {error}" if isinstance(error, KeyError) else error
        raise StageError(
            f"{path}: not a complete file of this stage ({what}); delete it and run again"
        ) from None
    for name, array in zip(names, found, strict=True):
        if array.dtype.kind not in "biuf":
            raise StageError(
                f"{path}: its array {name} has the type {array.dtype}, no number; delete it and run again"
            )
    return found


def read_columns(path: Path, *needed: str) -> dict[str, np.ndarray]:
    """All columns of a training's history, each (updates,).

    Raises:
        StageError: if the file is missing, malformed, or lacks a column that is needed.
    """
    with reading(path, "not a training's history", "finetune"):
        rows = list(csv.DictReader(StringIO(read_text(path))))
        if not rows:
            raise ValueError("no rows")
        if absent := {*needed} - {*rows[0]}:
            raise KeyError(*sorted(absent))
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def read_schedule(path: Path) -> list[dict[str, float]]:
    """The rungs of a narrowing tail from the threshold stage: masses and thresholds, in their order."""
    with reading(path, "has no schedule", "threshold"):
        rungs = read_json(path)["schedule"]
        found = [{key: float(rung[key]) for key in ("mass", "threshold")} for rung in rungs]
    if not found:
        raise StageError(f"{path}: has an empty schedule; delete it and run again")
    return found


def read_kept(path: Path) -> Metrics:
    """What the samples that a method has kept cost, from the keep stage."""
    with reading(path, "not a file of samples' costs", "keep"):
        return {str(key): float(value) for key, value in read_json(path).items()}


def read_threshold(path: Path) -> dict[str, float]:
    """Threshold and offline active share from the threshold stage."""
    with reading(path, "not a threshold file", "threshold"):
        row = read_json(path)
        return {key: float(row[key]) for key in ("threshold", "offline_active_share")}
