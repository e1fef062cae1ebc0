"""The path and the times of the memoryless process that solvers of images follow."""

from __future__ import annotations

from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.schedule import stable_diffusion
from flowtilt.interpolants import Interpolant


def process(experiment: ImageExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...], float]:
    """On Stable Diffusion's noise schedule, which the embedded models have as well, with the changes made."""
    asked = experiment.schedule
    path = stable_diffusion(asked.betas, asked.zero_terminal_snr)
    return path, tuple(path.grid(steps, asked.spacing, offset=1)), 0.0
