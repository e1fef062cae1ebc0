"""The metrics of a run on molecules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from flowtilt.domains.molecules.experiment import MoleculeExperiment, tail_metric
from flowtilt.metrics.tails import upper_tail_mean
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import Metrics, read_arrays, read_columns, write_arrays, write_rows
from flowtilt.pipeline.health import tilt_metrics, tuned_metrics

MASSES = (0.5, 0.2, 0.1, 0.05, 0.002)
"""Of the tails that every run reports, beside those of its experiment."""


def evaluate(job: Job) -> None:
    """Metrics of a run from its molecules, the molecules themselves as SDF, and their energies.

    No SDF can hold some of the molecules; the others are in it in their order. The energies are ``reward``
    (molecules,), NaN for failures, ``valid`` and the number of ``atoms`` (molecules,), and ``relaxed``, what
    the first molecules gained by relaxation, in hartree.
    """
    from flowtilt.domains.molecules import sdf as sdfs
    from flowtilt.domains.molecules.assessment import assess, assess_relaxation, composition
    from flowtilt.domains.molecules.chemistry import canonical_set, perceive
    from flowtilt.domains.molecules.data import load
    from flowtilt.domains.molecules.energies import molecules_of, single_points
    from flowtilt.domains.molecules.relaxation import RelaxationSettings, relax
    from flowtilt.domains.molecules.workers import WorkerPool
    from flowtilt.domains.molecules.xtb import XTBSettings

    experiment = job.experiment
    own = molecules_of(*read_arrays(job.read("samples"), "coordinates", "numbers"))
    settings = XTBSettings(**experiment.reward.calculation)
    subset = experiment.subset
    train = load(job.read("molecules")).of_size(subset.smallest, subset.largest).of_split("train")
    with WorkerPool(job.workers) as pool:
        points = single_points(own, settings, pool)
        structures = perceive(own, pool=pool)
        known = canonical_set(train.smiles.tolist(), pool)
        relaxed = relax(own[: experiment.evaluation.relaxed], RelaxationSettings(xtb=settings), pool)
    rewards = -np.array([point.energy for point in points])
    failures = [point.failure for point in points]
    assessed = assess(own, rewards, failures, structures, known, composition(train.as_molecules()))
    row: Metrics = named(assessed | assess_relaxation(relaxed)) | tails(experiment, rewards)
    row |= tuned_metrics(job)
    if (history := job.read_if_any("history")) is not None:
        row |= energies_in_training(read_columns(history, "evaluated", "failed"))
    row |= tilt_metrics(job, rewards, job.read_if_any("reference"), "atoms")
    write_rows({job.method: row}, job.outputs["metrics"])
    valid = np.array([structure.invalid is None for structure in structures])
    gains = np.array([one.gain if one.converged else math.nan for one in relaxed])
    atoms = np.array([len(molecule.numbers) for molecule in own])
    write_arrays(job.outputs["energies"], reward=rewards, valid=valid, relaxed=gains, atoms=atoms)
    held = [i for i, molecule in enumerate(own) if sdfs.holds(molecule)]
    properties = [sdfs.describe(points[i], structures[i]) | {"sample": str(i)} for i in held]
    sdfs.write_sdf(job.outputs["sdf"], [own[i] for i in held], [structures[i] for i in held], properties)


NAMES = {
    "reward_mean": "mean_negative_energy",
    "reward_best_10_percent": "top_10pct_negative_energy",
    "reward_best_0.2_percent": "top_0.2pct_negative_energy",
    "reward_molecules": "with_energy",
    "valid_reward_mean": "valid_mean_negative_energy",
    "valid_reward_best_10_percent": "valid_top_10pct_negative_energy",
    "valid_reward_best_0.2_percent": "valid_top_0.2pct_negative_energy",
    "valid_reward_molecules": "valid_with_energy",
}
"""What the tables and the papers' values call the metrics of an assessment."""

SHARES = ("converged", "validity", "uniqueness", "uniqueness_of_1000", "novelty")
"""Metrics of an assessment that become percentages."""


def named(assessed: dict[str, float]) -> Metrics:
    """Metrics under the names of the tables; what is undefined is None."""
    found: Metrics = {}
    for key, value in assessed.items():
        name = f"{key}_pct" if key in SHARES else NAMES.get(key, key)
        found[name] = (100 * value if key in SHARES else value) if math.isfinite(value) else None
    return found


def tails(experiment: MoleculeExperiment, rewards: np.ndarray) -> Metrics:
    """Means of the best shares of all masses, over the molecules that have an energy."""
    masses = {experiment.objective.mass, *MASSES}
    masses |= {experiment.mass_of(m) for m, c in experiment.methods.items() if c.kind in ("fdc", "tfft")}
    kept = rewards[~np.isnan(rewards)]
    return {
        tail_metric(mass): upper_tail_mean(kept, mass) if kept.size else None
        for mass in sorted(masses, reverse=True)
    }


def energies_in_training(history: Mapping[str, np.ndarray]) -> Metrics:
    """How many energies a fine-tuning took, and the share of them that failed."""
    evaluated = float(history["evaluated"].sum())
    failed = float(history["failed"].sum() / max(1.0, evaluated))
    return {"training_energies": evaluated, "training_failed_share": failed}
