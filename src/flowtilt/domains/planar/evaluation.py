"""Metrics of a run on a tail, from numbers alone: importing torch would take longer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowtilt.domains.planar.experiment import tail_experiment
from flowtilt.domains.planar.files import read_density
from flowtilt.domains.planar.rows import reward_metrics, sample_divergence, zone_masses
from flowtilt.metrics.tails import dominance_violation
from flowtilt.pipeline.domain import Job, Run
from flowtilt.pipeline.files import read_arrays, write_rows
from flowtilt.pipeline.health import tilt_metrics, tuned_metrics


def evaluate(job: Job) -> None:
    """Metrics of one run from its samples; the KL divergence against the gridded pretrained density."""
    experiment = tail_experiment(job.experiment)
    x, rewards, bumps, log_density = read_arrays(
        job.outputs["samples"], "x", "reward", "bumps", "log_density"
    )
    kind = job.run.kind
    found = sample_divergence(log_density, read_density(job.read("density")), x[: len(log_density)])
    row = reward_metrics(experiment, kind, rewards, None, 0.0 if kind == "pretrained" else found["kl"])
    row["floored_mass"] = found["floored_mass"]
    row |= zone_masses(experiment, x[:, 0], bumps, np.full(len(x), 1 / len(x)))
    row |= tuned_metrics(job)
    if (reference := reference_of(job.run)) is not None:
        (pretrained_rewards,) = read_arrays(reference, "reward")
        row["dominance_violation"] = dominance_violation(rewards, pretrained_rewards)
        if kind in ("am", "tfft"):
            row |= tilt_metrics(job, rewards, reference)
    write_rows({job.method: row}, job.outputs["metrics"])


def reference_of(run: Run) -> Path | None:
    """Samples of the pretrained model that a run is compared with, if the experiment has it as a method."""
    compared = run.kind != "pretrained" and "pretrained" in run.experiment.methods
    return Path(run.file_of("pretrained", "samples.npz")) if compared else None
