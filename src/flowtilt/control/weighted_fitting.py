"""Weighted fitting (Bobrin et al. 2026): reach a tilted distribution without a gradient of the reward.

The problem ``max_p E_p[f] - lambda D(p || p_base)`` is first solved on a bank of samples of the base
model, where it is a small convex problem whose solution is a weight for each sample
(:mod:`flowtilt.control.penalties`; for KL the weights are ``exp(f / lambda)``, normalised). Then a
copy of the base is fitted by its native flow-matching loss to samples drawn from the bank with
those weights, under fresh noise.

The noise of that loss is as large for a small tilt as for a large one. But the base has the least loss
on its own samples: its residuals there are orthogonal to every direction in which the model can move.
They are a control variate, which takes out most of the noise where weights are near 1 (see
:func:`plan_draws`), and leaves the base exactly as it is where there is nothing to tilt. Where the loss is
not a square, the gradient at the base has that part.

Weights are normalised within each context (:mod:`flowtilt.tilts`), whose probabilities no model changes. A
sample whose value is NaN, of a reward that may fail, is left out of its context, as if the base never drew
it.

What bounds the method is the bank: a distribution that the base hardly samples is carried by few samples.
The effective sample size says how many; a low one is reported, an unusable one refused. Past that bound goes
:mod:`flowtilt.control.annealed_fitting`.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowtilt.control.base import (
    FORWARD,
    TRAINING,
    Annealing,
    Progress,
    Solution,
    TrainingDiverged,
    check_optimiser,
    rate_of,
)
from flowtilt.control.penalties import BankWeights, penalty_named, solve_weights_within
from flowtilt.functionals.base import FiniteDistribution, FirstVariation
from flowtilt.model import Context, FlowModel, evaluating
from flowtilt.optimiser import Adam
from flowtilt.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, between, check, check_value
from flowtilt.resuming import Slot, TrainingState
from flowtilt.rewards import Reward
from flowtilt.sampling import CHUNK, OdeSettings, sample_ode, sample_sde
from flowtilt.tilts import LEAST, Groups

logger = logging.getLogger(__name__)


LARGEST_RISE = 100.0
"""Factor over the loss at the start, which is the base's and ought to fall, at which a fit is given up."""


class UnusableBank(ArithmeticError):
    """The weights leave too few effective samples to fit a model to."""


@dataclass(frozen=True)
class WeightedFittingSettings:
    """How the bank is drawn and the model fitted.

    Attributes:
        bank: samples of the base model.
        sampler: how they are drawn: by the probability-flow ODE, or by the memoryless SDE. Where
            ``alpha(0)`` is not 0 the ODE's distribution differs from the data's by about that share of its
            mean.
        steps: time steps of the sampler; the ODE takes four network passes each, the SDE one.
        penalty: name of the divergence from the base, of :data:`flowtilt.control.penalties.PENALTIES`.
        group: samples of a context below which it is pooled with its neighbours, see
            :meth:`flowtilt.tilts.Groups.of`. At ten, normalisers are off by a tenth of the weights' variance.
        minimum_ess: effective samples below which the bank is refused.
        warning_ess: effective samples below which there is a warning.
        updates: optimiser steps.
        batch: samples an update.
        learning_rate: of Adam, warmed up over ``warmup`` of the updates and annealed to zero by a cosine.
        warmup: share of the updates.
        annealing: ``cosine``, or ``none`` for the largest rate from the warm-up to the end.
        moments: decay rates of Adam's means of gradients and of their squares.
        weight_decay: of AdamW.
        gradient_clip: bound on the norm of the parameters' gradient.
        margin: distance kept from both ends of time, where a target may be singular.
    """

    bank: int = 20_000
    sampler: Literal["ode", "sde"] = "ode"
    steps: int = 16
    penalty: str = "kl"
    group: int = LEAST
    minimum_ess: float = 50.0
    warning_ess: float = 500.0
    updates: int = 1000
    batch: int = 512
    learning_rate: float = 1e-3
    warmup: float = 0.05
    annealing: Annealing = "cosine"
    moments: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    margin: float = 1e-3

    def __post_init__(self) -> None:
        penalty_named(self.penalty)
        if self.sampler not in ("ode", "sde"):
            raise ValueError(f"sampler must be 'ode' or 'sde', got {self.sampler!r}")
        check(self, bank=COUNT, steps=COUNT, group=COUNT, updates=COUNT, batch=COUNT)
        check(self, minimum_ess=NOT_NEGATIVE, warning_ess=NOT_NEGATIVE)
        check(self, learning_rate=POSITIVE, gradient_clip=POSITIVE, warmup=SHARE, margin=between(0, 0.5))
        check_optimiser(self)
        if not self.minimum_ess <= self.bank:
            raise ValueError(
                f"a bank of {self.bank} cannot reach the minimum_ess of {self.minimum_ess:g}; "
                "draw a larger bank"
            )

    @property
    def passes(self) -> int:
        """Network passes that a bank takes: four evaluations a step of the ODE, one of the SDE."""
        return self.bank * self.steps * (4 if self.sampler == "ode" else 1) * FORWARD


