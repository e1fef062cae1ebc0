"""Flow Density Control: raise any functional of the generated distribution, one tilt at a time.

Mirror ascent in the space of distributions (De Santi et al. 2025, algorithm 1): linearise the objective at
the current distribution, solve the entropy-regularised control problem with its first variation as the
reward and the current model as the base, repeat. By :func:`ascend` the divergence is linearised with the
utility, by the models' scores; :func:`ascend_by_exponents` takes it from what the steps have added up
(:mod:`flowtilt.mirror`), and chooses their weights by a line search on samples.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowtilt.control.annealed_fitting import BANK, Measure, check_budget, frontier_of, goals
from flowtilt.control.base import Solution, TrainingDiverged
from flowtilt.control.weighted_fitting import Samples
from flowtilt.functionals.base import (
    Distribution,
    FiniteDistribution,
    FirstVariation,
    Functional,
    NoValues,
    Objective,
    WeightedVariation,
)
from flowtilt.functionals.utilities import InfeasibleBarrier
from flowtilt.mirror import (
    TRIALS,
    Exponents,
    MirrorStep,
    bounded_step,
    find_step,
    fixed_step,
    numbers_of,
    with_numbers,
)
from flowtilt.model import FlowModel
from flowtilt.parallel import processes
from flowtilt.ranges import COUNT, NOT_NEGATIVE, POSITIVE, between, check, check_value
from flowtilt.resuming import Resumption, Slot, weights_of
from flowtilt.sampling import positions_of, sample_sde
from flowtilt.tilts import LEAST, Groups

logger = logging.getLogger(__name__)

ERRORS = 4.0
"""Standard errors beyond which a difference is not one of the samples: one in thirty thousand."""


FEWEST = 30
"""Samples below which a spread is not known well enough for that."""


SPENT = 1e-3
"""Nats below which what is left of a budget is left."""


class NoStep(ArithmeticError):
    """The pretrained model's samples give no step to begin with."""


class Solver(Protocol):
    """Fine-tunes a base model by a first variation under a KL weight.

    With ``given``, samples of the base, one that needs a bank of it may take them and draw none.
    """

    def __call__(
        self,
        base: FlowModel,
        tilt: FirstVariation,
        kl_weight: float,
        random: torch.Generator,
        slot: Slot | None = None,
        given: Samples | None = None,
    ) -> Solution: ...


StepWeight = float | tuple[float, ...]
"""KL weight of all steps, or of each one."""


def weight_of(step_weight: StepWeight, k: int) -> float:
    """KL weight of the step with the number ``k``, from 0; beyond the last of several, that one."""
    if isinstance(step_weight, tuple):
        return step_weight[min(k, len(step_weight) - 1)]
    return step_weight


def _check_weights(step_weight: StepWeight) -> None:
    """Raises ValueError if a weight is not positive, or there is none."""
    weights = step_weight if isinstance(step_weight, tuple) else (step_weight,)
    if not weights:
        raise ValueError("step_weight must have a weight for each step, got none")
    for weight in weights:
        check_value("step_weight", weight, POSITIVE)


@dataclass(frozen=True)
class MirrorAscent:
    """How the iteration is run.

    Attributes:
        step_weight: KL weight of each step (the paper's eta), in units of the objective a nat; or one for
            each. With a KL term of weight alpha in the objective it must be at least alpha.
        distribution_samples: samples of the current distribution that the first variation is estimated from.
        distribution_steps: time steps of the memoryless process that draws them.
    """

    step_weight: StepWeight
    distribution_samples: int
    distribution_steps: int

    def __post_init__(self) -> None:
        _check_weights(self.step_weight)
        check(self, distribution_samples=COUNT, distribution_steps=COUNT)


@dataclass(frozen=True)
class Trail:
    """What an ascent by exponents has added up, in numbers that go through JSON: another goes on from it.

    Attributes:
        iterations: steps so far.
        parts: of the exponents: the weight of each first variation, then its own numbers.
        log_z: logarithm of the normaliser of ``exp(h)``, mean over contexts.
        first: utility at the start and its standard error.
    """

    iterations: int = 0
    parts: list[list[float]] = field(default_factory=list)
    log_z: float = 0.0
    first: list[float] = field(default_factory=list)


