"""The stage that measures many small runs together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowtilt.domains.planar.evaluation import evaluate
from flowtilt.domains.planar.experiment import FunctionalExperiment, PlanarExperiment
from flowtilt.domains.planar.files import RunFiles
from flowtilt.domains.planar.functionals import measure_run
from flowtilt.domains.planar.training import sample


def measure(experiments: Sequence[PlanarExperiment], seed: int, results: Path) -> None:
    """Sample and measure all runs of some experiments for one seed, and solve problems on functionals.

    All in one stage, since each takes less time than to start another. Every run's folder gets its samples
    and its metrics, and on a functional the distributions that were solved on the grid.

    Args:
        experiments: whose models are trained.
        seed: of the runs.
        results: root of the results.
    """
    for experiment in experiments:
        # The pretrained model first: others are compared with its samples.
        for method, _ in sorted(experiment.methods.items(), key=lambda item: item[1].kind != "pretrained"):
            run = RunFiles.of(results, experiment, method, seed)
            if isinstance(experiment, FunctionalExperiment):
                measure_run(experiment, method, seed, run)
            else:
                sample(experiment, method, seed, run.model, run.samples)
                evaluate(
                    experiment,
                    method,
                    run.samples,
                    run.density,
                    run.metrics,
                    run.history,
                    run.threshold,
                    run.reference,
                )
