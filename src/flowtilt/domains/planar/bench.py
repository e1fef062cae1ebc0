"""A pretrained flow in the plane with what its methods tilt it by."""

from __future__ import annotations

from functools import cached_property

from flowtilt.checkpoints import load_weights
from flowtilt.devices import generator_of
from flowtilt.domains.planar.build import build_model, reward_of, tail_utility
from flowtilt.domains.planar.experiment import FunctionalExperiment, PlanarExperiment, tail_experiment
from flowtilt.domains.planar.problems import build_objective
from flowtilt.fdc import ExponentAscent, MirrorAscent
from flowtilt.functionals.base import Objective
from flowtilt.functionals.divergences import KL
from flowtilt.model import FlowModel
from flowtilt.pipeline.stages import Climb, Workbench, trail_of
from flowtilt.rewards import Reward


class PlanarBench(Workbench):
    """See :class:`flowtilt.pipeline.stages.Workbench`."""

    @cached_property
    def flow(self) -> FlowModel:
        return load_weights(build_model(self.experiment), self.job.read("pretrained"))

    @cached_property
    def reward(self) -> Reward:
        return reward_of(self.experiment)

    def climb(self) -> Climb:
        """FDC from the pretrained model, or from an earlier run with fewer iterations."""
        experiment, method = self.experiment, self.job.method
        config, solver = experiment.methods[method], experiment.solver_of(method)
        done, start, trail = 0, self.flow, None
        if earlier := config.continue_from:
            done = experiment.methods[earlier].iterations
            start = load_weights(build_model(experiment), self.job.read("start"))
            trail = trail_of(self.job.read("start"))
        step, weight = config.fixed_step, _step_weight(experiment, method)
        settings: MirrorAscent | ExponentAscent
        if config.by == "exponents":
            settings = self.exponents(weight)
        else:
            settings = MirrorAscent(weight or 1.0, experiment.offline.samples, solver.steps)
        return Climb(
            _objective(experiment, method, self.flow),
            settings,
            start,
            # By the step and not by the method: methods that differ in nothing else share their noise.
            lambda k: generator_of(experiment.name, "fdc", step or "search", self.job.seed, k),
            done,
            trail,
            self.offline if start is self.flow else None,
        )


def _step_weight(experiment: PlanarExperiment, method: str) -> float | None:
    """KL weight of the steps of an fdc method, in units of its objective a nat; None where it is searched."""
    step = experiment.methods[method].fixed_step
    if step is None or isinstance(experiment, FunctionalExperiment):
        return step
    return tail_experiment(experiment).objective.tail_alpha / step


def _objective(experiment: PlanarExperiment, method: str, base: FlowModel) -> Objective:
    """What an fdc method raises."""
    if isinstance(experiment, FunctionalExperiment):
        return build_objective(experiment, method, base)
    tails = tail_experiment(experiment)
    # Scores are compared at the last time where the solver trains the velocity.
    kl = KL(base, score_time=base.time_grid(tails.solver_of(method).steps)[-2])
    return Objective(tail_utility(tails), kl, tails.objective.tail_alpha)
