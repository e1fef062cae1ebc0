"""Annealed fitting: weighted fitting in stages, each on a fresh bank of the model of the stage before.

A bank of pretrained samples carries a strong tilt on a handful of them. A chain of tilts does not: with
exponents ``h_0 = 0, h_1, ...`` the models ``p_k``, proportional to ``p_base exp(h_k)`` within each context,
are near to one another, and a stage moves along the straight line to the exponents ``h*`` that are aimed at,

    h_{k+1} = h_k + d (h* - h_k),    weights of the bank from p_k:  exp(d (h* - h_k)),

by the largest ``d`` up to 1 at which the bank keeps a given share of effective samples, and what is added
rests on enough of them (bisection). For a
tilt that is given, ``h* = f / lambda`` throughout, and ``h_k = s_k h*`` with a rising strength ``s_k``.

For a tail mean the aim is the hinge at the dual threshold, which one batch of pretrained samples finds only
where the batch reaches the tail: else the dual is ruled by the single best sample, and no sample of a
training has a gradient. Here *all banks of the chain* are samples of the base, each with the weight

    1 / sum_k n_k exp(h_k(x)) / Z_k     (within its context),

whose normalisers ``Z_k`` make every ``p_k`` a distribution (Vardi 1985; Shirts and Chodera 2008). With one
bank this is ``exp(-h_k) Z_k``; of several it is the combination of least variance, where means of those
weights over each bank would have none at all. So the threshold is found anew in each stage, from samples that
are nearer to the tail the further the chain has come, and the chain ends when a whole step changes nothing
any more.

A chain may aim at divergences instead of at a KL weight. Then stage by stage its model is the optimum of its
*own* problem, whose KL weight is the least at which the optimum

    pays no more than the next multiple of ``stage_kl``, in nats from the base, and
    keeps the effective samples of the bank, and rests on enough of them,

the first on all banks of the chain, the second on the last one: a multiple that one bank does not carry takes
more stages, each with an optimum that pays less. So every stage is a point of the frontier of what is raised
against what is paid. What a nat buys is measured on the next bank, which no draw is wasted on.

A stage's weights promise a mean of the tilt, and the next bank has the one that was reached: the difference
is the error of the fit, in the history of each solve.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtilt.control.base import Progress, Solution
from flowtilt.control.weighted_fitting import (
    Bank,
    Draw,
    Samples,
    UnusableBank,
    WeightedFittingSettings,
    draw_samples,
    fit,
    weigh,
)
from flowtilt.devices import seeded
from flowtilt.functionals.base import FirstVariation
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.metrics.tails import quantile
from flowtilt.model import Context, FlowModel
from flowtilt.ranges import COUNT, NOT_NEGATIVE, POSITIVE, between, check, check_value
from flowtilt.resuming import Slot, weights_of
from flowtilt.rewards import Reward
from flowtilt.tfft import TailProblem
from flowtilt.tilts import Groups, strongest, tilted

logger = logging.getLogger(__name__)

Row = dict[str, float]

LEAST_STEP = 1e-4
"""Share of the way at which the first stage is given up: it would take ten thousand like it."""

FINE = 1.25
"""Factor between the KL weights that a budget's search tries first."""

BANK = "bank_"
"""What the columns begin with that say what a stage's bank is worth."""

REACHED = 100
"""Effective samples, of those that a tail's optimum adds mass to, from which its threshold stays: they know
the mean of the exponential to a tenth, and so the threshold to a tenth of a nat."""

STAGE_COLUMNS = (
    *("stage", "step", "strength", "parameter", "effective_sample_size"),
    *("effective_share", "least_effective_share"),
    *("stage_kl", "kl", "mean_before", "mean_promised"),
)
"""Columns of the history that are the same in all rows of a stage; see :class:`AnnealedSolution`."""


