"""The path and the times of the memoryless process that solvers of experiments in the plane follow."""

from __future__ import annotations

from flowtilt.domains.planar.build import build_path
from flowtilt.domains.planar.experiment import PlanarExperiment
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.interpolants import Interpolant, time_grid


def process(experiment: PlanarExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...], float]:
    """The path of an experiment's solver, its times, and the data variance of its steps."""
    return build_path(experiment.path), tuple(time_grid(steps)), PlanarFlow.data_variance