@dataclass
class Ascent:
    """The model after the last iteration, and a history with one row an update.

    Attributes:
        trail: of an ascent by exponents; None of one by scores.
        frontier: of an ascent whose samples were measured; as that of
            :class:`flowtilt.control.annealed_fitting.AnnealedSolution`.
    """

    model: FlowModel
    history: list[dict[str, float]] = field(default_factory=list)
    trail: Trail | None = None
    frontier: list[dict[str, float]] = field(default_factory=list)


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
        weight = weight_of(settings.step_weight, k)
        _check_rise(first, level, k, iterations, weight)
        inner = resumption.slot(f"solve-{k + 1}") if resumption is not None else None
        try:
            solution = solver(result.model, variation, weight, random, inner)
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
            weight_of(settings.step_weight, iterations.stop - 1),
        )
    return result


def _distribution(
    model: FlowModel, settings: MirrorAscent | ExponentAscent, random: torch.Generator
) -> Distribution:
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
    first: Level | None, level: Level | None, done: int, iterations: range, step_weight: float = 0.0
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
    slack = 0.0 if iterations.start == 0 else step_weight
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


@dataclass(frozen=True)
class ExponentAscent:
    """How an iteration by accumulated exponents is run.

    Attributes:
        distribution_samples: samples of the current distribution that a step is searched on.
        distribution_steps: time steps of the memoryless process that draws them.
        share: effective share of these samples that a step keeps.
        minimum_ess: effective samples that what a step adds rests on.
        step_weight: KL weight of all steps, or of each, in units of the objective a nat; by default each
            step's is searched.
        group: samples of a context below which it is pooled, see :meth:`flowtilt.tilts.Groups.of`.
        kl: divergence from the pretrained model at which the ascent ends, in nats. Then steps go along the
            utility's own first variation at the current model, as far as this and the samples allow.
        stage_kl: what each step adds to it, in nats; by default all of it.
    """

    distribution_samples: int
    distribution_steps: int
    share: float = 0.3
    minimum_ess: float = 50.0
    step_weight: StepWeight | None = None
    group: int = LEAST
    kl: float | None = None
    stage_kl: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.kl, self.stage_kl)
        if self.kl is not None and self.step_weight is not None:
            raise ValueError("kl and step_weight both say how far a step goes; give one of them")
        check(self, distribution_samples=COUNT, distribution_steps=COUNT, group=COUNT, share=between(0, 1))
        check(self, minimum_ess=NOT_NEGATIVE)
        if self.step_weight is not None:
            _check_weights(self.step_weight)


