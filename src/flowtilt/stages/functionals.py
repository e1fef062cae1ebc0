"""Stages of the experiments on functionals: metrics of a run, and rows solved on the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowtilt.checkpoints import load_weights
from flowtilt.domains.planar.build import build_model
from flowtilt.domains.planar.laws import (
    Cloud,
    critic_metrics,
    grid_problem,
    network_grid_metrics,
    sample_metrics,
    solved_rows,
)
from flowtilt.domains.planar.rows import GriddedDensity
from flowtilt.domains.planar.truth import gridded_density
from flowtilt.experiment import ConfigError, Experiment, FunctionalExperiment, method_of
from flowtilt.seeding import seed_of
from flowtilt.stages.evaluation import activity
from flowtilt.stages.files import read_arrays, read_history, read_threshold, write_arrays, write_rows
from flowtilt.stages.training import sample


def _functional(experiment: Experiment) -> FunctionalExperiment:
    if not isinstance(experiment, FunctionalExperiment):
        raise ConfigError(
            f"experiment {experiment.name}: this is for experiments on functionals; "
            "key objective must have utility, divergence and alpha"
        )
    return experiment


def measure(
    experiment: Experiment,
    method: str,
    seed: int,
    model: Path,
    samples: Path,
    density_file: Path,
    output: Path,
    history: Path | None = None,
    reference: Path | None = None,
    threshold_file: Path | None = None,
) -> None:
    """Sample a run, and measure it by its samples and by its objective on the grid of the optimum.

    Both in one stage, which takes less time than to start a second one.

    Args:
        experiment: of the run.
        method: of the run.
        seed: of the run.
        model: weights of the run's model.
        samples: file for the run's samples.
        density_file: gridded log-density of the pretrained model.
        output: JSON file to write.
        history: of the fine-tuning, for the shares of active samples.
        reference: samples of the pretrained model, to measure distances from.
        threshold_file: of tfft.
    """
    experiment = _functional(experiment)
    sample(experiment, method, seed, model, samples)
    kind = method_of(experiment, method).kind
    density = GriddedDensity(*read_arrays(density_file, "axis", "log_density"))
    own = density
    if kind != "pretrained":
        own = gridded_density(load_weights(build_model(experiment), model), experiment)
    row = network_grid_metrics(grid_problem(experiment, method, density), own)
    cloud = Cloud.of_samples(*read_arrays(samples, "x", "log_density"))
    rewards = None if experiment.reward is None else read_arrays(samples, "reward")[0]
    others = None
    if reference is not None and experiment.evaluation.transport is not None:
        others = Cloud.of_samples(*read_arrays(reference, "x", "log_density"))
    row |= sample_metrics(experiment, cloud, rewards, others, density)
    if others is not None and kind != "pretrained":
        row |= critic_metrics(
            experiment, cloud, others, seed_of(experiment.name, method, "critic", seed) % 2**31
        )
    if history is not None:
        row |= activity(read_history(history, "active_share"))
    if threshold_file is not None:
        row |= read_threshold(threshold_file)
    write_rows({method: row}, output)


def solve(
    experiment: Experiment,
    density_file: Path,
    output: Path,
    laws: Path,
    optimum_output: Path,
    optimum_laws: Path,
) -> None:
    """Solve every method on the grid: its own steps exactly, and the optimum of its problem."""
    experiment = _functional(experiment)
    rows = solved_rows(experiment, GriddedDensity(*read_arrays(density_file, "axis", "log_density")))
    for layer, metrics_file, laws_file in (
        ("exact", output, laws),
        ("optimum", optimum_output, optimum_laws),
    ):
        solved = rows[layer]
        cells = {row: law.astype(np.float32) for row, law in solved.laws.items()}
        write_arrays(laws_file, axis=solved.grid.axis, **cells)
        write_rows(solved.metrics, metrics_file)
