"""The three control solvers on tilts that are known in closed form, with what each costs in counts.

The model is the exact flow of a mixture of Gaussians with its weights, means and covariances as parameters:
the tilt by a quadratic reward is in the family, and what a solver reaches is compared with it without
drawing a sample. KL weights are those at which the tilt pays a stated number of nats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtilt.control import adjoint_matching, annealed_fitting, weighted_fitting
from flowtilt.control.base import Solution, TrainingDiverged
from flowtilt.control.weighted_fitting import UnusableBank, WeightedFittingSettings
from flowtilt.devices import generator_of
from flowtilt.functionals.base import FirstVariation
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.interpolants import Linear
from flowtilt.model import Context
from flowtilt.pipeline.theory.config import TiltStudyConfig
from flowtilt.pipeline.theory.mixture_flow import MixtureFlow
from flowtilt.rewards import Reward
from flowtilt.theory.gaussian_mixtures import GaussianMixture, QuadraticReward, weight_at

log = logging.getLogger(__name__)

Row = dict[str, Any]


class Quadratic(Reward):
    """A :class:`QuadraticReward` as solvers ask for it."""

    def __init__(self, reward: QuadraticReward) -> None:
        self.linear, self.curvature = torch.tensor(reward.linear), torch.tensor(reward.curvature)

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return x @ self.linear - 0.5 * ((x @ self.curvature) * x).sum(1)


Solve = Callable[[MixtureFlow, FirstVariation, float, torch.Generator], tuple[Solution, int]]


def study(config: TiltStudyConfig) -> dict[str, list[Row]]:
    """Every solver on every problem at every number of nats: the table ``tilts``, a row a solve."""
    rows = []
    for problem, its in config.problems.items():
        bases = [GaussianMixture.of(each.weights, each.means, each.covariances) for each in its.contexts]
        reward = QuadraticReward(np.array(its.linear), np.array(its.curvature))
        for nats in config.nats:
            weight = weight_at(bases, reward, nats)
            for name, solve in solvers(config).items():
                random = generator_of(config.name, problem, nats, name)
                row = {"problem": problem, "contexts": len(bases), "nats": nats, "kl_weight": weight}
                rows.append(row | {"solver": name} | solved(bases, reward, weight, solve, random))
                log.info("%s, %g nats, %s", problem, nats, name)
    return {"tilts": rows}


def solvers(config: TiltStudyConfig) -> dict[str, Solve]:
    """By name, each with the number of samples that it draws."""
    bank = config.fitting
    fitting = WeightedFittingSettings(
        bank=bank.bank,
        steps=bank.steps,
        updates=bank.updates,
        batch=bank.batch,
        learning_rate=bank.learning_rate,
        gradient_clip=10.0,
        minimum_ess=0.0,  # what one bank makes of a tilt that it cannot carry is what the table shows
        warning_ess=0.0,
    )
    adjoint = adjoint_matching.AdjointMatchingSettings(
        pool=config.adjoint.batch, gradient_clip=10.0, **config.adjoint.model_dump()
    )
    annealed = annealed_fitting.AnnealedFittingSettings(
        fitting, config.annealing.share, config.annealing.stages
    )

    def by_adjoints(
        flow: MixtureFlow, tilt: FirstVariation, weight: float, random: torch.Generator
    ) -> tuple[Solution, int]:
        samples = adjoint.updates * adjoint.batch
        return adjoint_matching.solve(flow, tilt, weight, adjoint, random), samples

    def by_weights(
        flow: MixtureFlow, tilt: FirstVariation, weight: float, random: torch.Generator
    ) -> tuple[Solution, int]:
        return weighted_fitting.solve(flow, tilt, weight, fitting, random), fitting.bank

    def by_annealing(
        flow: MixtureFlow, tilt: FirstVariation, weight: float, random: torch.Generator
    ) -> tuple[Solution, int]:
        solution = annealed_fitting.solve(flow, tilt, weight, annealed, random)
        return solution, fitting.bank * (len(solution.stages) + 1)

    return {
        "adjoint_matching": by_adjoints,
        "weighted_fitting": by_weights,
        "annealed_fitting": by_annealing,
    }


def solved(
    bases: list[GaussianMixture],
    reward: QuadraticReward,
    weight: float,
    solve: Solve,
    random: torch.Generator,
) -> Row:
    """Errors and costs of one solve; a solver that gives up has none, and says why."""
    flow = MixtureFlow(Linear(), bases)
    try:
        solution, samples = solve(flow, RewardVariation(Quadratic(reward)), weight, random)
    except (TrainingDiverged, UnusableBank) as error:
        return {**dict.fromkeys((*ERRORS, *COSTS)), "ended": str(error)}
    assert isinstance(solution.model, MixtureFlow)
    found = solution.model.mixtures()
    exact = [base.tilted(reward, weight)[0] for base in bases]
    worst = [max(each) for each in zip(*map(errors, found, exact, bases), strict=True)]
    history, banks = solution.history, solution.diagnostics
    least = [row["effective_sample_size"] for row in history if "effective_sample_size" in row]
    effective = min(least) if least else banks.get("effective_sample_size")
    costs = (samples, len(history), int(history[-1]["network_passes"]))
    stages = int(banks.get("stages", 1))
    return {
        **dict(zip(ERRORS, worst, strict=True)),
        **dict(zip(COSTS, (stages, *costs), strict=True)),
        "effective_samples": effective,
        "ended": "",
    }


ERRORS = ("mean_error", "covariance_error", "weight_error")
COSTS = ("stages", "samples", "updates", "network_passes")


def errors(
    found: GaussianMixture, exact: GaussianMixture, base: GaussianMixture
) -> tuple[float, float, float]:
    """Of the mean as a share of its move, of the covariance as one of its norm, and the largest weight's."""
    moved = np.linalg.norm(exact.mean - base.mean)
    off = np.linalg.norm(found.covariance - exact.covariance) / np.linalg.norm(exact.covariance)
    return (
        float(np.linalg.norm(found.mean - exact.mean) / moved),
        float(off),
        float(np.abs(found.weights - exact.weights).max()),
    )
