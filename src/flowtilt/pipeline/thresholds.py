"""The stage that solves TFFT's dual, for every domain; it only reads numbers, and needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowtilt import thresholds
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import StageError, read_arrays, write_json


def threshold(job: Job) -> None:
    """Solve TFFT's dual on the rewards of the offline batch; those that failed are left out and counted.

    For a method whose tail narrows, the file has its mass and threshold at every update too.

    Raises:
        StageError: if no sample of the batch has a reward.
    """
    experiment, method = job.experiment, job.method
    batch = job.read("offline")
    (every,) = read_arrays(batch, "reward")
    rewards = every[~np.isnan(every)].astype(np.float64)
    if not rewards.size:
        raise StageError(f"{batch}: no sample of the batch has a reward; look at the pretrained model")
    problem = experiment.tail_of(method)
    at = thresholds.threshold(rewards, problem.alpha, problem.mass, problem.tail)
    row: dict[str, Any] = {
        "threshold": at,
        "offline_active_share": thresholds.active_share(rewards, at, problem.tail),
        "offline_samples": len(rewards),
        "offline_failed": len(every) - len(rewards),
    }
    if masses := experiment.masses_of(method):
        found = (thresholds.threshold(rewards, problem.alpha, mass, problem.tail) for mass in masses)
        row["schedule"] = [{"mass": m, "threshold": t} for m, t in zip(masses, found, strict=True)]
    write_json(row, job.outputs["threshold"])