@dataclass(frozen=True)
class AnnealedFittingSettings:
    """How the stages are chosen, and how each is fitted.

    Attributes:
        fitting: bank and fit of each stage; the penalty is KL, the one whose tilts add up.
        share: effective samples that a stage's weights keep, as a share of the bank.
        stages: most stages.
        settled: nats below which what is left to do is left.
        kl: divergence from the base at which the chain ends, in nats; the KL weight then follows from it.
        stage_kl: what each stage adds to the divergence, in nats, up to the last one; by default all of it.
    """

    fitting: WeightedFittingSettings = field(default_factory=WeightedFittingSettings)
    share: float = 0.3
    stages: int = 20
    settled: float = 1e-3
    kl: float | None = None
    stage_kl: float | None = None

    def __post_init__(self) -> None:
        check(self, share=between(0, 1), stages=COUNT, settled=NOT_NEGATIVE)
        check_budget(self.kl, self.stage_kl)
        if self.fitting.penalty != "kl":
            raise ValueError(
                f"penalty must be kl for annealed fitting, got {self.fitting.penalty!r}: only exponential "
                "tilts of tilts are tilts; take weighted_fitting for another"
            )
        kept = self.share * self.fitting.bank
        if kept < self.fitting.minimum_ess:
            raise ValueError(
                f"share {self.share:g} of a bank of {self.fitting.bank} keeps {kept:.4g} effective samples, "
                f"below the minimum_ess of {self.fitting.minimum_ess:g}: no stage could; draw a larger bank, "
                "or raise the share"
            )

    @property
    def goals(self) -> list[float]:
        """The divergences that a chain aims at, in nats; none without a budget."""
        return [] if self.kl is None else goals(self.kl, self.stage_kl)


def check_budget(kl: float | None, stage_kl: float | None) -> None:
    """Refuse a divergence that is not positive, and that of a stage without or beyond the whole.

    Raises:
        ValueError: if they are.
    """
    if stage_kl is not None and (kl is None or not 0 < stage_kl <= kl):
        raise ValueError(
            f"stage_kl must be positive and at most kl, the divergence of all stages, got {stage_kl=} "
            f"and {kl=}"
        )
    if kl is not None and not 0 < kl < math.inf:
        raise ValueError(f"kl must be positive and finite, got {kl}")


def goals(kl: float, stage_kl: float | None) -> list[float]:
    """The divergences that a chain with a budget aims at, one after the other, in nats."""
    each = kl if stage_kl is None else stage_kl
    count = math.ceil(kl / each - 1e-9)
    return [min(kl, each * k) for k in range(1, count)] + [kl]


Measure = Callable[[Tensor, Context, np.ndarray], Row]
"""What a set of samples is worth, from samples, their contexts, and what they are tilted by, NaN where that
has no value."""


@dataclass
class AnnealedSolution(Solution):
    """A solution with what each stage was worth.

    Attributes:
        stages: a row each: ``stage``, from 1; ``step``, the share d of what was left that it went;
            ``strength``, how far the chain has come; ``parameter`` of the aim, the KL weight or a tail's
            threshold; ``effective_sample_size`` and ``effective_share`` of the bank, and the
            ``least_effective_share`` of a group; ``stage_kl``, what the stage pays, and ``kl``, the tilt's
            divergence from the base, in nats;
            ``mean_before`` and ``mean_promised`` of the tilt's value on the bank, and ``mean_reached`` on the
            next. With a budget also ``kl_weight``, of the problem that the stage's target is the optimum of.
        frontier: a row for the base and each stage, if they were measured: ``stage``, from 0, ``kl``, and
            what the bank of the stage's model was found to be worth.
    """

    stages: list[Row] = field(default_factory=list)
    frontier: list[Row] = field(default_factory=list)


Exponents = Callable[[Any, np.ndarray], np.ndarray]
"""Exponents of a target with a parameter, at values (n,), in nats. With a budget the parameter is a pair:
that of the target, and the KL weight."""

Optimum = Callable[[float, np.ndarray, np.ndarray, Groups], float]
"""The parameter of the optimum under a KL weight, from values of samples, their weights under the base (n,),
and their groups."""


