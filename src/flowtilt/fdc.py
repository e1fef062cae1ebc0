"""Flow Density Control: raise any functional of the generated distribution, one tilt at a time.

Mirror ascent in the space of distributions (De Santi et al. 2025, algorithm 1): linearise the objective at
the current distribution, solve the entropy-regularised control problem with its first variation as the
reward and the current model as the base, repeat.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flowtilt.control.base import Solution, TrainingDiverged
from flowtilt.functionals.base import Distribution, FirstVariation, Functional, Objective, WeightedVariation
from flowtilt.model import FlowModel
from flowtilt.parallel import processes
from flowtilt.ranges import COUNT, POSITIVE, check
from flowtilt.resuming import Resumption, Slot, weights_of
from flowtilt.sampling import positions_of, sample_sde

ERRORS = 4.0
"""Standard errors beyond which a difference is not one of the samples: one in thirty thousand."""


FEWEST = 30
"""Samples below which a spread is not known well enough for that."""


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
        distribution_samples: samples of the current distribution that the first variation is estimated from.
        distribution_steps: time steps of the memoryless process that draws them.
    """

    step_weight: float
    distribution_samples: int
    distribution_steps: int

    def __post_init__(self) -> None:
        check(self, step_weight=POSITIVE, distribution_samples=COUNT, distribution_steps=COUNT)


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
        TrainingDiverged: if a solve diverges, or the utility falls below that of the start by more than the
            error of their samples (see :func:`_check_rise`); the message names the iteration.
        CheckpointError: if a state to go on from belongs to another ascent.
    """
    slot = resumption.slot("ascent") if resumption is not None else None
    result, first = _taken_up(start, slot, settings)
    done = int(result.history[-1]["iteration"]) if result.history else iterations.start
    for k in range(done, iterations.stop):
        random = generator(k)
        distribution = _distribution(result.model, settings, random)
        variation = objective.linearise(distribution)
        level = _level(objective, distribution, variation)
        if k == iterations.start:
            first = level
        _check_rise(first, level, k, iterations, settings)
        inner = resumption.slot(f"solve-{k + 1}") if resumption is not None else None
        try:
            solution = solver(result.model, variation, settings.step_weight, random, inner)
        except TrainingDiverged as error:
            message = f"Flow Density Control, iteration {k + 1} of {iterations.stop}: {error}"
            raise TrainingDiverged(message) from None
        result.model = solution.model
        result.history += [{"iteration": k + 1, **row} for row in solution.history]
        if slot is not None and inner is not None and (slot.resumption.due() or inner.path.is_file()):
            slot.save(weights_of(result.model) | {"start": _kept(first)}, result.history, settings)
            inner.discard()
    if done < iterations.stop and first is not None:
        distribution = _distribution(result.model, settings, random)
        _check_rise(
            first,
            _level(objective, distribution, objective.linearise(distribution)),
            iterations.stop,
            iterations,
            settings,
        )
    return result


def _distribution(model: FlowModel, settings: MirrorAscent, random: torch.Generator) -> Distribution:
    """The distribution of a model with samples of the memoryless process, drawn by all processes."""
    count, sharing = settings.distribution_samples, processes()
    context = model.draw_context(count, random)
    own = sample_sde(model, count, settings.distribution_steps, random, context, sharing)[-1]
    return Distribution(model, sharing.gather(own, positions_of(count, sharing), count), context)


class Level(NamedTuple):
    """A utility at a distribution, and the standard error that it has from the distribution's samples."""

    value: float
    error: float


def _level(objective: Functional, distribution: Distribution, variation: FirstVariation) -> Level | None:
    """The utility of the objective; None where its values are dear, or the samples too few for an error.

    The first variation is the influence of a sample: the error is its spread over the root of their number.
    """
    utility = objective
    if isinstance(objective, Objective) and isinstance(variation, WeightedVariation):
        utility, variation = objective.utility, variation.parts[0][1]
    if variation.split()[1] is not None:
        return None
    influence = variation.value(distribution.samples, distribution.context).double()
    influence = influence[~influence.isnan()]
    if len(influence) < FEWEST:
        return None
    return Level(utility.value(distribution), float(influence.std()) / math.sqrt(len(influence)))


def _check_rise(
    first: Level | None, level: Level | None, done: int, iterations: range, settings: MirrorAscent
) -> None:
    """Refuse to go on from a distribution whose utility is below that of the start.

    The objective of a distribution is at most its utility, since a divergence is not negative, and at the
    pretrained distribution it is equal: an ascent from there whose utility is below has lowered its
    objective. From a distribution that is on its way already, the utility may give way to the divergence:
    what a nat is worth in a step is left.

    Raises:
        TrainingDiverged: if it is, by more than four standard errors of the two.
    """
    if first is None or level is None:
        return
    slack = 0.0 if iterations.start == 0 else settings.step_weight
    error = math.hypot(first.error, level.error)
    if not level.value >= first.value - slack - ERRORS * error:
        raise TrainingDiverged(
            f"Flow Density Control: after iteration {done} of {iterations.stop} the utility is "
            f"{level.value:.6g}, below {first.value:.6g} at the start (standard error {error:.2g}): the "
            "solves lower what they are to raise; raise the KL weight of a step, or lower learning_rate"
        )


def _taken_up(start: FlowModel, slot: Slot | None, settings: MirrorAscent) -> tuple[Ascent, Level | None]:
    """The ascent as its last state has it, or its beginning, and the level of the start if it is known."""
    if slot is None:
        return Ascent(start), None
    model, kept = copy.deepcopy(start).requires_grad_(False), _kept(None)
    history = slot.load(weights_of(model) | {"start": kept}, settings)
    if history is None:
        # The start itself and not a copy: to a divergence from it, it is known by its identity.
        return Ascent(start), None
    value, error = kept.tolist()
    return Ascent(model, history), Level(value, error) if error >= 0 else None


def _kept(level: Level | None) -> Tensor:
    """A level as a state has it, (2,): measured again, it would cost what the values of its distribution
    cost.

    Where there is none, the error is below 0.
    """
    return torch.tensor(Level(0.0, -1.0) if level is None else level, dtype=torch.float64)
