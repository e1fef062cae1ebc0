"""The stage that measures the experiments on functionals: networks, and what is solved on the grid."""

from __future__ import annotations

from collections.abc import Sequence
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
from flowtilt.experiment import Experiment, FunctionalExperiment
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


def measure(experiments: Sequence[Experiment], seed: int, results: Path) -> None:
    """Sample and measure all runs of some experiments for one seed, and solve their problems on the grid.

    All in one stage, since each takes less time than to start another. Every run's folder gets its
    ``samples.npz``, its ``metrics.json`` (of the network's row, and of the rows solved on the grid: by the
    method's own steps, and the optimum), and the solved laws, ``laws.npz``.

    Args:
        experiments: on functionals, whose models are trained.
        seed: of the runs.
        results: root of the results.

    Raises:
        ConfigError: if an experiment is not on a functional.
    """
    for experiment in map(_functional, experiments):
        # The pretrained model first: distances are measured from its samples.
        for method, _ in sorted(experiment.methods.items(), key=lambda item: item[1].kind != "pretrained"):
            _measure_run(experiment, method, seed, results / "runs")


def _measure_run(experiment: FunctionalExperiment, method: str, seed: int, runs: Path) -> None:
    kind = experiment.methods[method].kind
    folder = runs / experiment.name / method / f"seed{seed}"
    base = runs / experiment.base / "pretrained" / f"seed{seed}"
    model = (base if kind == "pretrained" else folder) / "model.safetensors"
    sample(experiment, method, seed, model, folder / "samples.npz")
    density = GriddedDensity(*read_arrays(base / "density.npz", "axis", "log_density"))
    problem = grid_problem(experiment, method, density)
    own, reference = density, None
    if kind != "pretrained":
        own = gridded_density(load_weights(build_model(experiment), model), experiment)
        if "pretrained" in experiment.methods:
            reference = runs / experiment.name / "pretrained" / f"seed{seed}" / "samples.npz"
    row = network_grid_metrics(problem, own)
    row |= _sample_row(experiment, method, seed, folder / "samples.npz", density, reference)
    if kind != "pretrained":
        row |= activity(read_history(folder / "history.csv", "active_share"))
    if kind == "tfft":
        row |= read_threshold(folder / "threshold.json")
    solved = {row_name(method, at): it for at, it in solved_rows(experiment, method, problem).items()}
    cells = {name: problem.cells(it.log_p).astype(np.float32) for name, it in solved.items()}
    write_arrays(folder / "laws.npz", axis=problem.grid.axis, **cells)
    write_rows({method: row} | {name: it.metrics for name, it in solved.items()}, folder / "metrics.json")


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
