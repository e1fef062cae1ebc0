"""The landscapes' one free constant: where the right zone begins.

Neither paper says how much of the pretrained density overlaps the stripes or the spikes. That
overlap is what the papers' pretrained rows measure, so the edge of the right zone is placed where
the tail mean of the *data's* density, on the grid, equals the pretrained row. No model and no
method is run.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import brentq

from flowtilt.domains.planar.build import build_data, build_reward
from flowtilt.domains.planar.experiment import TailExperiment, tail_experiment
from flowtilt.domains.planar.grid import normalise
from flowtilt.domains.planar.truth import build_grid
from flowtilt.metrics.tails import tail_mean
from flowtilt.pipeline.configuration import ConfigError


def calibrated_edge(experiment: TailExperiment) -> float:
    """The right edge at which the data's tail mean is the calibration target, to 1e-5. Raises ConfigError if
    the target is not attained between the two ends of the bracket."""
    grid, reward = build_grid(experiment), build_reward(experiment)
    probabilities = np.exp(normalise(build_data(experiment).log_density(grid.points)))
    mass, tail = experiment.objective.mass, experiment.objective.tail
    target = experiment.reward.sign * experiment.calibration.target

    def excess(edge: float) -> float:
        moved = dataclasses.replace(reward, right_edge=edge)
        return tail_mean(grid.rewards(moved), mass, tail, probabilities) - target

    low, high = experiment.calibration.bracket
    if excess(low) * excess(high) > 0:
        raise ConfigError(
            f"experiment {experiment.name}: key calibration.bracket: no right edge in [{low}, {high}] "
            f"gives the target {experiment.calibration.target}; widen the bracket"
        )
    return float(brentq(excess, low, high, xtol=1e-5))


if __name__ == "__main__":
    import sys

    from flowtilt.pipeline.experiment import load_resolved

    for file in sys.argv[1:]:
        print(f"{file}: right_edge: {calibrated_edge(tail_experiment(load_resolved(file))):.5f}")