@dataclass(frozen=True)
class Samples:
    """Samples of a model that were drawn before, for all that needs a bank of it.

    Attributes:
        points: (N, ...).
        context: of them, in the same order.
        known: rewards at the points, float64 (N,), NaN where they failed: these are not evaluated again.
    """

    points: Tensor
    context: Context = None
    known: tuple[tuple[Reward, np.ndarray], ...] = ()

    def at(self, points: Tensor) -> FiniteDistribution:
        """A finite distribution without weights on ``points``, which stand for the same data: for values."""
        blank = np.zeros(len(points))
        evaluated = {id(reward): (reward, points, values) for reward, values in self.known}
        return FiniteDistribution(points, blank, blank, context=self.context, evaluated=evaluated)


@dataclass(frozen=True)
class Draw:
    """Samples of a model in rising order of a tilt's value.

    Attributes:
        samples: (N, ...).
        context: of all that were drawn, in the order in which it was drawn.
        order: position in ``context`` of each sample, (N,).
        values: of the tilt, float64 (N,).
        groups: samples that have a normaliser in common.
        active: samples that carry a gradient of the tilt, bool (N,).
        failed: how many more were drawn, and have no value.
        passes: network passes that drawing them took.
    """

    samples: Tensor
    context: Context
    order: Tensor
    values: np.ndarray
    groups: Groups
    active: Tensor
    failed: int
    passes: int

    @property
    def drawn(self) -> int:
        """How many samples were drawn, those without a value included."""
        return len(self.samples) + self.failed


@dataclass(frozen=True)
class Bank(Draw):
    """Samples of the base in rising order of the tilt's value, with their weights.

    Attributes:
        solution: the weights, in the order of the samples.
    """

    solution: BankWeights

    @property
    def active_share(self) -> float:
        """Share of the active samples under the weights, from 0 to 1."""
        q = self.solution.probabilities
        return float(q[self.active.numpy(force=True)].sum() / q.sum())


def draw_samples(
    base: FlowModel,
    tilt: FirstVariation,
    settings: WeightedFittingSettings,
    generator: torch.Generator,
    given: Samples | None = None,
) -> Draw:
    """Draw samples of ``base`` with the values of a tilt.

    Args:
        base: the model to draw from.
        tilt: what to tilt by; only its values are asked for.
        settings: of the bank.
        generator: source of randomness.
        given: samples of ``base`` to take instead of drawing any, however many ``settings.bank`` asks for.

    Raises:
        UnusableBank: if no sample has a value.
    """
    context = base.draw_context(settings.bank, generator) if given is None else given.context
    if given is not None:
        samples = given.points
    elif settings.sampler == "ode":
        ode = OdeSettings(steps=settings.steps)
        samples = sample_ode(base, settings.bank, generator, context, ode)
    else:
        samples = sample_sde(base, settings.bank, settings.steps, generator, context)[-1]
    samples = base.data_of(samples, context)
    value, active = _values(base, tilt, samples, context, given)
    # Neighbours in value are then neighbours in the bank, which is what stratified draws make use of.
    order = torch.argsort(value, stable=True)  # NaN comes last
    failed = int(value.isnan().sum())
    order = order[: len(order) - failed]
    if not len(order):
        raise UnusableBank(f"the tilt has no value on any of the {len(samples)} samples of the bank")
    labels = base.context_labels(context)
    of_context = None if labels is None else labels.numpy(force=True)
    groups = Groups.of(of_context, order.numpy(force=True), settings.group)
    if groups.pooled:
        logger.info(
            "%d of %d samples are of contexts with fewer than %d, which are pooled: %d contexts, %d groups",
            *(groups.pooled, len(order), settings.group, groups.contexts, len(groups)),
        )
    tilted = value[order[0]] < value[order[-1]]  # equal values have no gradient anywhere
    kept = value[order].numpy(force=True)
    passes = settings.passes * base.evaluations("sampling") if given is None else 0
    return Draw(samples[order], context, order, kept, groups, active[order] & tilted, failed, passes)


