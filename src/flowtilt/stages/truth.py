"""Stages that solve the truth: gridded densities, exact and resolved rows, the network's resolution."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flowtilt.checkpoints import load_weights
from flowtilt.domains.planar.build import build_model, build_reward
from flowtilt.domains.planar.rows import GriddedDensity
from flowtilt.domains.planar.truth import ExactRows, coarsen, exact_rows, gridded_density, resolution_mismatch
from flowtilt.experiment import Experiment, TailExperiment, tail_experiment
from flowtilt.stages.files import StageError, read_arrays, write_arrays, write_json, write_rows

LAW_CELLS = 240
HISTOGRAM_BINS = 120
CELL_PARTS = 4
RESOLUTION_CANDIDATES = tuple(round(0.05 * k, 2) for k in range(17))


def density(experiment: Experiment, model: Path, output: Path) -> None:
    """Grid the log-density of a pretrained model."""
    gridded = gridded_density(load_weights(build_model(experiment), model), experiment)
    write_arrays(output, axis=gridded.axis, log_density=gridded.log_density)


def exact(
    experiment: Experiment, density_file: Path, output: Path, laws: Path, resolution_file: Path | None = None
) -> None:
    """Solve every method on the grid, exactly or at the measured resolution."""
    experiment = tail_experiment(experiment)
    width = None if resolution_file is None else _read_resolution(resolution_file)
    solved = exact_rows(experiment, GriddedDensity(*read_arrays(density_file, "axis", "log_density")), width)
    write_arrays(laws, **_law_arrays(experiment, solved))
    write_rows(solved.metrics, output)


def _law_arrays(experiment: TailExperiment, solved: ExactRows) -> dict[str, np.ndarray]:
    """Coarsened laws and reward histograms of exact rows."""
    side = solved.grid.cells // max(1, solved.grid.cells // LAW_CELLS)
    edges = np.linspace(solved.rewards.min(), solved.rewards.max(), HISTOGRAM_BINS + 1)
    arrays = {
        "axis": solved.grid.axis[: solved.grid.cells // side * side].reshape(side, -1).mean(1),
        "reward_edges": edges,
    }
    for row, law in solved.laws.items():
        arrays[row] = coarsen(law, LAW_CELLS).astype(np.float32)
        arrays[f"{row}__rewards"] = np.zeros(HISTOGRAM_BINS)
    reward = build_reward(experiment)
    for k in range(CELL_PARTS):
        # Several points of each cell, along its diagonal: on a flank that one cell spans, the
        # centres alone would leave gaps between the bins.
        shift = ((k + 0.5) / CELL_PARTS - 0.5) * solved.grid.spacing
        inside = np.clip(solved.grid.rewards(reward, shift), edges[0], edges[-1])
        for row, law in solved.laws.items():
            arrays[f"{row}__rewards"] += np.histogram(inside, edges, weights=law / CELL_PARTS)[0]
    return arrays


def _read_resolution(path: Path) -> float:
    try:
        return float(json.loads(path.read_text())["width"])
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the resolution stage first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: not a resolution file ({error!r}); delete it and run again") from None


def measure_resolution(runs: Iterable[tuple[Experiment, Path, Path]], output: Path) -> None:
    """The blur width at which Adjoint Matching's law is nearest to what its networks sample.

    Args:
        runs: experiment, samples file and density file of Adjoint Matching runs.
        output: JSON with the width, and the mean mismatch at every candidate.
    """
    by_experiment: dict[str, tuple[TailExperiment, list[tuple[GriddedDensity, np.ndarray]]]] = {}
    for experiment, samples, density_file in runs:
        (x,) = read_arrays(samples, "x")
        gridded = GriddedDensity(*read_arrays(density_file, "axis", "log_density"))
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
