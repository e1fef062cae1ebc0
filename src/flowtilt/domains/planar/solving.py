"""Stages that solve the truth: gridded densities, exact and resolved rows, the network's resolution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowtilt.checkpoints import load_weights
from flowtilt.domains.planar.build import build_model, build_reward
from flowtilt.domains.planar.experiment import PlanarExperiment, TailExperiment, tail_experiment
from flowtilt.domains.planar.files import read_density, write_density
from flowtilt.domains.planar.rows import GriddedDensity
from flowtilt.domains.planar.truth import (
    ExactRows,
    TailGrid,
    coarsen,
    exact_rows,
    reference_density,
    resolution_mismatch,
)
from flowtilt.files import read_json
from flowtilt.pipeline.files import (
    StageError,
    read_arrays,
    write_arrays,
    write_json,
    write_rows,
)

DISTRIBUTION_CELLS = 240
HISTOGRAM_BINS = 120
CELL_PARTS = 4
RESOLUTION_CANDIDATES = tuple(round(0.05 * k, 2) for k in range(17))


def density(experiment: PlanarExperiment, model: Path, output: Path) -> None:
    """Grid the log-density of a pretrained model, above a floor: what divergences are measured from."""
    write_density(reference_density(load_weights(build_model(experiment), model), experiment), output)


class Solved(NamedTuple):
    """Where the rows of one solution go, and the resolution file that it is solved at, if any."""

    output: Path
    distributions: Path
    resolution: Path | None = None


def exact(experiment: PlanarExperiment, density_file: Path, *solutions: Solved) -> None:
    """Solve every method on the grid, each time exactly or at the measured resolution."""
    density = read_density(density_file)
    problem = TailGrid(tail_experiment(experiment), density)
    histogram = RewardHistogram.of(problem)
    for solution in solutions:
        width = None if solution.resolution is None else _read_resolution(solution.resolution)
        solved = exact_rows(problem, width)
        write_arrays(solution.distributions, **_distribution_arrays(problem, solved, histogram))
        write_rows(solved.metrics, solution.output)


@dataclass(frozen=True)
class RewardHistogram:
    """Bins of the reward, and the bin of several points of each cell, along its diagonal.

    On a flank that one cell spans, the centres alone would leave gaps between the bins.

    Attributes:
        edges: of the bins, rising, (bins + 1,).
        bins: of each cell, one array a point, each (cells^2,).
    """

    edges: np.ndarray
    bins: list[np.ndarray]

    @classmethod
    def of(cls, problem: TailGrid) -> RewardHistogram:
        edges = np.linspace(problem.rewards.min(), problem.rewards.max(), HISTOGRAM_BINS + 1)
        reward, bins = build_reward(problem.experiment), []
        for k in range(CELL_PARTS):
            shift = ((k + 0.5) / CELL_PARTS - 0.5) * problem.grid.spacing
            rewards = problem.grid.rewards(reward, shift).ravel()
            bins.append(np.clip(np.searchsorted(edges, rewards, side="right") - 1, 0, HISTOGRAM_BINS - 1))
        return cls(edges, bins)

    def of_distribution(self, distribution: np.ndarray) -> np.ndarray:
        """Probabilities of the bins under cell probabilities (cells, cells), (bins,)."""
        counts = [np.bincount(bins, distribution.ravel(), minlength=HISTOGRAM_BINS) for bins in self.bins]
        return np.mean(counts, axis=0)


def _distribution_arrays(
    problem: TailGrid, solved: ExactRows, histogram: RewardHistogram
) -> dict[str, np.ndarray]:
    """Coarsened distributions and reward histograms of exact rows."""
    axis, cells = problem.grid.axis, problem.grid.cells
    side = cells // max(1, cells // DISTRIBUTION_CELLS)
    arrays = {"axis": axis[: cells // side * side].reshape(side, -1).mean(1), "reward_edges": histogram.edges}
    for row, distribution in solved.distributions.items():
        arrays[row] = coarsen(distribution, DISTRIBUTION_CELLS).astype(np.float32)
        arrays[f"{row}__rewards"] = histogram.of_distribution(distribution)
    return arrays


def _read_resolution(path: Path) -> float:
    try:
        return float(read_json(path)["width"])
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the resolution stage first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: not a resolution file ({error!r}); delete it and run again") from None


def measure_resolution(runs: Iterable[tuple[PlanarExperiment, Path, Path]], output: Path) -> None:
    """The blur width at which Adjoint Matching's distribution is nearest to what its networks sample.

    Args:
        runs: experiment, samples file and density file of Adjoint Matching runs.
        output: JSON with the width, and the mean mismatch at every candidate.
    """
    by_experiment: dict[str, tuple[TailExperiment, list[tuple[GriddedDensity, np.ndarray]]]] = {}
    for experiment, samples, density_file in runs:
        (x,) = read_arrays(samples, "x")
        gridded = read_density(density_file)
        by_experiment.setdefault(experiment.name, (tail_experiment(experiment), []))[1].append((gridded, x))
    mismatches = np.concatenate(
        [resolution_mismatch(*entry, RESOLUTION_CANDIDATES) for entry in by_experiment.values()]
    )
    mean = mismatches.mean(axis=0)
    result = {
        "width": RESOLUTION_CANDIDATES[int(np.argmin(mean))],
        "candidates": RESOLUTION_CANDIDATES,
        "mismatch": mean.tolist(),
        "runs": len(mismatches),
    }
    write_json(result, output)
