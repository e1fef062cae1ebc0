"""Reading and writing the files that pass between stages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowtilt.files import atomic_path, read_json, read_npz, read_text, write_text

if TYPE_CHECKING:
    from flowtilt.pipeline.domain import Job

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


def read_history(path: Path, column: str) -> np.ndarray:
    """One column of a training's history, (updates,)."""
    with reading(path, "not a training's history", "finetune"):
        rows = list(csv.DictReader(StringIO(read_text(path))))
        if not rows:
            raise ValueError("no rows")
        return np.array([float(row[column]) for row in rows])


def columns_of(history: Path) -> list[str]:
    """Names of the columns of a training's history, none if it is not there."""
    if not history.is_file():
        return []
    try:
        return next(csv.reader(StringIO(read_text(history))), [])
    except (ValueError, csv.Error) as error:
        raise StageError(f"{history}: not a training's history ({error}); delete it and run again") from None


def tuned_metrics(job: Job, own: Mapping[str, str] = {}) -> Metrics:
    """What the history and the threshold of a run say, those among a job's inputs.

    Shares of samples with a gradient, over all updates and over the last fifth; and of ``own``, by the
    metric's name, columns of the history where it has them, over the last fifth.
    """
    row: Metrics = {}
    if (history := job.read_if_any("history")) is not None:
        active, present = read_history(history, "active_share"), columns_of(history)
        last = slice(-max(1, len(active) // 5), None)
        row |= {"active_share": float(active.mean()), "active_share_final": float(active[last].mean())}
        row |= {
            metric: float(read_history(history, column)[last].mean())
            for metric, column in own.items()
            if column in present
        }
    if (threshold := job.read_if_any("threshold")) is not None:
        row |= read_threshold(threshold)
    return row


def read_schedule(path: Path) -> list[dict[str, float]]:
    """The rungs of a narrowing tail from the threshold stage: masses and thresholds, in their order."""
    with reading(path, "has no schedule", "threshold"):
        rungs = read_json(path)["schedule"]
        found = [{key: float(rung[key]) for key in ("mass", "threshold")} for rung in rungs]
    if not found:
        raise StageError(f"{path}: has an empty schedule; delete it and run again")
    return found


def read_threshold(path: Path) -> dict[str, float]:
    """Threshold and offline active share from the threshold stage."""
    with reading(path, "not a threshold file", "threshold"):
        row = read_json(path)
        return {key: float(row[key]) for key in ("threshold", "offline_active_share")}
