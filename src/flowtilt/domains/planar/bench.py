"""A pretrained flow in the plane with what its methods tilt it by."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from flowtilt.checkpoints import load_weights
from flowtilt.devices import generator_of
from flowtilt.domains.planar.build import build_model, build_reward, reward_of
from flowtilt.domains.planar.experiment import FunctionalExperiment, PlanarExperiment, tail_experiment
from flowtilt.domains.planar.problems import build_objective
from flowtilt.fdc import MirrorAscent
from flowtilt.functionals.base import Functional, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, CVaR
from flowtilt.model import FlowModel
from flowtilt.pipeline.stages import Climb, Workbench
from flowtilt.rewards import Reward


class PlanarBench(Workbench):
    """See :class:`flowtilt.pipeline.stages.Workbench`; its offline batch has the points as well."""

    @cached_property
    def flow(self) -> FlowModel:
        return load_weights(build_model(self.experiment), self.job.read("pretrained"))

    @cached_property
    def reward(self) -> Reward:
        return reward_of(self.experiment)

    def offline_arrays(self, x: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        return {"x": x, "reward": rewards}

    def climb(self) -> Climb:
        """FDC from the pretrained model, or from an earlier run with fewer iterations."""
        experiment, method = self.experiment, self.job.method
        done, start = 0, self.flow
        if earlier := experiment.methods[method].continue_from:
            done = experiment.methods[earlier].iterations
            start = load_weights(build_model(experiment), self.job.read("start"))
        objective, step_weight, step = _ascent(experiment, method, self.flow)
        return Climb(
            objective,
            MirrorAscent(step_weight, experiment.offline.samples, experiment.solver_of(method).steps),
            start,
            # By the step and not by the method: methods that differ in nothing else share their noise.
            lambda k: generator_of(experiment.name, "fdc", step, self.job.seed, k),
            done,
        )


def _ascent(experiment: PlanarExperiment, method: str, base: FlowModel) -> tuple[Functional, float, float]:
    """What an fdc method raises, the KL weight of its steps, and the step as configured."""
    if isinstance(experiment, FunctionalExperiment):
        step_weight = experiment.methods[method].step_weight or 1.0
        return build_objective(experiment, method, base), step_weight, step_weight
    tails = tail_experiment(experiment)
    problem, reward = tails.objective, build_reward(tails)
    utility = (CVaR if problem.tail == "lower" else SQ)(reward, problem.mass)
    # Scores are compared at the last time where the solver trains the velocity.
    kl = KL(base, score_time=base.time_grid(tails.solver_of(method).steps)[-2])
    step = tails.methods[method].step or 1.0
    return Objective(utility, kl, problem.tail_alpha), problem.tail_alpha / step, step
