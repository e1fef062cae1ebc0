"""The stage that measures the experiments on functionals: networks, and what is solved on the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowtilt.checkpoints import load_weights
from flowtilt.configuration import ConfigError
from flowtilt.domains.planar.build import build_model
from flowtilt.domains.planar.laws import (
    Cloud,
    critic_metrics,
    grid_problem,
    network_grid_metrics,
    sample_metrics,
    solved_rows,
)
from flowtilt.domains.planar.rows import GriddedDensity, Metrics
from flowtilt.domains.planar.truth import gridded_density
from flowtilt.experiment import Experiment, FunctionalExperiment, method_of
from flowtilt.measurements import row_name
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
    laws: Path,
    history: Path | None = None,
    reference: Path | None = None,
    threshold_file: Path | None = None,
) -> None:
    """Sample a run and measure it, and solve its problem on the grid: by its own steps, and for the optimum.

    All in one stage, since each takes less time than to start another.

    Args:
        experiment: of the run.
        method: of the run.
        seed: of the run.
        model: weights of the run's model.
        samples: file for the run's samples.
        density_file: gridded log-density of the pretrained model.
        output: JSON file for the metrics of the network's row, and of the rows solved on the grid.
        laws: file for the solved laws.
        history: of the fine-tuning, for the shares of active samples.
        reference: samples of the pretrained model, to measure distances from.
        threshold_file: of tfft.
    """
    experiment = _functional(experiment)
    sample(experiment, method, seed, model, samples)
    density = GriddedDensity(*read_arrays(density_file, "axis", "log_density"))
    problem = grid_problem(experiment, method, density)
    own = density
    if method_of(experiment, method).kind != "pretrained":
        own = gridded_density(load_weights(build_model(experiment), model), experiment)
    row = network_grid_metrics(problem, own) | _sample_row(
        experiment, method, seed, samples, density, reference
    )
    if history is not None:
        row |= activity(read_history(history, "active_share"))
    if threshold_file is not None:
        row |= read_threshold(threshold_file)
    solved = {row_name(method, at): it for at, it in solved_rows(experiment, method, problem).items()}
    cells = {name: problem.cells(it.log_p).astype(np.float32) for name, it in solved.items()}
    write_arrays(laws, axis=problem.grid.axis, **cells)
    write_rows({method: row} | {name: it.metrics for name, it in solved.items()}, output)


def _sample_row(
    experiment: FunctionalExperiment,
    method: str,
    seed: int,
    samples: Path,
    density: GriddedDensity,
    reference: Path | None,
) -> Metrics:
    """Metrics of a run's samples, and by critics of their distance from the pretrained model's."""
    names = ["x", "log_density", *(["mode"] if experiment.data.modes else [])]
    cloud = Cloud.of_samples(*read_arrays(samples, *names))
    rewards = None if experiment.reward is None else read_arrays(samples, "reward")[0]
    if reference is None or experiment.evaluation.transport is None:
        return sample_metrics(experiment, cloud, rewards, None, density)
    others = Cloud.of_samples(*read_arrays(reference, *names))
    critics = critic_metrics(
        experiment, cloud, others, seed_of(experiment.name, method, "critic", seed) % 2**31
    )
    return sample_metrics(experiment, cloud, rewards, others, density) | critics
