"""Metrics of a run on a tail, from numbers alone: importing torch would take longer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowtilt.domains.planar.experiment import tail_experiment
from flowtilt.domains.planar.files import read_density
from flowtilt.domains.planar.rows import reward_metrics, sample_divergence, zone_masses
from flowtilt.metrics.tails import dominance_violation
from flowtilt.pipeline.domain import Job, Run
from flowtilt.pipeline.files import Metrics, read_arrays, read_kept, write_rows
from flowtilt.pipeline.health import tilt_metrics, tuned_metrics


def evaluate(job: Job) -> None:
    """Metrics of one run from its samples; the KL divergence against the gridded pretrained density, and of
    samples that were kept as their method has it."""
    experiment, kind = tail_experiment(job.experiment), job.run.kind
    x, rewards, bumps = read_arrays(job.outputs["samples"], "x", "reward", "bumps")
    found = _divergence(job, x)
    goal, kl = experiment.goal_of(job.method), 0.0 if kind == "pretrained" else found["kl"]
    row = reward_metrics(experiment, goal, rewards, None, kl)
    row["floored_mass"] = found["floored_mass"]
    row |= zone_masses(experiment, x[:, 0], bumps, np.full(len(x), 1 / len(x)))
    row |= tuned_metrics(job)
    if (reference := reference_of(job.run)) is not None:
        (pretrained_rewards,) = read_arrays(reference, "reward")
        row["dominance_violation"] = dominance_violation(rewards, pretrained_rewards)
        if kind in ("am", "tfft"):
            row |= tilt_metrics(job, rewards, reference)
    write_rows({job.method: row}, job.outputs["metrics"])


def _divergence(job: Job, x: np.ndarray) -> Metrics:
    """The divergence from the pretrained density, and the mass where that is a floor."""
    density = read_density(job.read("density"))
    if (kept := job.read_if_any("kept")) is not None:
        return {"kl": read_kept(kept)["kl"], "floored_mass": float(density.floored_at(x).mean())}
    (log_density,) = read_arrays(job.outputs["samples"], "log_density")
    return sample_divergence(log_density, density, x[: len(log_density)])


def reference_of(run: Run) -> Path | None:
    """Samples of the pretrained model that a run is compared with, if the experiment has it as a method."""
    compared = run.kind != "pretrained" and "pretrained" in run.experiment.methods
    return Path(run.file_of("pretrained", "samples.npz")) if compared else None