def _values(
    base: FlowModel, tilt: FirstVariation, samples: Tensor, context: Context, given: Samples | None
) -> tuple[Tensor, Tensor]:
    """Values of a tilt at samples, float64 (N,), and which of them are active, bool (N,)."""
    if given is not None and given.known:
        known = given.at(samples)
        return torch.as_tensor(tilt.on(known)).to(samples).double(), torch.as_tensor(tilt.active_on(known))
    values, active = [], []
    for index in torch.arange(len(samples)).split(CHUNK):
        part, its = samples[index], base.select_context(context, index)
        values.append(tilt.value(part, its).detach().double())
        active.append(tilt.active(part, its))
    return torch.cat(values), torch.cat(active)


def draw_bank(
    base: FlowModel,
    tilt: FirstVariation,
    kl_weight: float,
    settings: WeightedFittingSettings,
    generator: torch.Generator,
    given: Samples | None = None,
) -> Bank:
    """Draw samples of ``base`` and solve for the weights of the tilted distribution on them.

    Args:
        base: the model to tilt.
        tilt: what to tilt by; only its values are asked for.
        kl_weight: weight of the penalty, positive, in units of the tilt.
        settings: of the bank.
        generator: source of randomness.
        given: samples of ``base`` to take instead.

    Raises:
        UnusableBank: if the effective sample size is below ``settings.minimum_ess``.
        ValueError: if values are infinite.
    """
    draw = draw_samples(base, tilt, settings, generator, given)
    return weigh(draw, draw.values, kl_weight, settings)


def weigh(draw: Draw, values: np.ndarray, kl_weight: float, settings: WeightedFittingSettings) -> Bank:
    """The samples with the weights that maximise ``E[values] - kl_weight D``, within each group.

    Raises:
        UnusableBank: if the effective sample size is below ``settings.minimum_ess``.
        ValueError: if values are infinite.
    """
    solution = solve_weights_within(values, kl_weight, penalty_named(settings.penalty), draw.groups)
    _check(solution, settings, draw.drawn)
    return Bank(**{f.name: getattr(draw, f.name) for f in fields(Draw)}, solution=solution)


def _check(solution: BankWeights, settings: WeightedFittingSettings, drawn: int) -> None:
    ess = solution.effective_sample_size
    found = f"the effective sample size of the weights is {ess:.4g} of a bank of {drawn}"
    fix = "draw a larger bank, raise the KL weight, or tilt in stages, by annealed fitting"
    # Not below but by rounding, where all weight is on as many equal samples.
    if ess < settings.minimum_ess * (1 - 1e-9):
        raise UnusableBank(f"{found}, below the minimum of {settings.minimum_ess:g}; {fix}")
    if ess < settings.warning_ess:
        logger.warning("%s: the fitted distribution rests on few samples; %s", found, fix)


def stratified_uniforms(count: int, generator: torch.Generator) -> Tensor:
    """One uniform draw from each of ``count`` equal slices of (0, 1), rising, float64 (count,)."""
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    return (torch.arange(count, dtype=torch.float64) + jitter) / count


