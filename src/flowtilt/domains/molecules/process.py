"""The path and the times of the memoryless process that solvers of molecules follow."""

from __future__ import annotations

from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.domains.molecules.model import MoleculeFlow
from flowtilt.interpolants import Interpolant, Linear, time_grid


def process(experiment: MoleculeExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...], float]:
    """The path of the coordinates, the times, and the data variance of the steps."""
    return Linear(), tuple(time_grid(steps, experiment.time_power)), MoleculeFlow.data_variance