@dataclass
class _Chain:
    """What is known after some stages: banks, and the exponents of their models as functions of the value.

    ``h_k`` is a mean of the targets up to then, whose weights are ``(1 - d_k) (1 - d_{k-1}) ...``.

    Attributes:
        exponents: of a target with a parameter, at values (n,).
        size: samples of a bank; what failed is not in it.
        values: of each bank's samples, zero beyond ``counts``, (stages + 1, size).
        labels: of their contexts, and then of those of samples that failed, (stages + 1, size).
        counts: samples of each bank, whole numbers, (stages + 1,).
        drawn: the same with those that failed: their contexts are no rarer for it, (stages + 1,).
        steps: d of each stage, (stages,).
        parameters: of each stage's target, (stages,); with a budget pairs, (stages, 2).
        log_z: mean over contexts of the logarithm of the last model's normaliser, (1,).
        fixed: 1 once the target's parameter is known well enough to stay, and that parameter; else 0, (2,).
            With a budget, how many of its goals are reached, and 0.
    """

    exponents: Exponents
    values: Tensor
    labels: Tensor
    counts: Tensor
    drawn: Tensor
    steps: Tensor
    parameters: Tensor
    log_z: Tensor
    fixed: Tensor

    @classmethod
    def empty(cls, exponents: Exponents, settings: AnnealedFittingSettings, size: int) -> _Chain:
        stages = settings.stages

        def zeros(*shape: int, of: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=of, device="cpu")

        banks, whole = stages + 1, torch.int64
        counts, drawn = zeros(banks, of=whole), zeros(banks, of=whole)
        values, labels = zeros(banks, size), zeros(banks, size, of=whole)
        parameters = zeros(stages) if settings.kl is None else zeros(stages, 2)
        more = zeros(stages), parameters, zeros(1), zeros(2)
        return cls(exponents, values, labels, counts, drawn, *more)

    def tensors(self) -> dict[str, Tensor]:
        """All that a chain is continued from, by name: the tensors themselves."""
        return {f"chain.{f.name}": getattr(self, f.name) for f in fields(self) if f.name != "exponents"}

    def add(self, stage: int, draw: Draw, labels: Tensor | None) -> None:
        """Take in the bank of the stage with this number from 0, and the labels of its contexts."""
        count = len(draw.values)
        self.values[stage, :count] = torch.from_numpy(draw.values)
        if labels is not None:
            failed = torch.ones_like(labels, dtype=torch.bool)
            failed[draw.order] = False
            every = torch.cat([labels[draw.order], labels[failed]])
            self.labels[stage, : len(every)] = every.to(self.labels)
        self.counts[stage], self.drawn[stage] = count, draw.drawn

    def went(self, stage: int, what: _Stage) -> None:
        """Take in what a stage has done."""
        self.steps[stage] = what.step
        self.parameters[stage] = torch.as_tensor(what.parameter, dtype=torch.float64)
        if what.reaches:
            self.fixed[0] += 1
        self.log_z += what.log_z

    @property
    def strength(self) -> float:
        """How far the chain has come, from 0 to 1."""
        return float(1 - (1 - self.steps).prod())

    def of(self, stage: int, values: np.ndarray) -> np.ndarray:
        """``h_stage``: the exponents of the model that the bank of this stage is from, (n,)."""
        h = np.zeros_like(values)
        for d, parameter in zip(self.steps[:stage].tolist(), self.parameters[:stage].tolist(), strict=True):
            h = h + d * (self.exponents(parameter, values) - h)
        return h

    def as_base(self, stages: int, least: int) -> tuple[np.ndarray, np.ndarray, Groups]:
        """Values, weights under the base, and groups of all samples of the first banks."""
        counts, drawn = self.counts[:stages].tolist(), self.drawn[:stages].tolist()
        values = np.concatenate([self.values[k, :n].numpy() for k, n in enumerate(counts)])
        labels = np.concatenate([self.labels[k, :n].numpy() for k, n in enumerate(drawn)])
        starts = np.cumsum([0, *drawn[:-1]])
        kept = np.concatenate([start + np.arange(n) for start, n in zip(starts, counts, strict=True)])
        groups = Groups.of(labels, kept, least)
        of_bank = np.repeat(np.arange(stages), counts)
        every = np.stack([self.of(k, values) for k in range(stages)])
        return values, base_weights(every, of_bank, groups), groups


