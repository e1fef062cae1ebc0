"""The jobs of experiments in the plane, by stage; their files are those of the domain's stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowtilt.domains.planar import am_runs
from flowtilt.pipeline.domain import Job


def pretrain(job: Job) -> None:
    from flowtilt.domains.planar.training import pretrain

    progress = job.bar(job.experiment.pretrain.updates, "pretrain")
    pretrain(job.experiment, job.seed, job.outputs["model"], job.outputs["history"], progress)


def density(job: Job) -> None:
    from flowtilt.domains.planar.solving import density

    density(job.experiment, job.read("model"), job.outputs["density"])


def measure(job: Job) -> None:
    from flowtilt.domains.planar.measuring import measure

    measure(job.experiments, job.seed, job.results)


def measure_resolution(job: Job) -> None:
    from flowtilt.domains.planar.solving import measure_resolution

    runs: list[Any] = [run for experiment in job.experiments for run in am_runs(str(job.results), experiment)]
    files = ((Path(run.file("samples.npz")), Path(run.pretrained("density.npz"))) for run in runs)
    measure_resolution(
        ((run.experiment, *both) for run, both in zip(runs, files, strict=True)), job.outputs["resolution"]
    )


def exact(job: Job) -> None:
    from flowtilt.domains.planar.solving import Solved, exact

    out = job.outputs
    solutions = (
        Solved(out["metrics"], out["distributions"]),
        Solved(out["resolved_metrics"], out["resolved_distributions"], job.read("resolution")),
    )
    exact(job.experiment, job.read("density"), *solutions)
