"""Flow Density Control: raise any functional of the generated law, one tilt at a time.

Mirror ascent in the space of laws (De Santi et al. 2025, algorithm 1): linearise the objective at
the current law, solve the entropy-regularised control problem with its first variation as the
reward and the current model as the base, repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from flowtilt.control.base import Solution
from flowtilt.functionals.base import FirstVariation, Functional, Law
from flowtilt.model import FlowModel
from flowtilt.sampling import sample_sde

Solver = Callable[[FlowModel, FirstVariation, float, torch.Generator], Solution]
"""Fine-tunes a base model by a first variation under a KL weight."""


@dataclass(frozen=True)
class MirrorAscent:
    """How the iteration is run.

    Attributes:
        step_weight: KL weight of each step (the paper's eta), in units of the objective a nat. With
            a KL term of weight alpha in the objective it must be at least alpha.
        law_samples: samples of the current law that the first variation is estimated from.
        law_steps: time steps of the memoryless process that draws them.
    """

    step_weight: float
    law_samples: int
    law_steps: int


@dataclass
class Ascent:
    """The model after the last iteration, and a history with one row an update."""

    model: FlowModel
    history: list[dict[str, float]] = field(default_factory=list)


def ascend(
    start: FlowModel,
    objective: Functional,
    iterations: range,
    settings: MirrorAscent,
    solver: Solver,
    generator: Callable[[int], torch.Generator],
) -> Ascent:
    """Run the given iterations of mirror ascent from ``start``.

    Args:
        start: the model before the first of ``iterations``; left unchanged.
        objective: the functional to raise.
        iterations: which iterations these are; ``range(2, 5)`` continues after two.
        settings: of the iteration.
        solver: of the control problem of each step.
        generator: source of randomness of each iteration, by its number, so that a continued
            ascent is the same as an uninterrupted one.
    """
    result = Ascent(start)
    for k in iterations:
        random = generator(k)
        model = result.model
        context = model.draw_context(settings.law_samples, random)
        samples = sample_sde(model, settings.law_samples, settings.law_steps, random, context)[-1]
        variation = objective.linearise(Law(model, samples, context))
        solution = solver(model, variation, settings.step_weight, random)
        result.model = solution.model
        result.history += [{"iteration": k + 1, **row} for row in solution.history]
    return result