def base_weights(
    exponents: np.ndarray, banks: np.ndarray, groups: Groups, tolerance: float = 1e-9, most: int = 100
) -> np.ndarray:
    """Weights that make samples of several tilts of a base into samples of the base, of sum 1, (N,).

    With ``n_k`` samples of the tilt by ``h_k`` in a group, these are proportional to
    ``1 / sum_k n_k exp(h_k(x)) / Z_k``, where ``Z_k`` is the mean of ``exp(h_k)`` under these very weights
    (Shirts and Chodera 2008, equation 11), for each group by itself. The ``log Z_k`` minimise a convex
    function; Newton's method takes some ten steps, where repeating the equation may take thousands.

    Args:
        exponents: ``h_k`` at every sample, in nats, (banks, N); of the base itself they are 0.
        banks: the bank that each sample is of, whole numbers, (N,).
        groups: of the samples; each keeps its probability.
        tolerance: change of ``log Z`` at which the method ends.
        most: steps of it.
    """
    weights = np.empty(exponents.shape[1])
    for group, share in enumerate(groups.shares):
        own = np.flatnonzero(groups.labels == group)
        count = np.bincount(banks[own], minlength=len(exponents)).astype(float)
        held = count > 0
        h, bank = exponents[np.ix_(held, own)], np.cumsum(held)[banks[own]] - 1
        log_w = _log_base_weights(h, bank, tolerance, most)
        weights[own] = share * np.exp(log_w)
    return weights


