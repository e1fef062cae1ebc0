"""From the configuration of a planar experiment to its objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from flowtilt.domains.planar.data import GaussianMixture, ModeMixtures
from flowtilt.domains.planar.experiment import (
    FunctionalExperiment,
    PlanarExperiment,
    TailExperiment,
    tail_experiment,
)
from flowtilt.domains.planar.landscapes import LANDSCAPES, SLOPES, Bowl, Zones
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.domains.planar.sections import PathConfig
from flowtilt.functionals.utilities import SQ, CVaR
from flowtilt.interpolants import Interpolant, Linear, VariancePreserving
from flowtilt.loading import imported, message_of
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.rewards import Reward
from flowtilt.seeding import seed_of

Kind = TypeVar("Kind", bound=Reward)


def build_path(config: PathConfig) -> Interpolant:
    """The interpolant of the configuration."""
    if config.kind == "linear":
        return Linear()
    return VariancePreserving(config.rate_min, config.rate_max)


def build_model(experiment: PlanarExperiment, seed: int = 0) -> PlanarFlow:
    """A freshly initialised network; its weights follow from the names and the seed alone."""
    network = experiment.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(experiment.starts_from, "initial weights", seed))
        return PlanarFlow(
            build_path(experiment.path),
            network.widths,
            network.activation,
            network.prediction,
            experiment.data.mode_count,
        )


def build_data(experiment: PlanarExperiment) -> GaussianMixture | ModeMixtures:
    """The data that the model is pretrained on."""
    data = experiment.data
    arrays = [np.array(a) for a in (data.weights, data.means, data.deviations)]
    if data.modes is None:
        return GaussianMixture(*arrays)
    own = [np.array(data.modes) == k for k in range(data.mode_count)]
    return ModeMixtures(tuple(GaussianMixture(*(a[held] for a in arrays)) for held in own))


def build_reward(experiment: TailExperiment) -> Zones:
    """The landscape as a reward (minus the height where heights are costs)."""
    return _made(experiment.reward.model_dump(), LANDSCAPES, Zones)  # type: ignore[type-abstract]


def tail_utility(experiment: TailExperiment) -> CVaR | SQ:
    """The tail mean that the methods of an experiment raise."""
    problem = experiment.objective
    return (CVaR if problem.tail == "lower" else SQ)(build_reward(experiment), problem.mass)


def build_slope(experiment: FunctionalExperiment) -> Reward | None:
    """The reward of an experiment on a functional, if it has one."""
    if experiment.reward is None:
        return None
    return _made(experiment.reward.model_dump(exclude_none=True), SLOPES, Reward)  # type: ignore[type-abstract]


def reward_of(experiment: PlanarExperiment) -> Reward:
    """The reward of an experiment of either kind.

    Raises:
        ConfigError: if the experiment has none.
    """
    if isinstance(experiment, FunctionalExperiment):
        reward = build_slope(experiment)
        if reward is None:
            raise ConfigError(f"experiment {experiment.name}: key reward: missing; add it")
        return reward
    return build_reward(tail_experiment(experiment))


def build_cost(experiment: FunctionalExperiment) -> Bowl | None:
    """The cost that a log barrier bounds, if the experiment has one."""
    config = experiment.cost
    return None if config is None else Bowl((config.centre[0], config.centre[1]), config.radius)


def _made(fields: dict[str, Any], known: Mapping[str, type[Kind]], base: type[Kind]) -> Kind:
    """A reward from the fields of its section."""
    name = fields.pop("landscape")
    kind = _imported(name, known, base)
    try:
        return kind(**fields)
    except Exception as error:
        what = message_of(error, TypeError, ValueError)
        raise ConfigError(f"key reward.landscape: {name!r} cannot be made: {what}") from None


def _imported(name: str, known: Mapping[str, type[Kind]], base: type[Kind]) -> type[Kind]:
    if name in known:
        return known[name]
    try:
        found = imported(name)
    except ValueError as error:
        raise ConfigError(f"key reward.landscape: {error}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"key reward.landscape: {name!r} must be a subclass of {base.__name__}")
    return found
