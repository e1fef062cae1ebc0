"""Made-up results in the layout of real ones, for tests of tables and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowtilt.domains.planar.grid import (
    Grid,
    expected_reward_tilt,
    gaussian_blur,
    no_blur,
    normalise,
    tail_tilt,
)
from flowtilt.domains.planar.truth import coarsen
from flowtilt.functionals.utilities import Tail
from flowtilt.metrics.tails import upper_tail_mean
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.files import write_history
from flowtilt.pipeline.report.measurements import Method, Runs, row_name, run_folder, runs_of

METHODS = (
    Method("pretrained", "pretrained"),
    Method("am", "am"),
    Method("fdc", "fdc"),
    Method("tfft", "tfft"),
)


def made_up_runs(name: str = "risk_averse_2d", unit: str = "cost", **changes: Any) -> Runs:
    """An experiment of four methods and two seeds."""
    fields: dict[str, Any] = {
        "name": name,
        "methods": METHODS,
        "seeds": (0, 1),
        "unit": unit,
        "mass": 0.01,
        "tail_metric": "worst_1pct_cost" if unit == "cost" else "top_1pct_reward",
        "title": "Risk-averse" if unit == "cost" else "Novelty-seeking",
        "of": name,
    }
    return Runs(**(fields | changes))


def write_metrics(
    results: Path, runs: Runs, value: Callable[[str, str, int], Mapping[str, float | None]]
) -> None:
    """Write all metrics files of an experiment; ``value`` gives those of a method, solution and seed."""
    for seed in runs.seeds:
        files: dict[Path, dict[str, Mapping[str, float | None]]] = {}
        for solution in runs.solutions:
            for method in runs.methods:
                folder = run_folder(results, runs, method.name, solution, seed)
                files.setdefault(folder, {})[row_name(method.name, solution)] = value(
                    method.name, solution, seed
                )
        for folder, rows in files.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").write_text(json.dumps({"rows": rows}))


def plain_metrics(
    runs: Runs, tails: Mapping[str, float]
) -> Callable[[str, str, int], dict[str, float | None]]:
    """Metrics with the tails given by row name, and seeds that differ by one; the rest follows."""

    def value(method: str, solution: str, seed: int) -> dict[str, float | None]:
        tail = tails[row_name(method, solution)] + seed
        return {
            runs.mean_metric: tail / 2,
            runs.tail_metric: tail,
            "kl": 0.5,
            "objective": runs.sign * tail - 10,
            "tail_objective": runs.sign * tail - 10,
            "active_share": 0.25 if solution == "network" and method != "pretrained" else None,
        }

    return value


def functional_metrics(method: str, solution: str, seed: int) -> dict[str, float | None]:
    """Metrics of a row of an experiment on functionals: networks close 80 % of the gap, exact rows 95 %."""
    reached = {"network": 8.0, "exact": 9.5, "optimum": 10.0}[solution] + seed
    before = {} if solution == "network" else {"functional_before": float(seed)}
    return {"functional": reached, "mean_reward": 33.0 + seed, "kl": 0.5, **before}


def write_histories(results: Path, experiment: Experiment) -> None:
    """Histories of all networks: each solve has two updates, and takes 1000 passes an update and 2 seconds.

    Those of weighted fitting have banks that are worth less at each solve.
    """
    for name, method in experiment.methods.items():
        weighted = experiment.solver_of(name).kind == "weighted_fitting"
        for seed in experiment.seeds if method.kind != "pretrained" else []:
            rows = []
            for solve in range(method.iterations or 1):
                bank = {
                    "effective_sample_size": 900.0 - 100 * solve - seed,
                    "relative_gap": 1e-9 * (solve + 1),
                }
                rows += [
                    {
                        **({"iteration": solve + 1} if method.kind == "fdc" else {}),
                        "update": update,
                        "network_passes": 1000 * (update + 1),
                        "seconds": 1.0 + update,
                        **(bank if weighted else {}),
                    }
                    for update in (0, 1)
                ]
            folder = run_folder(results, runs_of(experiment), name, "network", seed)
            folder.mkdir(parents=True, exist_ok=True)
            write_history(rows, folder / "history.csv")


def write_functional_arrays(results: Path, runs: Runs, cells: int, samples: int) -> None:
    """Samples and distributions of an experiment on functionals: the same standard normal in every row."""
    axis = -4 + 8 / cells * (np.arange(cells) + 0.5)
    distribution = np.exp(-0.5 * axis**2)
    distribution = np.outer(distribution, distribution) / distribution.sum() ** 2
    write_metrics(results, runs, functional_metrics)
    for seed in runs.seeds:
        for method in runs.methods:
            rows = {
                row_name(method.name, solution): distribution.astype(np.float32)
                for solution in runs.solutions[1:]
            }
            np.savez(
                run_folder(results, runs, method.name, "", seed) / "distributions.npz", axis=axis, **rows
            )
            x = np.random.default_rng(seed).normal(size=(samples, 2)).astype(np.float32)
            path = run_folder(results, runs, method.name, "network", seed) / "samples.npz"
            np.savez(path, x=x, log_density=np.zeros(10))


def write_arrays(
    results: Path,
    runs: Runs,
    height: Callable[[np.ndarray], np.ndarray],
    cells: int,
    samples: int,
    blur: float = 0.25,
    alpha: float = 20.0,
) -> None:
    """Write samples and distributions that are shaped like real ones, with metrics that belong to them.

    The pretrained distribution is a mixture of two Gaussians along y; the networks draw from the
    distributions at finite resolution.
    """
    grid = Grid(5.0, cells)
    points = grid.points.reshape(-1, 2)
    heights = np.asarray(height(points)).reshape(cells, cells)
    rewards = runs.sign * heights
    modes = [np.exp(-((points[:, 1] - m) ** 2) / (2 * 0.6**2)) for m in (-1.0, 1.0)]
    log_p = normalise((np.log(sum(modes)) - points[:, 0] ** 2 / 2).reshape(cells, cells))
    tail: Tail = "lower" if runs.sign < 0 else "upper"
    block = cells // min(cells, 240)
    axis = grid.axis.reshape(-1, block).mean(axis=1)
    edges = np.linspace(rewards.min(), rewards.max() + 1e-9, 121)
    distributions: dict[str, np.ndarray] = {}
    for solution, smooth in (("exact", no_blur), ("resolved", gaussian_blur(blur, grid))):
        best = tail_tilt(log_p, rewards, alpha / runs.mass, runs.mass, tail, smooth)[0]
        tilted = {"pretrained": log_p, "am": expected_reward_tilt(log_p, rewards, alpha, smooth)}
        distributions |= {row_name(m.name, solution): np.exp(tilted.get(m.name, best)) for m in runs.methods}
    histograms = {row: np.zeros(len(edges) - 1) for row in distributions}
    for part in range(32):  # inside the cells, along their diagonal
        shift = ((part + 0.5) / 32 - 0.5) * grid.spacing
        shifted = np.clip(runs.sign * np.asarray(height(points + shift)), edges[0], edges[-1])
        for row, distribution in distributions.items():
            histograms[row] += np.histogram(shifted, edges, weights=distribution.ravel() / 32)[0]
    tails = {
        row: upper_tail_mean(heights, runs.mass, distribution) for row, distribution in distributions.items()
    }
    tails |= {m.name: tails[row_name(m.name, "resolved")] for m in runs.methods}
    write_metrics(results, runs, plain_metrics(runs, tails))
    for seed in runs.seeds:
        for solution in ("exact", "resolved"):
            arrays: dict[str, Any] = {"axis": axis, "reward_edges": edges}
            for method in runs.methods:
                row = row_name(method.name, solution)
                arrays[row] = coarsen(distributions[row], 240).astype(np.float32)
                arrays[f"{row}__rewards"] = histograms[row]
            np.savez(run_folder(results, runs, "", solution, seed) / "distributions.npz", **arrays)
        random = np.random.default_rng(seed)
        for method in runs.methods:
            cell = distributions[row_name(method.name, "resolved")].ravel()
            drawn = points[random.choice(cell.size, samples, p=cell / cell.sum())]
            x = drawn + random.uniform(-0.5, 0.5, drawn.shape) * grid.spacing
            reward = runs.sign * np.asarray(height(x))
            path = run_folder(results, runs, method.name, "network", seed) / "samples.npz"
            np.savez(path, x=x.astype(np.float32), reward=reward, log_density=np.zeros(10))