def ascend_by_exponents(
    start: FlowModel,
    utility: Functional,
    alpha: float,
    iterations: int,
    settings: ExponentAscent,
    solver: Solver,
    generator: Callable[[int], torch.Generator],
    resumption: Resumption | None = None,
    trail: Trail | None = None,
    first: Samples | None = None,
    measure: Measure | None = None,
) -> Ascent:
    """Raise ``utility - alpha KL`` from the pretrained model ``start``, step by step.

    A step is chosen on samples of the current model and taken by ``solver``, which any solver can be. Where
    no step gains anything on the samples, the ascent ends, and says so in the log.

    Args:
        start: the pretrained model, or that of an earlier ascent; left unchanged.
        utility: what to raise; its first variation is known from values.
        alpha: weight of the divergence from the pretrained model, not negative, in units of the utility a
            nat.
        iterations: most steps, with those of an earlier ascent.
        settings: of the steps.
        solver: of the control problem of each step.
        generator: source of randomness of each iteration, by its number from 0.
        resumption: where the ascent and its solves keep their states.
        trail: of the earlier ascent whose model is ``start``; the two together are the same as one.
        first: samples of ``start`` that the first step is searched on; else they are drawn.
        measure: of the samples of each step and of the last model, by the first reward; what it finds is in
            the history, as ``bank_...``, and in the frontier.

    Returns:
        The model, its trail, and a history with a row an update: of its step ``iteration``, ``step_weight``,
        ``gain`` (of the objective, as the samples promise), ``effective_share``, ``step_kl`` and ``kl`` (what
        it pays, and the divergence of the exponents from the pretrained model, in nats, which a solver's own
        ``kl`` may stand before: with a budget or a measure it is also ``divergence``), ``utility`` before
        it and ``utility_promised``, ``failed_share``, and the solver's own columns.

    Raises:
        NoValues: before any training, if the utility's first variation takes scores or densities.
        NoStep: before any training, if no step from ``start`` gains anything on its samples.
        TrainingDiverged: as by :func:`ascend`.
        CheckpointError: if a state to go on from belongs to another ascent.
    """
    check_values(utility)
    if settings.kl is not None:
        alpha = 0.0  # the budget takes its place
    slot = resumption.slot("ascent") if resumption is not None else None
    state = _Accumulated(start, utility, alpha, iterations, settings, first, measure)
    state.follow(trail, generator)
    state.take_up(slot, generator)
    for k in range(state.done, iterations):
        random = generator(k)
        step = state.step(k, random)
        if step is None:
            break
        inner = resumption.slot(f"solve-{k + 1}") if resumption is not None else None
        try:
            tilt = state.exponents.direction(step.found, alpha)
            solution = solver(state.model, tilt, step.found.eta, random, inner, given=step.samples)
        except TrainingDiverged as error:
            message = f"Flow Density Control, iteration {k + 1} of {iterations}: {error}"
            raise TrainingDiverged(message) from None
        state.went(step, solution, k + 1, random)
        if slot is not None and inner is not None and (slot.resumption.due() or inner.path.is_file()):
            slot.save(state.tensors(), state.history, (settings, alpha))
            inner.discard()
    frontier = [] if measure is None else state.frontier(generator(iterations))
    return Ascent(state.model, state.history, state.trail(), frontier)


def check_values(utility: Functional) -> None:
    """Refuse a utility that no ascent by exponents can raise.

    Raises:
        NoValues: if its first variation takes scores or densities.
    """
    for part in utility.components:
        if not part.by_values:
            part.variation_at(FiniteDistribution(torch.zeros(0), np.zeros(0), np.zeros(0)))  # says what has


class _Step(NamedTuple):
    """A step that was found, the samples that it was found on, what it adds to ``log Z``, and its columns in
    the history."""

    found: MirrorStep
    samples: Samples
    log_z: float
    row: dict[str, float]


