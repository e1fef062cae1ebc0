"""What is measured of a run on a functional: its network, and what is solved on the grid."""

from __future__ import annotations

import numpy as np

from flowtilt.checkpoints import load_weights
from flowtilt.domains.planar.build import build_model
from flowtilt.domains.planar.distributions import (
    Cloud,
    critic_metrics,
    grid_optimum,
    grid_problem,
    network_grid_metrics,
    sample_metrics,
    solved_rows,
)
from flowtilt.domains.planar.evaluation import reference_of
from flowtilt.domains.planar.files import read_density
from flowtilt.domains.planar.rows import GriddedDensity, Metrics
from flowtilt.domains.planar.truth import gridded_density
from flowtilt.metrics.transport import sliced_wasserstein
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import read_arrays, write_arrays, write_rows
from flowtilt.pipeline.health import tuned_metrics
from flowtilt.pipeline.report.measurements import row_name
from flowtilt.seeding import seed_of


def measure_run(job: Job) -> None:
    """Measure a run that was sampled, and solve its problem on the grid. Its metrics are of the network's
    row, and of the rows that are solved: by the method's own steps, and the optimum."""
    experiment, method = job.experiment, job.method
    density = read_density(job.read("density"))
    problem = grid_problem(experiment, method, density)
    own = density
    if (weights := job.read_if_any("model")) is not None:
        own = gridded_density(load_weights(build_model(experiment), weights), experiment)
    row = network_grid_metrics(problem, own) | _sample_row(job) | tuned_metrics(job)
    solved = {row_name(method, at): it for at, it in solved_rows(experiment, method, problem).items()}
    cells = {name: problem.cells(it.log_p).astype(np.float32) for name, it in solved.items()}
    write_arrays(job.outputs["distributions"], axis=problem.grid.axis, **cells)
    rows = {method: row} | {name: it.metrics for name, it in solved.items()}
    if (sliced := experiment.evaluation.sliced) is not None:
        clouds = {name: problem.cloud(it.log_p) for name, it in solved.items()}
        clouds[method] = Cloud.of_samples(*read_arrays(job.outputs["samples"], "x", "log_density"))
        for metric, optimum in _targets(job, density, clouds.get(row_name(method, "optimum"))).items():
            for name, cloud in clouds.items():
                of = (cloud.points, optimum.points, cloud.weights, optimum.weights)
                rows[name] = {**rows[name], metric: sliced_wasserstein(*of, sliced.directions)}
    write_rows(rows, job.outputs["metrics"])


def _targets(job: Job, density: GriddedDensity, own: Cloud | None) -> dict[str, Cloud]:
    """By metric, the optimum of the experiment's objective, and the method's if its objective is another."""
    experiment = job.experiment
    if own is not None and experiment.problem_of(job.method) == experiment.objective:
        return {"sliced_w2": own}
    problem = grid_problem(experiment, "pretrained", density)
    shared = {"sliced_w2": problem.cloud(grid_optimum(experiment, problem).log_p)}
    return shared if own is None else {**shared, "sliced_w2_own": own}


def _sample_row(job: Job) -> Metrics:
    """Metrics of a run's samples, and by critics of their distance from the pretrained model's."""
    experiment, samples, reference = job.experiment, job.outputs["samples"], reference_of(job.run)
    names = ["x", "log_density", *(["mode"] if experiment.data.modes else [])]
    cloud = Cloud.of_samples(*read_arrays(samples, *names))
    rewards = None if experiment.reward is None else read_arrays(samples, "reward")[0]
    if reference is None or experiment.evaluation.transport is None:
        return sample_metrics(experiment, cloud, rewards, None)
    others = Cloud.of_samples(*read_arrays(reference, *names))
    seed = seed_of(experiment.name, job.method, "critic", job.seed) % 2**31
    critics = critic_metrics(experiment, cloud, others, seed)
    return sample_metrics(experiment, cloud, rewards, others) | critics
