"""Flow Density Control: raise any functional of the generated law, one tilt at a time.

Mirror ascent in the space of laws (De Santi et al. 2025, algorithm 1): linearise the objective at
the current law, solve the entropy-regularised control problem with its first variation as the
reward and the current model as the base, repeat.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from flowtilt.control.base import Solution
from flowtilt.functionals.base import FirstVariation, Functional, Law
from flowtilt.model import FlowModel
from flowtilt.parallel import processes
from flowtilt.ranges import COUNT, POSITIVE, check
from flowtilt.resuming import Resumption, Slot, weights_of
from flowtilt.sampling import positions_of, sample_sde


class Solver(Protocol):
    """Fine-tunes a base model by a first variation under a KL weight."""

    def __call__(
        self,
        base: FlowModel,
        tilt: FirstVariation,
        kl_weight: float,
        random: torch.Generator,
        slot: Slot | None = None,
    ) -> Solution: ...


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

    def __post_init__(self) -> None:
        check(self, step_weight=POSITIVE, law_samples=COUNT, law_steps=COUNT)


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
    resumption: Resumption | None = None,
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
        resumption: where the ascent and its solves keep their states, and go on from if they were stopped.

    Raises:
        CheckpointError: if a state to go on from belongs to another ascent.
    """
    slot = resumption.slot("ascent") if resumption is not None else None
    result = _taken_up(start, slot, settings)
    done = int(result.history[-1]["iteration"]) if result.history else iterations.start
    for k in range(done, iterations.stop):
        random = generator(k)
        model = result.model
        count, sharing = settings.law_samples, processes()
        context = model.draw_context(count, random)
        own = sample_sde(model, count, settings.law_steps, random, context, sharing)[-1]
        samples = sharing.gather(own, positions_of(count, sharing), count)
        variation = objective.linearise(Law(model, samples, context))
        inner = resumption.slot(f"solve-{k + 1}") if resumption is not None else None
        solution = solver(model, variation, settings.step_weight, random, inner)
        result.model = solution.model
        result.history += [{"iteration": k + 1, **row} for row in solution.history]
        if slot is not None and inner is not None and (slot.resumption.due() or inner.path.is_file()):
            slot.save(weights_of(result.model), result.history, settings)
            inner.discard()
    return result


def _taken_up(start: FlowModel, slot: Slot | None, settings: MirrorAscent) -> Ascent:
    """The ascent as its last state has it, or its beginning."""
    if slot is None:
        return Ascent(start)
    model = copy.deepcopy(start).requires_grad_(False)
    history = slot.load(weights_of(model), settings)
    # The start itself and not a copy: to a divergence from it, it is known by its identity.
    return Ascent(start) if history is None else Ascent(model, history)
