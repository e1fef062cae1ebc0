"""The pretrained text-to-image model with what its methods tilt it by: a reward, or the entropy."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtilt.devices import generator_of
from flowtilt.domains.images.experiment import tail_metric
from flowtilt.domains.images.pipeline import TextToImage
from flowtilt.domains.images.sampling import CHUNK, load_base, load_reward, write_images
from flowtilt.domains.images.sections import LeftTailObjective
from flowtilt.fdc import MirrorAscent
from flowtilt.functionals.base import Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import CVaR, Entropy
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.model import Context, FlowModel
from flowtilt.pipeline.stages import Climb, Workbench
from flowtilt.rewards import Reward

FRONTIER = (0.2, 0.1)
"""Masses of the tails that a bank's worth is told by."""


class ImagesBench(Workbench):
    """See :class:`flowtilt.pipeline.stages.Workbench`."""

    chunk = CHUNK
    sampler = "sde"
    dear_rewards = True

    @cached_property
    def base(self) -> TextToImage:
        """The pretrained model, on the prompts of fine-tunings."""
        prompts = self.experiment.trained_prompts
        return load_base(self.experiment, self.job.read("pretrained"), prompts=prompts)

    @cached_property
    def flow(self) -> FlowModel:
        return self.base.flow

    @cached_property
    def reward(self) -> Reward:
        return load_reward(self.experiment, self.job.read("pretrained"), self.base.decode)

    def contexts(self, generator: torch.Generator) -> tuple[int, Context]:
        """As many images of every prompt as a run is measured by."""
        prompts = torch.arange(len(self.base.prompts)).repeat(self.experiment.evaluation.drawn)
        return len(prompts), self.base.flow.context_of(prompts)

    def write(self, samples: Tensor, context: Context, output: Path) -> None:
        """Write the images of latents."""
        prompts = self.base.flow.context_labels(context)
        write_images(self.job, self.base, prompts, lambda index: samples[index], output)

    def climb(self) -> Climb:
        """FDC on the left tail by exponents, or on the entropy by scores."""
        if isinstance(self.experiment.objective, LeftTailObjective):
            return self._climb_tail()
        return self._climb_entropy()

    def _climb_tail(self) -> Climb:
        """FDC on the mean of the worst share, less the KL divergence, by values of the reward alone."""
        experiment, method = self.experiment, self.job.method
        step, problem = experiment.methods[method].step, experiment.tail_of(method)
        return Climb(
            Objective(CVaR(self.reward, problem.mass), KL(self.flow), problem.alpha),
            self.exponents(problem.alpha / step if step else None),
            self.flow,
            lambda k: generator_of(experiment.name, method, self.job.seed, k),
            first=self.offline,
            measure=self.measure,
        )

    def measure(self, samples: Tensor, context: Context, values: np.ndarray) -> dict[str, float]:
        """Mean and worst shares of the reward."""
        worst = {tail_metric(mass): lower_tail_mean(values, mass) for mass in FRONTIER}
        return {self.experiment.mean_metric: float(values.mean()), **worst}

    def _climb_entropy(self) -> Climb:
        """FDC on the entropy of the latents, less the KL divergence, both by scores.

        The entropy is 1-smooth relative to itself, and the divergence alpha times: steps of the KL weight
        1 + alpha never descend, and without noise the first is the optimum, ``p_0^(alpha / (1 + alpha))``.
        With noise both only get smoother, since no divergence grows by it. A step of the weight alpha takes
        ``p_0^c`` to ``p_0^(1 - c / alpha)``, which at alpha = 1 is the flat distribution and then p_0 again.
        """
        experiment, method = self.experiment, self.job.method
        config, solver, goal = experiment.methods[method], experiment.solver_of(method), experiment.objective
        alpha = experiment.entropy_weight(method)
        time = noisy_time(self.flow, solver.steps, goal.noise)
        entropy = Entropy(score_time=time, pairs=goal.pairs)
        return Climb(
            Objective(entropy, KL(self.flow, score_time=time, pairs=goal.pairs), alpha),
            # Scores need no samples of the distribution: as few as there can be.
            MirrorAscent((1 + alpha) / (config.step or 1.0), 1, solver.steps),
            self.flow,
            lambda k: generator_of(experiment.name, method, self.job.seed, k),
        )


def noisy_time(base: FlowModel, steps: int, variance: float) -> float:
    """The time of the solver's grid whose noise has about a variance, where it trains the velocity."""
    times = torch.tensor(base.time_grid(steps)[:-1], dtype=torch.float64)
    return float(times[(base.path.beta(times).square() - variance).abs().argmin()])
