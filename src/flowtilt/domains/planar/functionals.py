"""What is measured of a run on a functional: its network, and what is solved on the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowtilt.checkpoints import load_weights
from flowtilt.domains.planar.build import build_model
from flowtilt.domains.planar.distributions import (
    Cloud,
    critic_metrics,
    grid_problem,
    network_grid_metrics,
    sample_metrics,
    solved_rows,
)
from flowtilt.domains.planar.evaluation import activity
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.files import RunFiles, read_density
from flowtilt.domains.planar.rows import Metrics
from flowtilt.domains.planar.training import sample
from flowtilt.domains.planar.truth import gridded_density
from flowtilt.pipeline.files import (
    read_arrays,
    read_history,
    read_threshold,
    write_arrays,
    write_rows,
)
from flowtilt.pipeline.report.measurements import row_name
from flowtilt.seeding import seed_of


def measure_run(experiment: FunctionalExperiment, method: str, seed: int, run: RunFiles) -> None:
    """Sample and measure one run, and solve its problem on the grid.

    Its metrics are of the network's row, and of the rows that are solved: by the method's own steps, and the
    optimum.
    """
    kind = experiment.methods[method].kind
    sample(experiment, method, seed, run.model, run.samples)
    density = read_density(run.density)
    problem = grid_problem(experiment, method, density)
    own = density
    if kind != "pretrained":
        own = gridded_density(load_weights(build_model(experiment), run.model), experiment)
    row = network_grid_metrics(problem, own)
    row |= _sample_row(experiment, method, seed, run.samples, run.reference)
    if run.history is not None:
        row |= activity(read_history(run.history, "active_share"))
    if run.threshold is not None:
        row |= read_threshold(run.threshold)
    solved = {row_name(method, at): it for at, it in solved_rows(experiment, method, problem).items()}
    cells = {name: problem.cells(it.log_p).astype(np.float32) for name, it in solved.items()}
    write_arrays(run.distributions, axis=problem.grid.axis, **cells)
    write_rows({method: row} | {name: it.metrics for name, it in solved.items()}, run.metrics)


def _sample_row(
    experiment: FunctionalExperiment,
    method: str,
    seed: int,
    samples: Path,
    reference: Path | None,
) -> Metrics:
    """Metrics of a run's samples, and by critics of their distance from the pretrained model's."""
    names = ["x", "log_density", *(["mode"] if experiment.data.modes else [])]
    cloud = Cloud.of_samples(*read_arrays(samples, *names))
    rewards = None if experiment.reward is None else read_arrays(samples, "reward")[0]
    if reference is None or experiment.evaluation.transport is None:
        return sample_metrics(experiment, cloud, rewards, None)
    others = Cloud.of_samples(*read_arrays(reference, *names))
    critics = critic_metrics(
        experiment, cloud, others, seed_of(experiment.name, method, "critic", seed) % 2**31
    )
    return sample_metrics(experiment, cloud, rewards, others) | critics
