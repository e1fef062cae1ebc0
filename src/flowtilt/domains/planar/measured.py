"""What figures of the plane are drawn from: distributions on a grid, samples, the networks' resolution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowtilt.files import one_line, read_json
from flowtilt.pipeline.report.measurements import ResultsError, Runs, again, read_arrays, row_name, run_folder


@dataclass(frozen=True)
class Distributions:
    """Distributions on a grid, averaged over seeds.

    Attributes:
        axis: cell centres along either side, (n,).
        cells: cell probabilities by row name, each (n, n), the first axis along x.
        edges: of the reward's histogram, rising, (m + 1,); none for functionals.
        rewards: histogram probabilities by row name, each (m,); none for functionals.
    """

    axis: np.ndarray
    cells: dict[str, np.ndarray]
    edges: np.ndarray
    rewards: dict[str, np.ndarray]


def load_distributions(results: str | Path, runs: Runs, solution: str) -> Distributions:
    """The distributions of one solved solution (``exact``, ``resolved`` or ``optimum``) of an experiment.
    Raises ResultsError if a file is missing, malformed, or on another grid than that of the first seed."""
    methods = [""] if runs.solved_apart else [m.name for m in runs.methods]
    seeds = []
    for seed in runs.seeds:
        paths = [
            run_folder(results, runs, method, solution, seed) / "distributions.npz" for method in methods
        ]
        seeds.append((paths[0], {name: a for path in paths for name, a in read_arrays(path).items()}))
    first_path, first = seeds[0]
    for path, arrays in seeds:
        if absent := set(_frame(runs)) - arrays.keys():
            raise ResultsError(f"{path}: no array {', '.join(sorted(absent))}; {again(path)}")
        if any(a.shape != first[name].shape for name, a in arrays.items() if name in first) or not all(
            np.allclose(arrays[name], first[name]) for name in _frame(runs)
        ):
            raise ResultsError(f"{path}: not on the grid of {first_path}; {again(path)}")
    rows = [row_name(m.name, solution) for m in runs.methods if row_name(m.name, solution) in first]

    def mean(name: str) -> np.ndarray:
        for path, arrays in seeds:
            if name not in arrays:
                raise ResultsError(f"{path}: no array {name}; {again(path)}")
        stacked = np.stack([arrays[name] for _, arrays in seeds])
        return np.asarray(stacked.mean(axis=0, dtype=np.float64))

    return Distributions(
        axis=first["axis"],
        cells={row: mean(row) for row in rows},
        edges=first.get("reward_edges", np.zeros(0)),
        rewards={row: mean(f"{row}__rewards") for row in rows if "reward_edges" in _frame(runs)},
    )


def _frame(runs: Runs) -> tuple[str, ...]:
    """Arrays that all distributions of an experiment share; functionals have no histogram of the reward."""
    return ("axis", "reward_edges") if runs.has_tail else ("axis",)


def load_samples(results: str | Path, runs: Runs, method: str) -> tuple[np.ndarray, np.ndarray]:
    """A network's samples, pooled over seeds: points (n, 2) and rewards (n,), 0 where there is no reward."""
    needed = ("x", "reward") if runs.has_tail else ("x",)
    points, rewards = [], []
    for seed in runs.seeds:
        path = run_folder(results, runs, method, "network", seed) / "samples.npz"
        arrays = read_arrays(path, *needed)
        points.append(arrays["x"])
        rewards.append(arrays.get("reward", np.zeros(len(arrays["x"]))))
    return np.concatenate(points), np.concatenate(rewards)


def read_resolution(path: Path) -> float | None:
    """The measured width of the network's resolution, or None if it was not measured. Raises ResultsError if
    the file is malformed."""
    if not path.is_file():
        return None
    try:
        return float(read_json(path)["width"])
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a resolution file ({one_line(error)}); {again(path)}") from None
