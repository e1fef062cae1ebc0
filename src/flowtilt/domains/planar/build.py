"""From the configuration of a planar experiment to its objects."""

from __future__ import annotations

import numpy as np
import torch

from flowtilt.domains.planar.data import GaussianMixture
from flowtilt.domains.planar.grid import Grid
from flowtilt.domains.planar.landscapes import LANDSCAPES, Zones
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.experiment import Experiment, PathConfig
from flowtilt.interpolants import Interpolant, Linear, VariancePreserving
from flowtilt.seeding import seed_of


def build_path(config: PathConfig) -> Interpolant:
    """The interpolant of the configuration."""
    if config.kind == "linear":
        return Linear()
    return VariancePreserving(config.rate_min, config.rate_max)


def build_model(experiment: Experiment, seed: int = 0) -> PlanarFlow:
    """A freshly initialised network; its weights follow from the names and the seed alone."""
    network = experiment.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(experiment.base, "initial weights", seed))
        return PlanarFlow(build_path(experiment.path), network.widths, network.activation, network.prediction)


def build_data(experiment: Experiment) -> GaussianMixture:
    """The data that the model is pretrained on."""
    data = experiment.data
    return GaussianMixture(*(np.array(a) for a in (data.weights, data.means, data.deviations)))


def build_reward(experiment: Experiment) -> Zones:
    """The landscape as a reward (minus the height where heights are costs)."""
    fields = experiment.reward.model_dump()
    return LANDSCAPES[fields.pop("landscape")](**fields)


def build_grid(experiment: Experiment) -> Grid:
    """The fine grid of the exact rows."""
    return Grid(experiment.grid.extent, experiment.grid.cells)