def stratified_indices(cumulative: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Indices drawn with given probabilities, one from each of ``batch`` equal slices of the total.

    Each index is drawn ``batch`` times its probability on average, and means over the draws never
    vary more than those of independent ones (Douc and Cappe 2005).

    Args:
        cumulative: sums of the probabilities up to each, ending in 1, float64 (N,).
        batch: number of draws.
        generator: source of randomness.
    """
    return torch.searchsorted(cumulative, stratified_uniforms(batch, generator)).clamp(
        max=len(cumulative) - 1
    )


@dataclass(frozen=True)
class Plan:
    """How samples of the bank are drawn, and how much each draw counts.

    With residuals ``r`` of the model and ``r_base`` of the base, a draw adds
    ``tilted |r|^2 - 2 base <r, r_base>`` to the loss.

    Attributes:
        cumulative: sums of the probabilities of the draw, ending in 1, (N,).
        tilted: probability under the tilted distribution over that of the draw, (N,).
        base: that under the base distribution, times the coefficient, (N,).
        coefficient: of the control variate, in [0, 1]; 0 for none.
        noise: variance of the gradient over that of draws from the tilted distribution, for residuals of one
            size.
    """

    cumulative: Tensor
    tilted: Tensor
    base: Tensor
    coefficient: float
    noise: float


def plan_draws(probabilities: np.ndarray, base: np.ndarray | None = None, price: float = FORWARD) -> Plan:
    """Draw from the tilted distribution, or use the base's residuals as a control variate if that is better.

    The gradient of the loss under the tilted distribution q is ``E_q[<dr, r>]``, and near the base it is
    noise of the size of the residual. The base's own ``E_p[<dr, r_base>]`` vanishes, so any multiple c of it
    may be subtracted. With both means over draws from ``m = (p + q) / 2`` the variance is
    ``sum (q - c p)^2 / m`` times that of a residual, least at ``c = sum(p q / m) / sum(p^2 / m)``; with
    draws from q alone it is 1. The control variate has a price, and is used where the variance falls by
    more than that.

    Args:
        probabilities: q of the samples, (N,).
        base: p of the samples, (N,); equal if not given.
        price: network passes that the control variate takes a draw, beside those of training.
    """
    q = probabilities / probabilities.sum()
    p = np.full(len(q), 1 / len(q)) if base is None else base / base.sum()
    mixed = 0.5 * (p + q)
    coefficient = float((p * q / mixed).sum() / (p * p / mixed).sum())
    noise = float(((q - coefficient * p) ** 2 / mixed).sum())
    drawn = mixed
    if noise > TRAINING / (TRAINING + price):
        coefficient, noise, drawn = 0.0, 1.0, q
    tilted = np.divide(q, drawn, out=np.zeros_like(q), where=drawn > 0)
    base = np.divide(coefficient * p, drawn, out=np.zeros_like(q), where=drawn > 0)
    sums = np.cumsum(drawn)
    cumulative, on_tilted, on_base = (torch.as_tensor(a) for a in (sums / sums[-1], tilted, base))
    return Plan(cumulative, on_tilted, on_base, coefficient, noise)


@dataclass(frozen=True)
class _Batch:
    """Samples with their noise, times and contexts, and their positions in the bank."""

    x1: Tensor
    x0: Tensor
    t: Tensor
    context: Context
    index: Tensor


def _draw_batch(
    model: FlowModel,
    bank: Bank,
    plan: Plan,
    settings: WeightedFittingSettings,
    generator: torch.Generator,
) -> _Batch:
    index = stratified_indices(plan.cumulative, settings.batch, generator)
    x1, context = bank.samples[index], model.select_context(bank.context, bank.order[index])
    x0 = model.noise_like(x1, generator, context)
    # Indices rise with the tilt's value, which must not go with time: shuffle one of the two.
    shuffled = torch.randperm(settings.batch, generator=generator)
    u = stratified_uniforms(settings.batch, generator)[shuffled].to(x1.dtype)
    t = settings.margin + (1 - 2 * settings.margin) * u
    return _Batch(x1, x0, t, context, index)


def _native(model: FlowModel, batch: _Batch, weights: Tensor) -> Tensor:
    """The model's native loss under weights of the bank's samples."""
    each = model.matching_loss(batch.x1, batch.x0, batch.t, batch.context)
    return (weights[batch.index].to(each.dtype) * each).mean()


def _losses(model: FlowModel, base: FlowModel, batch: _Batch, plan: Plan) -> tuple[Tensor, float]:
    """What to minimise, and the native loss under the tilt, which it is without a control variate."""
    if not model.quadratic_loss:
        native = _native(model, batch, plan.tilted)
        return native, float(native.detach())

    def residual(flow: FlowModel) -> Tensor:
        return flow.matching_residual(batch.x1, batch.x0, batch.t, batch.context).flatten(1)

    r = residual(model)
    native = (plan.tilted[batch.index].to(r.dtype) * r.square().mean(1)).mean()
    if plan.coefficient == 0:
        return native, float(native.detach())
    with torch.no_grad():
        r_base = residual(base)
    shared = (plan.base[batch.index].to(r.dtype) * (r * r_base).mean(1)).mean()
    return native - 2 * shared, float(native.detach())


def _subtract_gradient_at_base(model: FlowModel, base: FlowModel, batch: _Batch, plan: Plan) -> None:
    """The control variate of any loss: its gradient at the base, whose mean is zero under the base."""
    own = base.tunable()
    at_base = torch.autograd.grad(_native(base, batch, plan.base), own, allow_unused=True)
    for parameter, gradient in zip(model.tunable(), at_base, strict=True):
        if parameter.grad is not None and gradient is not None:
            parameter.grad.sub_(gradient)


def _diagnostics(bank: Bank, plan: Plan) -> dict[str, float]:
    solution, groups = bank.solution, bank.groups
    return {
        "bank": float(len(bank.samples)),
        "failed": float(bank.failed),
        "contexts": float(groups.contexts),
        "groups": float(len(groups)),
        "pooled": float(groups.pooled),
        "effective_sample_size": solution.effective_sample_size,
        "least_effective_share": float(solution.effective_shares.min()),
        "kl": solution.kl,
        "mean_before": float(groups.probabilities @ bank.values),
        "mean_promised": float(solution.probabilities @ bank.values),
        "largest_probability": float(solution.probabilities.max()),
        "nu": solution.nu,
        "primal": solution.primal,
        "dual": solution.dual,
        "gap": solution.gap,
        "relative_gap": solution.relative_gap,
        "control_variate": plan.coefficient,
        "noise": plan.noise,
    }


def solve(
    base: FlowModel,
    tilt: FirstVariation,
    kl_weight: float,
    settings: WeightedFittingSettings,
    generator: torch.Generator,
    progress: Progress | None = None,
    slot: Slot | None = None,
    given: Samples | None = None,
) -> Solution:
    """Fit a copy of ``base`` to the distribution that maximises ``E[tilt] - kl_weight D(distribution ||
    base)``.

    Under the KL penalty that is the distribution proportional to ``p_base exp(tilt / kl_weight)``. Both
    models run in evaluation mode all the while, in the fit too: the base's residuals are a control variate of
    the model's, and a dropout of their own would undo it. The solution has the base's own mode.

    Args:
        base: the model to tilt; left unchanged.
        tilt: what to tilt by; its gradient is never asked for.
        kl_weight: weight of the penalty, positive, in units of the tilt a nat.
        settings: of the bank and of the fit.
        generator: source of all randomness.
        progress: called with each update's row of the history.
        slot: where the fit keeps its state, and goes on from if it was stopped; the bank is drawn again.
        given: samples of ``base`` that are the bank; else one is drawn.

    Returns:
        The fitted model; its history: ``loss`` and ``active_share`` (the native loss, and the share of
        samples on which the tilt is active, both under the tilted distribution; the latter exactly, from the
        weights of the bank, and 0 if all values are equal), ``failed_share`` (of the bank, samples without a
        value), ``gradient_norm``,
        ``network_passes`` (states that have gone through the network since the start, those of a bank that
        was drawn included, a backward pass counted as two; what the tilt's own values take is not in it),
        ``seconds``; and as diagnostics the weights' ``effective_sample_size``, and the
        ``least_effective_share`` of a group, ``largest_probability``, ``nu``, ``primal``, ``dual``, ``gap``,
        ``relative_gap``, their ``kl`` from the base in nats, the tilt's ``mean_before`` and the
        ``mean_promised`` by the weights, the size of the ``bank``, how many samples beside it ``failed``, its
        ``contexts``, the ``groups`` that these make and how many samples are of ``pooled`` ones, and
        coefficient ``control_variate`` and ``noise`` of :class:`Plan`.

    Raises:
        ValueError: if ``kl_weight`` is not positive, or values are infinite.
        UnusableBank: if too few effective samples are left.
        TrainingDiverged: if the loss stops being finite, or is far above that of the base; the message names
            the update.
        CheckpointError: if the state to go on from belongs to another solve.
    """
    check_value("the KL weight of a solve", kl_weight, POSITIVE)
    started = time.perf_counter()
    bank = draw_bank(base, tilt, kl_weight, settings, generator, given)
    return fit(base, bank, (settings, kl_weight), generator, progress, slot, started)


def fit(
    base: FlowModel,
    bank: Bank,
    settings: tuple[WeightedFittingSettings, float],
    generator: torch.Generator,
    progress: Progress | None = None,
    slot: Slot | None = None,
    started: float | None = None,
) -> Solution:
    """Fit a copy of ``base`` to the weighted samples of a bank; see :func:`solve`, whose second half it is.

    Args:
        base: the model that the bank is of; left unchanged.
        bank: of its samples, weighted.
        settings: of the fit, and what the weights were solved for: a state of another is not gone on from.
        generator: source of all randomness.
        progress: called with each update's row of the history.
        slot: where the fit keeps its state.
        started: ``time.perf_counter()`` before the bank was drawn.
    """
    choice = settings[0]
    base, model = (copy.deepcopy(base).requires_grad_(False) for _ in range(2))
    for parameter in (*model.tunable(), *(() if base.quadratic_loss else base.tunable())):
        parameter.requires_grad_(True)  # the base's, for the control variate
    price = FORWARD if base.quadratic_loss else TRAINING
    plan = plan_draws(bank.solution.probabilities, bank.groups.probabilities, price)
    passes_of_update = choice.batch * (TRAINING + (price if plan.coefficient else 0))
    passes_of_update *= base.evaluations("sampling")
    optimiser = Adam(model.tunable(), choice.moments, choice.weight_decay)
    state = TrainingState(model, optimiser, generator, settings, slot, started=started)
    passes = bank.passes + len(state.history) * passes_of_update
    with evaluating(base, model):
        _fit(base, model, state, bank, plan, choice, (passes, passes_of_update), progress)
    model.requires_grad_(False)
    return Solution(model, state.history, _diagnostics(bank, plan))


def _fit(
    base: FlowModel,
    model: FlowModel,
    state: TrainingState,
    bank: Bank,
    plan: Plan,
    settings: WeightedFittingSettings,
    costs: tuple[int, int],
    progress: Progress | None,
) -> None:
    """All updates of a fit that are still to be done; see :func:`solve`.

    Args:
        base: the model that was tilted.
        model: its copy, to be fitted.
        state: of the fit.
        bank: of samples.
        plan: of the draws from it.
        settings: of the fit.
        costs: network passes so far, and of each update.
        progress: called with each update's row.
    """
    optimiser, generator = state.optimiser, state.generator
    passes, passes_of_update = costs
    for update in range(len(state.history), settings.updates):
        batch = _draw_batch(model, bank, plan, settings, generator)
        loss, native = _losses(model, base, batch, plan)
        first = state.history[0]["loss"] if state.history else native
        if not math.isfinite(native) or native > LARGEST_RISE * max(first, 1e-6):
            raise TrainingDiverged(
                f"weighted fitting: the loss is {native} at update {update} of {settings.updates}; "
                f"lower learning_rate (it began at {first:.4g})"
            )
        optimiser.clear_gradients()
        loss.backward()
        if plan.coefficient and not base.quadratic_loss:
            _subtract_gradient_at_base(model, base, batch, plan)
        norm = torch.nn.utils.clip_grad_norm_(model.tunable(), settings.gradient_clip)
        optimiser.step(rate_of(update, settings))
        passes += passes_of_update
        row = {
            "update": update,
            "loss": native,
            "active_share": bank.active_share,
            "failed_share": bank.failed / bank.drawn,
            "gradient_norm": float(norm),
            "network_passes": passes,
            "seconds": state.seconds(),
        }
        state.add(row, progress)
