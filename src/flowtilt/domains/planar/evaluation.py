"""Stages that only read numbers: thresholds and metrics of tails. Importing torch would take longer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowtilt.domains.planar.experiment import PlanarExperiment, tail_experiment
from flowtilt.domains.planar.files import read_density
from flowtilt.domains.planar.rows import Metrics, reward_metrics, sample_divergence, zone_masses
from flowtilt.metrics.tails import dominance_violation
from flowtilt.pipeline.experiment import method_of
from flowtilt.pipeline.files import read_arrays, read_history, read_threshold, write_rows


def evaluate(
    experiment: PlanarExperiment,
    method: str,
    samples: Path,
    density_file: Path,
    output: Path,
    history: Path | None = None,
    threshold_file: Path | None = None,
    reference: Path | None = None,
) -> None:
    """Metrics of one run from its samples; the KL divergence against the gridded pretrained density.

    Args:
        experiment: of the run.
        method: of the run.
        samples: of the run.
        density_file: gridded log-density of the pretrained model.
        output: JSON file to write.
        history: of the fine-tuning, for the shares of active samples.
        threshold_file: of tfft.
        reference: samples of the pretrained model, to measure dominance over.
    """
    experiment = tail_experiment(experiment)
    x, rewards, bumps, log_density = read_arrays(samples, "x", "reward", "bumps", "log_density")
    kind = method_of(experiment, method).kind
    found = sample_divergence(log_density, read_density(density_file), x[: len(log_density)])
    row = reward_metrics(experiment, kind, rewards, None, 0.0 if kind == "pretrained" else found["kl"])
    row["floored_mass"] = found["floored_mass"]
    row |= zone_masses(experiment, x[:, 0], bumps, np.full(len(x), 1 / len(x)))
    if history is not None:
        row |= activity(read_history(history, "active_share"))
    if threshold_file is not None:
        row |= read_threshold(threshold_file)
    if reference is not None:
        (pretrained_rewards,) = read_arrays(reference, "reward")
        row["dominance_violation"] = dominance_violation(rewards, pretrained_rewards)
    write_rows({method: row}, output)


def activity(shares: np.ndarray) -> Metrics:
    """Shares of training endpoints with a gradient: over the run, and over its last fifth."""
    return {
        "active_share": float(shares.mean()),
        "active_share_final": float(shares[-max(1, len(shares) // 5) :].mean()),
    }