def _log_base_weights(h: np.ndarray, banks: np.ndarray, tolerance: float, most: int) -> np.ndarray:
    """Log weights of sum 1 in one group, (n,), from ``h`` (banks, n) and the bank of each sample, (n,)."""
    count = np.bincount(banks).astype(float)

    def at(log_z: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The convex function, the log of the sum, and each bank's part of it, (banks, n)."""
        terms = h + (np.log(count) - log_z)[:, None]
        top = terms.max(axis=0)
        parts = np.exp(terms - top)
        total = parts.sum(axis=0)
        log_sum = top + np.log(total)
        return float(log_sum.sum() + count @ log_z), log_sum, parts / total

    # Each bank from the one before, which it is near: Newton's method needs a start where banks overlap.
    log_z = np.zeros(len(count))
    for k in range(1, len(count)):
        rise = (h[k] - h[k - 1])[banks == k - 1]
        log_z[k] = log_z[k - 1] + np.logaddexp.reduce(rise) - np.log(len(rise))
    value, log_sum, parts = at(log_z)
    for _ in range(most):
        of_bank = parts.sum(axis=1)
        # Singular along equal shifts of all log Z, which change no weight: the least squares leave them out.
        step = np.linalg.lstsq(np.diag(of_bank) - parts @ parts.T, of_bank - count, rcond=1e-12)[0]
        size = 1.0
        while (new := at(log_z + size * step))[0] > value + 1e-9 * abs(value) and size > 1e-6:
            size /= 2
        log_z, (value, log_sum, parts) = log_z + size * step, new
        if float(np.abs(size * step).max()) < tolerance:
            break
    return -log_sum - np.logaddexp.reduce(-log_sum)


def solve(
    base: FlowModel,
    tilt: FirstVariation,
    kl_weight: float,
    settings: AnnealedFittingSettings,
    generator: torch.Generator,
    progress: Progress | None = None,
    slot: Slot | None = None,
    given: Samples | None = None,
    measure: Measure | None = None,
) -> AnnealedSolution:
    """Fit a copy of ``base`` to the distribution that maximises ``E[tilt] - kl_weight KL``, in stages.

    Args:
        base: the model to tilt; left unchanged.
        tilt: what to tilt by; its gradient is never asked for.
        kl_weight: weight of the divergence, positive, in units of the tilt a nat. Where the settings have a
            budget, that takes its place.
        settings: of the stages.
        generator: source of all randomness.
        progress: called with each update's row.
        slot: where the chain keeps its state, and goes on from if it was stopped.
        given: samples of ``base`` that are the bank of the first stage; else one is drawn.
        measure: of each bank and of the last model's; what it finds is in the history, as ``bank_...``, and
            in the frontier.

    Returns:
        The model of the last stage, the stages' rows, and a history: that of weighted fitting over all
        stages, with the columns of the stage in each row. Its diagnostics are the last stage's ``strength``,
        ``kl``, ``parameter`` and ``mean_reached``, the number of ``stages``, the least ``effective_share`` of
        one, and all ``network_passes``, the last bank's included.

    Raises:
        ValueError: if ``kl_weight`` is not positive, or values are infinite.
        UnusableBank: if no stage can keep its effective samples.
        TrainingDiverged: if a fit diverges.
        CheckpointError: if the state to go on from belongs to another solve.
    """
    check_value("the KL weight of a solve", kl_weight, POSITIVE)
    budget = settings.kl is not None

    def exponents(at: Any, values: np.ndarray) -> np.ndarray:
        return values / (at[1] if budget else kl_weight)

    chain = _Chain.empty(exponents, settings, _largest(settings, given))
    optimum = _itself if budget else None
    anneal = _Annealing(
        *(base, tilt, chain, lambda stage: kl_weight, settings, (settings, kl_weight), given),
        *(None, measure, optimum),
    )
    return anneal.run(generator, progress, slot)


def _itself(weight: float, values: np.ndarray, weights: np.ndarray, groups: Groups) -> float:
    """The KL weight is all that the optimum of an expected reward takes."""
    return weight


def _largest(settings: AnnealedFittingSettings, given: Samples | None) -> int:
    """Samples of the largest bank of a chain."""
    return max(settings.fitting.bank, 0 if given is None else len(given.points))


def solve_tail(
    base: FlowModel,
    reward: Reward,
    problem: TailProblem,
    settings: AnnealedFittingSettings,
    generator: torch.Generator,
    progress: Progress | None = None,
    slot: Slot | None = None,
    given: Samples | None = None,
    measure: Measure | None = None,
) -> AnnealedSolution:
    """Fit a copy of ``base`` to the optimum of a tail mean under KL, whose threshold the chain finds.

    Other arguments, results and errors are those of :func:`solve`. The mean of the stages is the reward's.

    Args:
        reward: whose tail is raised.
        problem: the tail, its mass and the KL weight, whose place a budget takes.
    """

    def hinge(at: float, values: np.ndarray) -> np.ndarray:
        return problem.pseudo_reward(reward, at).of_rewards(values) / problem.alpha

    def active(at: float, values: np.ndarray) -> np.ndarray:
        return values < at if problem.tail == "lower" else values > at

    tilt, identity = RewardVariation(reward), (settings, problem)
    if settings.kl is not None:

        def optimum(weight: float, values: np.ndarray, weights: np.ndarray, groups: Groups) -> float:
            return replace(problem, alpha=weight).threshold(values, weights, groups.labels)

        def hinge_under(at: Any, values: np.ndarray) -> np.ndarray:
            return problem.pseudo_reward(reward, at[0]).of_rewards(values) / at[1]

        chain = _Chain.empty(hinge_under, settings, _largest(settings, given))
        anneal = _Annealing(
            *(base, tilt, chain, lambda stage: 0.0, settings, identity, given),
            *(lambda at, values: active(at[0], values), measure, optimum),
        )
        return anneal.run(generator, progress, slot)
    chain = _Chain.empty(hinge, settings, _largest(settings, given))

    def threshold(stage: int) -> float:
        known, at = chain.fixed.tolist()
        if not known:
            values, weights, groups = chain.as_base(stage + 1, settings.fitting.group)
            at = problem.threshold(values, weights, groups.labels)
            # Later banks are of the fits and not of their exponents: a threshold from them follows what each
            # fit has missed, the next fit misses more, and so on. So it stays as soon as it is known.
            if _carrying(hinge(at, values), groups, weights) >= REACHED:
                chain.fixed[:] = torch.tensor([1.0, at], dtype=torch.float64)
        if problem.tail == "lower":
            return at
        # At the optimum an upper tail holds just its mass. A bank that holds less than half of it past the
        # threshold is not there yet, and the few samples that are would carry all: aim at its own tail first.
        own = chain.values[stage, : int(chain.counts[stage])].numpy()
        return min(at, quantile(own, 1 - problem.mass / 2))

    anneal = _Annealing(base, tilt, chain, threshold, settings, identity, given, active, measure)
    return anneal.run(generator, progress, slot)


def _carrying(exponents: np.ndarray, groups: Groups, weights: np.ndarray) -> float:
    """Effective samples among those that a tilt adds mass to, from samples with weights of sum 1, (N,)."""
    with np.errstate(divide="ignore"):
        added = np.maximum(tilted(exponents, groups, np.log(weights)).probabilities - weights, 0)
    return float(added.sum()) ** 2 / max(float(added @ added), 1e-300)


@dataclass(frozen=True)
class _Stage:
    """One stage on its bank.

    Attributes:
        bank: weighted.
        step: d.
        parameter: of the target.
        log_z: what the stage adds to the mean over contexts of ``log Z``.
        row: its columns in the history.
        reaches: whether it reaches the next goal of a budget.
    """

    bank: Bank
    step: float
    parameter: Any
    log_z: float
    row: Row
    reaches: bool = False


@dataclass(frozen=True)
class _Annealing:
    """A chain of fits towards a target.

    Attributes:
        base: the model to tilt.
        tilt: whose values the exponents are functions of.
        chain: of the banks.
        parameter: of a stage's target, from its number.
        settings: of the stages.
        identity: what a state must be of.
        given: bank of the first stage; None to draw it.
        active: samples that carry a gradient of a target with a parameter, from values (n,); None for the
            tilt's own.
        measure: of each bank.
        optimum: that of a KL weight, where the settings have a budget.
    """

    base: FlowModel
    tilt: FirstVariation
    chain: _Chain
    parameter: Callable[[int], float]
    settings: AnnealedFittingSettings
    identity: Any
    given: Samples | None = None
    active: Callable[[Any, np.ndarray], np.ndarray] | None = None
    measure: Measure | None = None
    optimum: Optimum | None = None

    def run(
        self, generator: torch.Generator, progress: Progress | None, slot: Slot | None
    ) -> AnnealedSolution:
        """All stages that are still to be done; see :func:`solve`."""
        # A seed for each stage: one that is taken up again is the same as without an interruption.
        seeds = torch.randint(2**62, (self.settings.stages + 1,), generator=generator).tolist()
        model, history = self._taken_up(slot)
        done = int(history[-1]["stage"]) if history else 0
        for number in range(done, self.settings.stages + 1):
            started, random = time.perf_counter(), seeded(seeds[number])
            first = self.given if number == 0 else None
            draw = draw_samples(model, self.tilt, self.settings.fitting, random, first)
            stage = self._plan(number, draw, model)
            worth = self._measured(draw)
            if stage is None:
                break
            inner = None if slot is None else slot.resumption.slot(f"{slot.name}-stage-{number + 1}")
            columns = stage.row | {f"{BANK}{key}": value for key, value in worth.items()}
            rows = _Rows(columns, history[-1] if history else {}, progress)
            settings = (self.settings.fitting, stage.step)
            fitted = fit(model, stage.bank, settings, random, rows.report, inner, started)
            model = fitted.model
            history += [rows.of(row) for row in fitted.history]
            self.chain.went(number, stage)
            if slot is not None and inner is not None and (slot.resumption.due() or inner.path.is_file()):
                slot.save(weights_of(model) | self.chain.tensors(), history, self.identity)
                inner.discard()
        return self._solution(model, history, float(draw.groups.probabilities @ draw.values), worth)

    def _measured(self, draw: Draw) -> Row:
        """What a bank is worth, in the order of its draws but for those that failed, which come last."""
        if self.measure is None:
            return {}
        return self.measure(draw.samples, self.base.select_context(draw.context, draw.order), draw.values)

    def _taken_up(self, slot: Slot | None) -> tuple[FlowModel, list[Row]]:
        """The model and history of the last state, or the beginning."""
        model = copy.deepcopy(self.base).requires_grad_(False)
        if slot is None:
            return model, []
        return model, slot.load(weights_of(model) | self.chain.tensors(), self.identity) or []

    def _plan(self, number: int, draw: Draw, model: FlowModel) -> _Stage | None:
        """The stage with this number from 0 on its bank; None if nothing is left to do, or no stage.

        Raises:
            UnusableBank: if the first stage gets nowhere.
        """
        chain, settings, values = self.chain, self.settings, draw.values
        chain.add(number, draw, model.context_labels(draw.context))
        h = chain.of(number, values)
        parameter, reaches = self._aim(number, draw, h)
        if parameter is None:
            self._say_what_is_left(number)
            return None
        left = chain.exponents(parameter, values) - h
        gaining = settings.fitting.minimum_ess / len(values)
        step = strongest(left, draw.groups, settings.share, gaining=gaining)
        if self._ends(number, draw, left, step, reaches):
            return None
        if self.active is not None:
            draw = replace(draw, active=torch.as_tensor(self.active(parameter, values)))
        bank = weigh(draw, step * left, 1.0, settings.fitting)
        under = tilted(step * left, draw.groups)
        log_z = float(draw.groups.probabilities @ (step * left - under.log_weights))
        row: Row = {
            "stage": number + 1,
            "step": step,
            "strength": 1 - (1 - chain.strength) * (1 - step),
            "parameter": parameter,
            "effective_sample_size": under.effective_share * len(values),
            "effective_share": under.effective_share,
            "least_effective_share": float(under.effective_shares.min()),
            "stage_kl": under.kl,
            "kl": under.mean(h + step * left) - float(chain.log_z) - log_z,
            "mean_before": float(draw.groups.probabilities @ values),
            "mean_promised": under.mean(values),
        }
        if settings.kl is not None:
            at, weight = parameter
            paid = self._paid(number, parameter, step)
            row |= {"strength": paid / settings.kl, "parameter": at, "kl": paid, "kl_weight": weight}
        return _Stage(bank, step, parameter, log_z, row, reaches and step == 1)

    def _aim(self, number: int, draw: Draw, h: np.ndarray) -> tuple[Any, bool]:
        """The parameter of a stage's target, None if nothing is left of a budget, and whether that is its
        next goal."""
        if self.optimum is None:
            return self.parameter(number), False
        if number == self.settings.stages or self.chain.fixed[0] == len(self.settings.goals):
            return None, False
        return self._within(number, draw, h)

    def _ends(self, number: int, draw: Draw, left: np.ndarray, step: float, reaches: bool) -> bool:
        """Whether the chain ends before this stage; says in the log why, if it has not arrived.

        Raises:
            UnusableBank: if it is the first.
        """
        settings, size = self.settings, len(draw.values)
        little = tilted(left, draw.groups).kl <= settings.settled
        if number == 0 and (step < LEAST_STEP or (little and self.optimum is not None and not reaches)):
            raise UnusableBank(
                f"a bank of {size} samples keeps an effective share of {settings.share:g}, and "
                f"{settings.fitting.minimum_ess:g} effective samples for what it adds, for {step:.2g} of the "
                f"tilt alone, whose exponents are {np.ptp(left):.3g} nats apart: no number of stages gets "
                "there; raise the KL weight, draw a larger bank, or rescale the values"
            )
        if number > 0 and little:
            self._say_what_is_left(number)
            return True
        if number == settings.stages or step < LEAST_STEP:
            logger.warning(
                "annealed fitting: after %d stages the tilt has come %.3g of the way, which the model is "
                "fitted to; raise stages, draw larger banks, or lower share",
                *(number, self.chain.strength),
            )
            return True
        return False

    def _say_what_is_left(self, number: int) -> None:
        """In the log, where a chain with a budget ends before it is spent."""
        every = self.settings.goals
        if self.optimum is not None and (reached := int(self.chain.fixed[0])) < len(every):
            logger.warning(
                "annealed fitting: after %d stages %d of the %d divergences that the chain aims at are "
                "reached, and the next one, of %.3g nats, is not; raise stages, draw larger banks, or lower "
                "share or minimum_ess",
                *(number, reached, len(every), every[reached]),
            )

    def _paid(self, number: int, parameter: Any, step: float = 1.0) -> float:
        """Divergence from the base of what a step towards a target leads to, on all banks, in nats."""
        values, weights, groups = self.chain.as_base(number + 1, self.settings.fitting.group)
        h = self.chain.of(number, values)
        with np.errstate(divide="ignore"):
            log_p = np.log(weights)
        return tilted(h + step * (self.chain.exponents(parameter, values) - h), groups, log_p).kl

    def _within(self, number: int, draw: Draw, h: np.ndarray) -> tuple[Any, bool]:
        """The parameter of the strongest optimum within the next goal that the bank carries, and whether it
        reaches the goal.

        From the weight of the stage before, at which there is nothing to carry, in small steps to where
        either ends, and there by bisection: a threshold moves with the weight, and no share need fall
        steadily. Where already that weight, at the threshold as it is known now, is not carried, it is the
        goal itself, to which the stage goes a part of the way.
        """
        chain, settings = self.chain, self.settings
        assert self.optimum is not None
        goal = settings.goals[int(chain.fixed[0])]
        values, weights, groups = chain.as_base(number + 1, settings.fitting.group)
        with np.errstate(divide="ignore"):
            log_p = np.log(weights)
        optimum, least = self.optimum, settings.fitting.minimum_ess / len(draw.values)

        def target(weight: float) -> tuple[float, float]:
            return optimum(weight, values, weights, groups), weight

        def paid(weight: float) -> float:
            return tilted(chain.exponents(target(weight), values), groups, log_p).kl

        def carried(weight: float) -> bool:
            under = tilted(chain.exponents(target(weight), draw.values) - h, draw.groups)
            rests = under.kl <= settings.settled or under.gaining_share >= least
            return under.effective_share >= settings.share and rests

        high = float(chain.parameters[number - 1, 1]) if number else float(np.ptp(values)) or 1.0
        while paid(high) > goal * (1 if number else 0.01):
            high *= FINE
        if not carried(high):
            return target(_last(lambda weight: paid(weight) <= goal, high)), True
        low = _last(lambda weight: paid(weight) <= goal and carried(weight), high)
        return target(low), paid(low * (1 - 1e-6)) > goal

    def _solution(self, model: FlowModel, history: list[Row], reached: float, worth: Row) -> AnnealedSolution:
        stages: list[Row] = []
        for row in history:
            if stages and stages[-1]["stage"] == row["stage"]:
                stages.pop()
            elif stages:
                stages[-1]["mean_reached"] = row["mean_before"]
            stages.append({key: value for key, value in row.items() if _of_stage(key)})
        last = stages[-1]
        last["mean_reached"] = reached
        diagnostics = {key: last[key] for key in ("strength", "kl", "parameter", "mean_reached")}
        diagnostics["stages"] = float(len(stages))
        diagnostics["effective_share"] = min(row["effective_share"] for row in stages)
        diagnostics["network_passes"] = history[-1]["network_passes"] + (
            self.settings.fitting.passes * self.base.evaluations("sampling")
        )
        frontier = frontier_of(stages, worth) if worth else []
        return AnnealedSolution(model, history, diagnostics, stages, frontier)


def _of_stage(column: str) -> bool:
    return column in (*STAGE_COLUMNS, "kl_weight") or column.startswith(BANK)


def frontier_of(stages: Sequence[Row], worth: Row) -> list[Row]:
    """Points of the frontier: what the base's bank is worth, and that of the model of each stage.

    Args:
        stages: rows with ``kl``, of the model after the stage, and with columns ``bank_...``, of the bank
            before it.
        worth: of the last model's bank.
    """
    banks = [{k.removeprefix(BANK): v for k, v in row.items() if k.startswith(BANK)} for row in stages]
    paid = [0.0, *(row["kl"] for row in stages)]
    pairs = zip(paid, [*banks, worth], strict=True)
    return [{"stage": float(k), "kl": kl, **bank} for k, (kl, bank) in enumerate(pairs)]


def _last(holds: Callable[[float], bool], start: float) -> float:
    """The least weight down to which a condition holds from ``start``, to nine digits; at most a millionth
    of a millionth of it."""
    high, low = start, start / FINE
    while holds(low) and low > 1e-12 * start:
        high, low = low, low / FINE
    while high - low > 1e-9 * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class _Rows:
    """Rows of one stage's fit as rows of the chain.

    Attributes:
        columns: of the stage.
        before: the last row before the stage; empty in the first.
        progress: called with each row.
    """

    columns: Row
    before: Row
    progress: Progress | None

    def of(self, row: Row) -> Row:
        sums = {key: row[key] + self.before.get(key, 0) for key in ("network_passes", "seconds")}
        return {**row, **sums, **self.columns}

    def report(self, row: Row) -> None:
        """Show a row as one of the chain; what is added to it there, as counts of energies are, it keeps."""
        if self.progress is not None:
            shown = self.of(row)
            known = [*shown]
            self.progress(shown)
            row |= {key: value for key, value in shown.items() if key not in known}
