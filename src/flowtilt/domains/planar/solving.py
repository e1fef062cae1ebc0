"""Stages that solve the truth: gridded densities, exact and resolved rows, the network's resolution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowtilt.checkpoints import load_weights
from flowtilt.domains.planar import am_runs
from flowtilt.domains.planar.build import build_model, build_reward
from flowtilt.domains.planar.experiment import TailExperiment, tail_experiment
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
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import read_arrays, reading, write_arrays, write_json, write_rows

DISTRIBUTION_CELLS = 240
HISTOGRAM_BINS = 120
CELL_PARTS = 4
RESOLUTION_CANDIDATES = tuple(round(0.05 * k, 2) for k in range(17))


def density(job: Job) -> None:
    """Grid the log-density of a pretrained model, above a floor: what divergences are measured from."""
    model = load_weights(build_model(job.experiment), job.read("model"))
    write_density(reference_density(model, job.experiment), job.outputs["density"])


def exact(job: Job) -> None:
    """Solve every method on the grid, exactly and at the measured resolution."""
    problem = TailGrid(tail_experiment(job.experiment), read_density(job.read("density")))
    histogram = RewardHistogram.of(problem)
    for solution in ("", "resolved_"):
        width = _read_resolution(job.read("resolution")) if solution else None
        solved = exact_rows(problem, width)
        write_arrays(
            job.outputs[f"{solution}distributions"], **_distribution_arrays(problem, solved, histogram)
        )
        write_rows(solved.metrics, job.outputs[f"{solution}metrics"])


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
    with reading(path, "not a resolution file", "resolution"):
        return float(read_json(path)["width"])


def measure_resolution(job: Job) -> None:
    """The blur width at which Adjoint Matching's distribution is nearest to what its networks sample.

    Written are the width, and the mean mismatch at every candidate.
    """
    by_experiment: dict[str, tuple[TailExperiment, list[tuple[GriddedDensity, np.ndarray]]]] = {}
    for run in (run for experiment in job.experiments for run in am_runs(str(job.results), experiment)):
        (x,) = read_arrays(Path(run.file("samples.npz")), "x")
        gridded = read_density(Path(run.pretrained("density.npz")))
        own = by_experiment.setdefault(run.experiment.name, (tail_experiment(run.experiment), []))
        own[1].append((gridded, x))
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
    write_json(result, job.outputs["resolution"])