@dataclass
class _Accumulated:
    """A model with the exponents that lead to it from the pretrained one."""

    model: FlowModel
    utility: Functional
    alpha: float
    iterations: int
    settings: ExponentAscent
    drawn: Samples | None = None
    measure: Measure | None = None
    exponents: Exponents = field(default_factory=lambda: Exponents(()))
    log_z: float = 0.0
    first: Level | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    earlier: int = 0

    def __post_init__(self) -> None:
        self.start = self.model

    @property
    def done(self) -> int:
        """Iterations so far, those of an earlier ascent included."""
        return int(self.history[-1]["iteration"]) if self.history else self.earlier

    def bank(self, random: torch.Generator) -> tuple[FiniteDistribution, Groups, Samples]:
        """Samples of the model that have values, as a finite distribution, their groups, and all samples.

        They are in rising order of the first reward: of what is sorted, tails are quickly found.
        """
        drawn = self.drawn
        if drawn is None or self.model is not self.start:
            fresh = _distribution(self.model, self.settings, random)
            drawn = Samples(fresh.samples, fresh.context)
        x, context, whole = drawn.points, drawn.context, drawn.at(drawn.points)
        failed = np.zeros(len(x), dtype=bool)
        for reward in self.utility.rewards:
            failed |= np.isnan(whole.values_of(reward))
        kept = np.flatnonzero(~failed)
        if self.utility.rewards:
            kept = kept[np.argsort(whole.values_of(self.utility.rewards[0])[kept], kind="stable")]
        if not kept.size:
            raise NoValues(f"none of the {len(x)} samples of a distribution has a value; look at its model")
        labels = self.model.context_labels(context)
        of_context = None if labels is None else labels.numpy(force=True)
        groups = Groups.of(of_context, kept, self.settings.group)
        log_p, index = np.log(groups.probabilities), torch.as_tensor(kept)
        own = FiniteDistribution(x[index], log_p, log_p, context=self.model.select_context(context, index))
        for reward in self.utility.rewards:
            own.evaluated[id(reward)] = (reward, own.points, whole.values_of(reward)[kept])
        known = tuple((reward, whole.values_of(reward)) for reward in self.utility.rewards)
        return own, groups, Samples(x, context, known)

    def step(self, k: int, random: torch.Generator) -> _Step | None:
        """The next step on fresh samples; None if none gains."""
        bank, groups, samples = self.bank(random)
        h = self.exponents.on(bank)
        try:
            level = self._level(bank)
        except InfeasibleBarrier as error:
            if k == 0:
                raise
            logger.warning("Flow Density Control: ends after %d of %d: %s", k, self.iterations, error)
            return None
        self.first = level if k == 0 else self.first
        _check_rise(self.first, level, k, range(self.iterations))
        share, weights = self.settings.share, self.settings.step_weight
        eta = None if weights is None else weight_of(weights, k)
        if self.settings.kl is not None:
            found = self._within_budget(bank, h, groups)
            if found is None:
                return None
        elif eta is None:
            gaining = self.settings.minimum_ess / len(h)
            found = find_step(self.utility, self.alpha, bank, h, share, groups, gaining=gaining)
        else:
            found = fixed_step(self.utility, self.alpha, bank, h, eta, groups)
        if eta is None and not found.gain > 0:
            if k == 0:
                raise NoStep(
                    f"Flow Density Control: on {len(h)} samples of the pretrained model no step both raises "
                    f"the objective and keeps an effective share of {share:g}, and "
                    f"{self.settings.minimum_ess:g} effective samples for what it adds; draw more samples, "
                    "or lower these, or look whether the utility varies at all"
                )
            logger.info("Flow Density Control: no step gains anything after %d of %d", k, self.iterations)
            return None
        if found.gain < 0:
            logger.warning(
                "Flow Density Control: at the fixed weight %g, step %d lowers the objective by %.4g on its "
                "samples; raise the weight, or let it be searched",
                *(eta, k + 1, -found.gain),
            )
        after = self.exponents.after(found, self.alpha).on(bank)
        log_z = float(groups.probabilities @ (after - h - found.under.log_weights))
        row = {
            "iteration": k + 1,
            "step_weight": found.eta,
            "gain": found.gain,
            "effective_share": found.under.effective_share,
            "step_kl": found.under.kl,
            "kl": found.under.mean(after) - self.log_z - log_z,
            "utility": level.value,
            "utility_promised": self.utility.finite_value(found.distribution),
            "failed_share": 1 - len(h) / len(samples.points),
        }
        if self.settings.kl is not None or self.measure is not None:
            row["divergence"] = row["kl"]  # solvers have a kl of their own solve
        row |= {f"{BANK}{name}": value for name, value in self._worth(samples).items()}
        return _Step(found, samples, log_z, row)

    def _worth(self, samples: Samples) -> dict[str, float]:
        """What samples are worth by the first reward."""
        if self.measure is None:
            return {}
        values = samples.at(samples.points).values_of(self.utility.rewards[0])
        return self.measure(samples.points, samples.context, values)

    def frontier(self, random: torch.Generator) -> list[dict[str, float]]:
        """Points of the frontier, that of the last model on samples of its own."""
        steps = {row["iteration"]: {**row, "kl": row["divergence"]} for row in self.history}
        return frontier_of(list(steps.values()), self._worth(self._check_last(random)))

    def _within_budget(self, bank: FiniteDistribution, h: np.ndarray, groups: Groups) -> MirrorStep | None:
        """The step along the first variation to the next divergence that the ascent aims at, or as far as the
        samples carry; None where all is spent."""
        settings = self.settings
        # After a trail that is known from its exponents on the samples; of the start it is 0.
        paid = (
            self.history[-1]["divergence"] if self.history else float(groups.probabilities @ h) - self.log_z
        )
        left = [goal for goal in goals(settings.kl or 0.0, settings.stage_kl) if goal > paid + SPENT]
        if not left:
            return None
        gaining = settings.minimum_ess / len(h)
        return bounded_step(
            self.utility, bank, h, (left[0], self.log_z), settings.share, groups, gaining=gaining
        )

    def _level(self, bank: FiniteDistribution) -> Level:
        """The utility on samples; the first variation is the influence of a sample."""
        influence = self.utility.finite_variation(bank)
        error = float(influence.std()) / math.sqrt(len(influence)) if len(influence) >= FEWEST else math.inf
        return Level(self.utility.finite_value(bank), error)

    def went(self, step: _Step, solution: Solution, done: int, random: torch.Generator) -> None:
        """Take in a step that a solver has taken, and look at where the last one has led."""
        self.model = solution.model
        self.exponents = self.exponents.after(step.found, self.alpha)
        self.log_z += step.log_z
        self.history += [{**step.row, **row} for row in solution.history]
        if done == self.iterations and self.measure is None:
            self._check_last(random)

    def _check_last(self, random: torch.Generator) -> Samples:
        """Look at where the last step has led. Returns samples of the model."""
        bank, _, samples = self.bank(random)
        try:
            _check_rise(self.first, self._level(bank), self.iterations, range(self.iterations))
        except InfeasibleBarrier as error:
            logger.warning("Flow Density Control: after the last step %s", error)
        return samples

    def trail(self) -> Trail:
        """What another ascent goes on from."""
        return Trail(self.done, self._rows(), self.log_z, list(self.first or ()))

    def follow(self, trail: Trail | None, generator: Callable[[int], torch.Generator]) -> None:
        """Take over what an earlier ascent has added up."""
        if trail is None:
            return
        self.earlier, self.log_z = trail.iterations, trail.log_z
        self.first = Level(*trail.first) if trail.first else None
        if trail.parts:
            self.exponents = self._read(trail.parts, self._template(generator))

    def _rows(self) -> list[list[float]]:
        """Weights and numbers of the first variations that the exponents are a sum of."""
        return [[weight, *numbers_of(part)] for weight, part in self.exponents.parts]

    def _template(self, generator: Callable[[int], torch.Generator]) -> FirstVariation:
        """Some first variation of the utility: which numbers it has, any samples say."""
        return self.utility.variation_at(self.bank(generator(0))[0])

    @staticmethod
    def _read(rows: list[list[float]], template: FirstVariation) -> Exponents:
        return Exponents(tuple((row[0], with_numbers(template, iter(row[1:]))) for row in rows))

    def tensors(self, width: int | None = None) -> dict[str, Tensor]:
        """All that an ascent goes on from, by name; ``width`` numbers a first variation has."""
        rows = self._rows()
        parts = torch.zeros(
            self.iterations * TRIALS, width or len(rows[0]), dtype=torch.float64, device="cpu"
        )
        if rows:
            parts[: len(rows)] = torch.tensor(rows, dtype=torch.float64, device="cpu")
        sizes = torch.tensor([float(len(rows)), self.log_z], dtype=torch.float64, device="cpu")
        return weights_of(self.model) | {"start": _kept(self.first), "parts": parts, "sizes": sizes}

    def take_up(self, slot: Slot | None, generator: Callable[[int], torch.Generator]) -> None:
        """Go on from the last state, if there is one."""
        if slot is None or not slot.path.is_file():
            return
        template = self._template(generator)
        self.model = copy.deepcopy(self.model).requires_grad_(False)
        tensors = self.tensors(1 + len(numbers_of(template)))
        self.history = slot.load(tensors, (self.settings, self.alpha)) or []
        value, error = tensors["start"].tolist()
        self.first = Level(value, error) if error >= 0 else None
        count, self.log_z = tensors["sizes"].tolist()
        self.exponents = self._read(tensors["parts"][: int(count)].tolist(), template)
