"""Both solvers of the control problem on one planar problem: what they cost, and how near they come.

A network of the planar experiments is pretrained, then fine-tuned by Adjoint Matching and by weighted
fitting to the same smooth reward with several budgets of updates. The value of the problem at a distribution
q lies below its optimum at the exact tilt p* by ``kl_weight KL(q || p*)``; this gap is estimated from the
models' own densities, and printed as a share of the gap that the pretrained model starts from.

Cost is counted in network passes of one state: 1 forward, 1 backward to the state, 2 backward to the
parameters. Seconds are CPU seconds of one thread.

Run:  python benchmarks/control_solvers.py [--kl-weight 0.5]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtilt.control import adjoint_matching, weighted_fitting
from flowtilt.control.base import Solution
from flowtilt.domains.planar.build import build_data, build_path
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.model import Context
from flowtilt.pipeline.experiment import Experiment, load_file
from flowtilt.pipeline.solvers import adjoint_matching_settings
from flowtilt.pretraining import PretrainingSettings, fit_flow
from flowtilt.rewards import Reward
from flowtilt.sampling import OdeSettings, log_likelihood, sample_ode, sample_with_log_density

CONFIG = Path(__file__).parents[1] / "config" / "experiments" / "risk_averse_2d.yaml"


@dataclass
class Counter:
    """Network passes so far, shared by a model and its copies."""

    passes: int = 0

    def __deepcopy__(self, memo: Any) -> Counter:
        return self


class CountedFlow(PlanarFlow):
    """A planar flow that counts its network passes."""

    counter: Counter

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        output = super().predict(x, t)
        backward = 2 if next(self.parameters()).requires_grad else 1
        self.counter.passes += len(x) * (1 + backward if output.requires_grad else 1)
        return output


class Waves(Reward):
    """A smooth reward of size one."""

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return torch.sin(1.2 * x[:, 0]) + 0.5 * torch.tanh(x[:, 1])


@dataclass(frozen=True)
class Problem:
    """A base model, what it is tilted by, and the log normaliser of the exact tilt."""

    base: CountedFlow
    reward: Reward
    kl_weight: float
    log_normaliser: float
    ode: OdeSettings

    def gap(self, model: PlanarFlow, samples: int = 4000) -> float:
        """``kl_weight KL(model || exact tilt)``, in units of the reward."""
        generator = torch.Generator().manual_seed(3)
        x, log_density = sample_with_log_density(model, samples, generator, settings=self.ode)
        log_base = log_likelihood(self.base, x, settings=self.ode)
        exponent = self.reward(x) / self.kl_weight - self.log_normaliser
        return self.kl_weight * float((log_density - log_base - exponent).double().mean())


def build_problem(experiment: Experiment, kl_weight: float) -> Problem:
    """Pretrain the experiment's network and integrate the tilt over samples of it."""
    network = experiment.network
    torch.manual_seed(0)
    base = CountedFlow(build_path(experiment.path), network.widths, network.activation, network.prediction)
    base.counter = Counter()
    config = experiment.pretrain
    settings = PretrainingSettings(config.updates, config.batch, config.learning_rate)
    fit_flow(base, build_data(experiment).sample, settings, torch.Generator().manual_seed(0))
    ode = OdeSettings(steps=experiment.evaluation.ode_steps)
    reward = Waves()
    samples = sample_ode(base, 100_000, torch.Generator().manual_seed(1), settings=ode)
    exponents = reward(samples).double() / kl_weight
    log_normaliser = float(torch.logsumexp(exponents, 0)) - math.log(len(samples))
    return Problem(base, reward, kl_weight, log_normaliser, ode)


def solvers(
    experiment: Experiment,
) -> dict[str, tuple[Callable[..., Solution], Callable[[int], Any], list[int]]]:
    """Of each solver: its function, its settings by number of updates, and the budgets."""

    def adjoint(updates: int) -> adjoint_matching.AdjointMatchingSettings:
        return adjoint_matching_settings(experiment.solver, updates)

    def weighted(updates: int) -> weighted_fitting.WeightedFittingSettings:
        return weighted_fitting.WeightedFittingSettings(updates=updates)

    return {
        "adjoint matching": (adjoint_matching.solve, adjoint, [15, 50, 150]),
        "weighted fitting": (weighted_fitting.solve, weighted, [100, 300, 1000]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl-weight", type=float, default=0.5)
    kl_weight = parser.parse_args().kl_weight
    torch.set_num_threads(1)
    (experiment,) = load_file(CONFIG).values()
    problem = build_problem(experiment, kl_weight)
    start = problem.gap(problem.base)
    print(f"gap of the pretrained model {start:.4f} (reward units), KL weight {kl_weight:g}")
    print(f"{'solver':18}{'updates':>8}{'Mpasses':>9}{'passes/update':>15}{'CPU s':>9}{'gap left':>10}")
    for name, (solve, settings, budgets) in solvers(experiment).items():
        for updates in budgets:
            counter = problem.base.counter
            counter.passes, started = 0, time.process_time()
            generator = torch.Generator().manual_seed(2)
            tilt = RewardVariation(problem.reward)
            solution = solve(problem.base, tilt, kl_weight, settings(updates), generator)
            elapsed, passes = time.process_time() - started, counter.passes
            share = problem.gap(solution.model) / start
            print(
                f"{name:18}{updates:8}{passes / 1e6:9.2f}{passes / updates:15.0f}{elapsed:9.1f}{share:10.1%}"
            )


if __name__ == "__main__":
    main()
