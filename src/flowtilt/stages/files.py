"""Reading and writing the files that pass between stages."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from flowtilt.files import atomic_path

Metrics = dict[str, float | None]


class StageError(RuntimeError):
    """An input file that a stage cannot use; the message names the file and the fix."""


def write_json(data: Any, path: Path) -> None:
    """Write JSON; NaN is refused."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_rows(rows: dict[str, Metrics], path: Path) -> None:
    """Write metrics by row name."""
    write_json({"rows": rows}, path)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def write_history(rows: list[dict[str, float]], path: Path) -> None:
    """Write a training's history, a row an update, in full precision."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Named arrays from a file of :func:`write_arrays`."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return [data[name] for name in names]
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the stage that writes it first") from None
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise StageError(
            f"{path}: not a complete file of this stage ({error}); delete it and run again"
        ) from None


def read_history(path: Path, column: str) -> np.ndarray:
    """One column of a training's history, (updates,)."""
    try:
        with path.open(newline="") as stream:
            return np.array([float(row[column]) for row in csv.DictReader(stream)])
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the finetune stage first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: not a training's history ({error!r}); delete it and run again") from None


def read_schedule(path: Path) -> list[dict[str, float]]:
    """The rungs of a rising level from the threshold stage: masses and thresholds, in their order."""
    try:
        rungs = json.loads(path.read_text())["schedule"]
        found = [{key: float(rung[key]) for key in ("mass", "threshold")} for rung in rungs]
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the threshold stage first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: has no schedule ({error!r}); delete it and run again") from None
    if not found:
        raise StageError(f"{path}: has an empty schedule; delete it and run again")
    return found


def read_threshold(path: Path) -> dict[str, float]:
    """Threshold and offline active share from the threshold stage."""
    try:
        row = json.loads(path.read_text())
        return {key: float(row[key]) for key in ("threshold", "offline_active_share")}
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the threshold stage first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: not a threshold file ({error!r}); delete it and run again") from None
