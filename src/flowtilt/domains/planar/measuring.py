"""The stage that measures many small runs together."""

from __future__ import annotations

from flowtilt.domains.planar import STAGES
from flowtilt.domains.planar.evaluation import evaluate
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.functionals import measure_run
from flowtilt.domains.planar.training import sample
from flowtilt.pipeline.domain import Job, Run, run_job


def measure(job: Job) -> None:
    """Sample and measure all runs of some experiments for one seed, and solve problems on functionals.

    All in one stage, since each takes less time than to start another. Every run's folder gets its samples
    and its metrics, and on a functional the distributions that were solved on the grid.
    """
    for experiment in job.experiments:
        stage = next(one for one in STAGES if one.name == "measure" and one.of(experiment))
        # The pretrained model first: others are compared with its samples.
        for method, _ in sorted(experiment.methods.items(), key=lambda item: item[1].kind != "pretrained"):
            each = run_job(stage, Run(str(job.results), experiment, method, job.seed))
            sample(each)
            (measure_run if isinstance(experiment, FunctionalExperiment) else evaluate)(each)
