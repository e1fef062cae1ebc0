"""The stage that solves TFFT's dual, for every domain; it only reads numbers, and needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowtilt import thresholds
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import StageError, read_arrays, write_json
from flowtilt.tilts import LEAST, Groups
from flowtilt.words import read_tail


def threshold(job: Job) -> None:
    """Solve TFFT's dual on the rewards of the offline batch; those that failed are left out and counted.

    The tilt has a normaliser in each context; those with few samples are taken together with their
    neighbours in number, and their samples counted (see :meth:`flowtilt.tilts.Groups.of`).

    For a method whose tail narrows, the file has its mass and threshold at every update too; for one whose
    threshold is given, that one, and the dual's beside it.

    Raises:
        StageError: if no sample of the batch has a reward.
    """
    experiment, method = job.experiment, job.method
    batch = job.read("offline")
    every, contexts = read_arrays(batch, "reward", "context")
    every = every.astype(np.float64)
    rewards = every[~np.isnan(every)]
    if not rewards.size:
        raise StageError(f"{batch}: no sample of the batch has a reward; look at the pretrained model")
    problem = experiment.tail_of(method)
    groups = Groups.of(contexts, np.arange(len(every)), LEAST)

    def solve(mass: float) -> float:
        if mass == 1:  # the mean: the hinge bends beyond all rewards
            return float(rewards.min() if read_tail(problem.tail) == "upper" else rewards.max())
        return thresholds.threshold(every, problem.alpha, mass, problem.tail, contexts=groups.labels)

    given = experiment.threshold_of(method)
    at = solve(problem.mass) if given is None else given
    row: dict[str, Any] = {
        "threshold": at,
        "offline_active_share": thresholds.active_share(rewards, at, problem.tail),
        "offline_samples": len(rewards),
        "offline_failed": len(every) - len(rewards),
        "offline_pooled": groups.pooled,
    }
    if given is not None:
        row["dual_threshold"] = solve(problem.mass)
    if masses := experiment.masses_of(method):
        row["schedule"] = [{"mass": mass, "threshold": solve(mass)} for mass in masses]
    write_json(row, job.outputs["threshold"])
