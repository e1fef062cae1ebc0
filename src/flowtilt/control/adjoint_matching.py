"""Adjoint Matching (Domingo-Enrich et al. 2025): fine-tune a flow towards a tilted distribution.

The problem ``max_p E_p[f] - lambda KL(p || p_base)`` is solved by ``p_base exp(f / lambda)``.
With memoryless noise it is a control problem whose optimal control is found by regression:

1. sample trajectories of the memoryless process under the current model;
2. solve the lean adjoint backwards through the *base* model,
   ``a_k = (d mean_base / d x)^T a_{k+1}`` with ``a_N = -grad f(X_N) / lambda``;
3. regress the fine-tuned velocity ``v`` at the states, so that ``v - v_base = -eta(t_k) a_k`` there.

The minus signs cancel: the model moves *towards* larger ``f``.

The third relation is that of continuous time: ``v* - v_base = eta grad log h`` with
``h(x, t) = E[exp(f / lambda) | x_t = x]``, and ``E[a_t | x_t] = -grad log h`` (section 5 there), both at the
state and the time that the velocity is asked at. The mean of a discrete step moves by ``-noise^2 a_{k+1}``
instead. That is the same to first order, but its adjoint belongs to the state after the step, and its mean,
seen from ``x_k``, is smoothed by the step's noise already. Models are sampled by an ODE and on other grids,
so that they should learn the former. :mod:`flowtilt.control.discretisation` says what either leaves of a tilt
in closed form.

The regression sees the adjoint through its conditional mean alone. Where a flow decides late and sharply
what a sample becomes, single adjoints are nothing like that mean, and :func:`posterior_mean_adjoint` is
another estimate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flowtilt.control.base import (
    FORWARD,
    MOST_NATS,
    PULLBACK,
    TRAINING,
    WINDOW,
    Annealing,
    NoValues,
    Progress,
    Solution,
    TrainingDiverged,
    check_optimiser,
    rate_of,
)
from flowtilt.control.endpoints import EndpointGradient, Ends, Pathwise, Terminal
from flowtilt.control.loss_steps import (
    Parts,
    draw_steps,
    first_step,
    parts_by_counts,
    parts_by_shares,
    path_kl,
)
from flowtilt.functionals.base import FirstVariation
from flowtilt.interpolants import MemorylessStep
from flowtilt.model import Context, FlowModel, evaluating
from flowtilt.optimiser import Adam
from flowtilt.parallel import Processes, processes
from flowtilt.ranges import COUNT, NOT_NEGATIVE, PERCENTILE, POSITIVE, SHARE, at_least, check, check_value
from flowtilt.resuming import Slot, TrainingState
from flowtilt.sampling import memoryless_steps, positions_of, sample_sde

AdjointEstimate = Literal["lean", "posterior_mean"]
Target = Literal["state", "step"]


@dataclass(frozen=True)
class AdjointMatchingSettings:
    """How the regression is run.

    Attributes:
        updates: optimiser steps.
        batch: trajectories that enter each update, at least 2: one for each stratum of a sparse tilt.
        pool: trajectories sampled for each update of a sparse tilt, at least ``batch``. The pool is
            thinned to the batch by drawing active and inactive endpoints separately and
            reweighting, which keeps the estimator unbiased when few endpoints carry a gradient.
            A tilt that is active everywhere needs no pool beyond its batch.
        active_batch: most trajectories of a batch that are drawn of the active ones, if there are enough
            others; None for half of the batch.
        buffer: trajectories that are kept with their adjoints and trained on together, a multiple of
            ``batch``: a pass over them takes each once, in mini-batches of ``batch`` that are drawn anew for
            each pass. None for ``batch``. Where it is larger, the pool is thinned to it instead.
        steps: time steps of the memoryless process, at least 2: the last has no noise to regress with.
        learning_rate: of Adam, warmed up over ``warmup`` of the updates and annealed to zero by a cosine.
        warmup: share of the updates.
        annealing: ``cosine``, or ``none`` for the largest rate from the warm-up to the end.
        moments: decay rates of Adam's means of gradients and of their squares.
        weight_decay: of AdamW.
        ramp: share of the updates over which the tilt grows linearly to its full strength, so that
            the sampled distribution follows the tilted one instead of overshooting it; the last update
            solves the problem itself.
        gradient_clip: bound on the norm of the parameters' gradient.
        control_clip: bound on the norm of the control that a sample asks for at a step, or None. A control
            of this size all the way spends ``control_clip^2 / 2`` nats. Longer ones are shortened: through
            a flow in which small causes decide what a sample becomes, a few adjoints are larger than all
            others together. This trades a bias for most of the variance.
        endpoint_gradient: how the tilt's gradient at the end of a trajectory is estimated: ``pathwise``,
            by the tilt's own gradient, or by ``likelihood_ratio``, from its values alone. The latter
            has far less noise where the tilt has edges (see :mod:`flowtilt.control.endpoints`).
        endpoint_perturbations: at how many perturbed ends a pathwise gradient is taken, of which the mean
            counts: the gradient of the tilt smoothed by a Gaussian. 0 for the end itself.
        endpoint_deviation: standard deviation of these perturbations, in units of the state.
        endpoint_percentile: of the sizes of the entries of one sample's pathwise gradient: larger entries
            are cut to it, with their sign. None for no bound. As any clipping it biases the tilt.
        adjoint_from: time from which on there is a regression: the steps in the loss are among those that
            start there or later, and the adjoint is solved back to them. Before, the model is trained
            by nothing but what its weights share.
        adjoint: how the gradient at the end is carried to earlier times: ``lean``, along the trajectory, or
            by ``posterior_mean`` (see :func:`posterior_mean_adjoint`), which takes a pathwise gradient.
        target: what the velocity at a state is regressed on: ``state``, the adjoint of that state and time,
            which is exact for Gaussian data and a linear tilt with any number of steps; or ``step``, the
            move of the discrete step, whose adjoint is that of the state after it. They agree to first order.
        last_share: share of the time steps, nearest to the data, that are always in the loss.
        rest_share: share of the remaining steps drawn at random for each update.
        loss_steps: parts of the time steps, instead of the two shares: where each ends, as a share of the
            steps from ``adjoint_from`` on, and how many steps of it are drawn for each update.
        passes: how often each of the trajectories is trained on, each time with steps of its own:
            trajectories and adjoints of a large model cost more than the regression on them.
        micro_batch: most trajectories whose regression is in memory at once, and whose adjoints are solved
            together; their gradients are added up. None for those of a batch.
    """

    updates: int = 400
    batch: int = 256
    pool: int = 256
    active_batch: int | None = None
    buffer: int | None = None
    steps: int = 40
    learning_rate: float = 1e-3
    warmup: float = 0.05
    annealing: Annealing = "cosine"
    moments: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ramp: float = 0.5
    gradient_clip: float = 1.0
    control_clip: float | None = None
    endpoint_gradient: EndpointGradient = "pathwise"
    endpoint_perturbations: int = 0
    endpoint_deviation: float = 0.0
    endpoint_percentile: float | None = None
    adjoint_from: float = 0.0
    adjoint: AdjointEstimate = "lean"
    target: Target = "state"
    last_share: float = 0.25
    rest_share: float = 0.25
    loss_steps: Sequence[tuple[float, int]] | None = None
    passes: int = 1
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        check(self, updates=COUNT, batch=at_least(2), pool=COUNT, steps=at_least(2), passes=COUNT)
        check(self, learning_rate=POSITIVE, gradient_clip=POSITIVE, control_clip=POSITIVE, micro_batch=COUNT)
        check(self, warmup=SHARE, ramp=SHARE, last_share=SHARE, rest_share=SHARE)
        check(self, active_batch=COUNT, buffer=COUNT, endpoint_percentile=PERCENTILE, adjoint_from=SHARE)
        check(self, endpoint_perturbations=at_least(0), endpoint_deviation=NOT_NEGATIVE)
        check_optimiser(self)
        self._check_sizes()
        self._check_estimates()
        if self.loss_steps is not None and not self.adjoint_from:
            parts_by_counts(0, self.steps, self.loss_steps)

    @property
    def kept(self) -> int:
        """Trajectories whose adjoints are kept together."""
        return self.buffer or self.batch

    @property
    def updates_of_a_buffer(self) -> int:
        """Updates that all passes over these trajectories take."""
        return self.passes * (self.kept // self.batch)

    def parts(self, times: Sequence[float]) -> Parts:
        """The parts of a time grid, its end included, that the steps of the loss are drawn from.

        Raises:
            ValueError: if no step starts at ``adjoint_from`` or later, or a part has too few.
        """
        steps = len(times) - 1
        first = first_step(times, self.adjoint_from)
        if first == steps:
            raise ValueError(
                f"no time step starts at adjoint_from ({self.adjoint_from:g}) or later; lower it"
            )
        if self.loss_steps is None:
            return parts_by_shares(first, steps, self.last_share, self.rest_share)
        return parts_by_counts(first, steps, self.loss_steps)

    def _check_sizes(self) -> None:
        if self.kept % self.batch:
            raise ValueError(f"buffer ({self.buffer}) must be a multiple of batch ({self.batch})")
        if self.pool < self.kept:
            least = f"batch ({self.batch})" if self.buffer is None else f"buffer ({self.buffer})"
            raise ValueError(f"pool ({self.pool}) must be at least {least}")
        if self.active_batch is not None and self.active_batch >= self.batch:
            raise ValueError(f"active_batch ({self.active_batch}) must be below batch ({self.batch})")

    def _check_estimates(self) -> None:
        if self.endpoint_gradient not in get_args(EndpointGradient):
            known = " or ".join(get_args(EndpointGradient))
            raise ValueError(f"endpoint_gradient must be {known}, got {self.endpoint_gradient!r}")
        if self.adjoint not in get_args(AdjointEstimate):
            known = " or ".join(get_args(AdjointEstimate))
            raise ValueError(f"adjoint must be {known}, got {self.adjoint!r}")
        if self.target not in get_args(Target):
            raise ValueError(f"target must be {' or '.join(get_args(Target))}, got {self.target!r}")
        if self.adjoint == "posterior_mean" and self.endpoint_gradient != "pathwise":
            raise ValueError(
                "adjoint posterior_mean takes the gradient at the end of a trajectory; endpoint_gradient "
                f"must be pathwise, got {self.endpoint_gradient!r}"
            )
        if (self.endpoint_perturbations > 0) != (self.endpoint_deviation > 0):
            raise ValueError(
                "endpoint_perturbations and endpoint_deviation belong together; give both or none"
            )
        changed = self.endpoint_perturbations or self.endpoint_percentile is not None
        if changed and self.endpoint_gradient != "pathwise":
            raise ValueError(
                "endpoint_perturbations and endpoint_percentile are of gradients; endpoint_gradient must be "
                f"pathwise, got {self.endpoint_gradient!r}"
            )


@dataclass(frozen=True)
class Draw:
    """The trajectories of one update, and how much each counts.

    Attributes:
        index: positions in the pool, (batch,).
        weights: not negative, mean 1 in expectation, (batch,).
    """

    index: Tensor
    weights: Tensor


def stratified_draw(active: Tensor, batch: int, generator: torch.Generator, most: int | None = None) -> Draw:
    """Thin a pool to a batch without losing the few that carry a gradient.

    Up to half of the batch, or another number, is drawn, without replacement, from the active part
    of the pool and the rest from the inactive part; each stratum is weighted by its share of the pool
    over its share of the batch, so weighted batch means are unbiased for pool means.

    Args:
        active: bool, (pool,).
        batch: number to keep, from 2 to the size of the pool.
        generator: source of randomness.
        most: active ones in the batch, if there are enough of the others; half of it by default.
    """
    pool = len(active)
    most = batch // 2 if most is None else most
    order = torch.randperm(pool, generator=generator)
    on, off = order[active[order]], order[~active[order]]
    n_on = min(len(on), max(most, batch - len(off)))
    n_off = min(len(off), batch - n_on)
    index = torch.cat([on[:n_on], off[:n_off]])
    kept = n_on + n_off
    weights = torch.cat(
        [
            torch.full((n_on,), len(on) / pool * kept / max(n_on, 1)),
            torch.full((n_off,), len(off) / pool * kept / max(n_off, 1)),
        ]
    )
    return Draw(index, weights)


def lean_adjoint(
    base: FlowModel,
    trajectories: Tensor,
    terminal: Terminal,
    steps: list[MemorylessStep],
    context: Context = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lean adjoint and base velocities along trajectories.

    The last step takes what is added before it as well, since it has no noise of its own.

    Args:
        base: the model that is being tilted.
        trajectories: states, (steps + 1, batch, ...).
        terminal: adjoint at the endpoint, and what is added to it one state before.
        steps: coefficients of the process.
        context: the trajectories' context.
        start: number of the step that it is solved back to.

    Returns:
        ``a_{k+1}`` and the base velocity at ``x_k`` for k = start..steps-1, each (steps - start, batch, ...).
    """
    times = torch.tensor(base.time_grid(len(steps)), dtype=torch.float64).to(trajectories)
    linearised = base.linearised(trajectories[:-1], times, context)
    adjoints, velocities = [terminal.end], []
    for k in range(len(steps) - 1, start - 1, -1):
        v, pull = linearised(k)
        velocities.append(v)
        if k == start:
            break
        a, step = adjoints[-1], steps[k].like(trajectories)
        adjoints.append(step.state * a + step.velocity * pull(a))
        if k == len(steps) - 1 and terminal.before is not None:
            adjoints[-1] = adjoints[-1] + terminal.before
    if terminal.before is not None:
        adjoints[0] = adjoints[0] + terminal.before
    return torch.stack(adjoints[::-1]), torch.stack(velocities[::-1])


def posterior_mean_adjoint(
    base: FlowModel, trajectories: Tensor, end: Tensor, steps: int, chosen: Tensor, context: Context = None
) -> Tensor:
    """Adjoint ``a_{k+1} = (d E[X_1 | x_{k+1}] / d x)^T a_N`` at chosen steps, (chosen, batch, ...).

    The base's velocity knows the mean of the endpoint given a state, and so its Jacobian
    ``J = (beta dv/dx - beta') / (alpha' beta - alpha beta')``. Along the base's own trajectories the mean of
    the lean adjoint of a *linear* tilt is ``J^T a_N``, up to the time step: this is that mean, without the
    noise of the trajectories. For other tilts it leaves out how the gradient at the end goes together with
    the Jacobian of the way there; for Gaussian data, whose flow is linear, that is nothing. Along the
    trajectories of a model that is tilted already it is right to first order in the tilt. It takes a network
    pass for each chosen step instead of one for each step.

    Args:
        base: the model that is being tilted.
        trajectories: states, (steps + 1, batch, ...).
        end: the adjoint at the endpoint, ``a_N``, (batch, ...).
        steps: how many there are.
        chosen: numbers of steps, long, (chosen,); the last one's adjoint is ``a_N`` itself.
        context: the trajectories' context.
    """
    adjoints = end.expand(len(chosen), *end.shape).clone()
    before = (chosen < steps - 1).nonzero().squeeze(1)
    at = chosen[before] + 1
    times = torch.tensor(base.time_grid(steps), dtype=torch.float64)[at]
    linearised = base.linearised(trajectories[at], times.to(trajectories), context)
    path = base.path
    for k, (place, t) in enumerate(zip(before.tolist(), times, strict=True)):
        alpha, beta, alpha_rate, beta_rate = (
            c(t).to(end) for c in (path.alpha, path.beta, path.alpha_rate, path.beta_rate)
        )
        wronskian = alpha_rate * beta - alpha * beta_rate
        adjoints[place] = linearised(k)[1](beta / wronskian * end) - beta_rate / wronskian * end
    return adjoints


def _adjoint_of(chosen: Tensor, target: Target) -> Tensor:
    """Numbers of the steps that lead to the states whose adjoints the chosen steps' targets take.

    No step leads to the first state, where the noise may be infinite: there the target is the step's move.
    """
    return (chosen - 1).clamp(min=0) if target == "state" else chosen


def _targets(
    base: FlowModel,
    trajectories: Tensor,
    terminal: Terminal,
    steps: list[MemorylessStep],
    chosen: Tensor,
    context: Context,
    estimate: AdjointEstimate = "lean",
    target: Target = "state",
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Adjoints of a target and base velocities at the chosen steps, each (chosen, batch, ...).

    Adjoints are linear in their terminal value: where that is zero, as on the flat side of a
    hinge, they stay zero, and only the velocity is needed. Lean ones are solved back to the step ``start``.
    """
    moving = terminal.moving
    at = _adjoint_of(chosen, target)
    of_adjoint = base.context_for("adjoint", context)
    of_control = base.context_for("control", of_adjoint)
    if bool(moving.all()) and estimate == "lean":
        adjoints, velocities = lean_adjoint(base, trajectories, terminal, steps, of_adjoint, start)
        if of_control is of_adjoint:
            return adjoints[at - start], velocities[chosen - start]
        adjoints = adjoints[at - start]
    else:
        index = moving.nonzero().squeeze(1)
        adjoints = torch.zeros_like(trajectories[chosen])
        if len(index):
            some, own = base.select_context(of_adjoint, index), terminal.select(index)
            if estimate == "lean":
                lean, _ = lean_adjoint(base, trajectories[:, index], own, steps, some, start)
                of_some = lean[at - start]
            else:
                of_some = posterior_mean_adjoint(base, trajectories[:, index], own.end, len(steps), at, some)
            adjoints[:, index] = of_some
    times = torch.tensor(base.time_grid(len(steps)), dtype=torch.float64).to(trajectories)
    with torch.no_grad():
        velocities = _velocities(base, trajectories[chosen], times[chosen], of_control)
    return adjoints, velocities


def _velocities(model: FlowModel, states: Tensor, times: Tensor, context: Context) -> Tensor:
    """Velocities at states (chosen, batch, ...) and times (chosen,), from one batched network pass."""
    chosen, batch = states.shape[:2]
    repeated = model.select_context(context, torch.arange(batch).repeat(chosen))
    v = model.velocity(states.flatten(0, 1), times.repeat_interleave(batch), repeated)
    return v.view_as(states)


@dataclass(frozen=True)
class LossScale:
    """Per-step factors of the loss ``|| mean v_diff + noise a ||^2``, each float64, (steps,).

    ``mean`` and ``noise`` are the discrete forms of ``2 / sigma`` and ``sigma``; of a path whose columns
    differ, (steps, columns).
    """

    mean: Tensor
    noise: Tensor


def _beside(factors: Tensor, x: Tensor) -> Tensor:
    """Factors (steps,) or (steps, columns), shaped to multiply ``x`` (steps, batch, ...)."""
    return factors.view(len(factors), *(1,) * (x.ndim - factors.ndim), *factors.shape[1:])


def loss_scale(base: FlowModel, steps: list[MemorylessStep], target: Target = "state") -> LossScale:
    """Factors that turn velocity differences and adjoints into one regression residual.

    Step k moves its mean by ``velocity_k (v - v_base)``, and ``mean`` measures this by the noise: squared,
    and averaged over the steps, the moves are twice the path-space KL divergence on any grid of times. The
    final step has no noise; there ``velocity eta`` holds the place of its square, so that the model's last
    move is trained too. The ratio of the factors is that of the target: ``eta(t_k)`` for the adjoint of the
    state, ``noise_k^2 / velocity_k`` for the move of the step. At the first state ``eta`` may be infinite,
    and the target is always that of the step.
    """
    h = 1 / len(steps)
    mean, noise = [], []
    for k, (t, step) in enumerate(zip(base.time_grid(len(steps))[:-1], steps, strict=True)):
        velocity, nu, at = (
            torch.as_tensor(c, dtype=torch.float64, device="cpu") for c in (step.velocity, step.noise, t)
        )
        eta = base.path.eta(at)
        # Where the noise is not zero the limit is not taken: it need not be finite at the start.
        nu = torch.where(nu > 0, nu, torch.sqrt(velocity * eta))
        ratio = nu.square() / velocity if target == "step" or k == 0 else eta
        mean.append(velocity / nu / math.sqrt(h))
        noise.append(mean[-1] * ratio)
    device = torch.get_default_device()
    return LossScale(torch.stack(mean).to(device), torch.stack(noise).to(device))


def _residuals(
    model: FlowModel,
    states: Tensor,
    times: Tensor,
    base_velocities: Tensor,
    adjoints: Tensor,
    scale: LossScale,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """Squared residuals and squared controls, each (chosen, batch)."""
    moved = _beside(scale.mean, states) * (_velocities(model, states, times, context) - base_velocities)
    residual = moved + _beside(scale.noise, states) * adjoints
    return residual.flatten(2).square().sum(2), moved.detach().flatten(2).square().sum(2)


def _clipped(adjoints: Tensor, scale: LossScale, bound: float | None) -> tuple[Tensor, int]:
    """Adjoints (chosen, batch, ...) whose controls are at most of a size, and how many were longer."""
    if bound is None:
        return adjoints, 0
    if scale.noise.ndim == 1:
        controls = scale.noise.view(-1, 1) * adjoints.flatten(2).norm(dim=2)
    else:
        controls = (_beside(scale.noise, adjoints) * adjoints).flatten(2).norm(dim=2)
    factors = (bound / controls.clamp(min=bound)).view(*controls.shape, *(1,) * (adjoints.ndim - 2))
    return factors * adjoints, int((controls > bound).sum())


@dataclass(frozen=True)
class _Batch:
    """The trajectories of some updates that this process trains on.

    Attributes:
        trajectories: (steps + 1, own, ...).
        positions: theirs among those of all processes, long (own,).
        context: theirs.
        terminal: of their adjoints.
        weights: how much each counts, (own,).
        active_share: of the pool, of all processes: with a gradient that is not zero.
        failed_share: of the pool, of all processes: without a value of the tilt.
        pool: how many were sampled, by all processes.
        mirrored: whether the pool's last two steps were taken again, for pairs.
    """

    trajectories: Tensor
    positions: Tensor
    context: Context
    terminal: Terminal
    weights: Tensor
    active_share: float
    failed_share: float
    pool: int
    mirrored: bool


def _draw_batch(
    model: FlowModel,
    tilt: FirstVariation,
    settings: AdjointMatchingSettings,
    steps: list[MemorylessStep],
    weight: float,
    generator: torch.Generator,
    sharing: Processes,
) -> _Batch:
    """Sample a pool and thin it to the trajectories that are trained on.

    Args:
        model: in training.
        tilt: of the update.
        settings: of the regression.
        steps: coefficients of the process.
        weight: of the tilt's gradient at the ends.
        generator: source of randomness, in all processes the same.
        sharing: processes that sample a part each.

    Raises:
        TrainingDiverged: if trajectories are no longer finite.
        NoValues: if the tilt has no value on any of them.
    """
    size = settings.pool if tilt.sparse else settings.kept
    contexts = model.training_context(size, generator)
    pool = sample_sde(model, size, settings.steps, generator, contexts, sharing)
    if bool(sharing.total((~torch.isfinite(pool[-1])).any().double()) > 0):
        raise TrainingDiverged("trajectories are no longer finite")
    positions = positions_of(size, sharing)
    context = model.select_context(contexts, positions)
    active = tilt.active(pool[-1], context)
    ends = Ends.of(model, tilt, pool, active, steps, context, settings.endpoint_gradient)
    failed = float(sharing.total(ends.failed.double().sum()))
    if failed == size:
        raise NoValues(f"the tilt has no value on any of the {size} trajectories")
    kept, most = settings.kept, settings.active_batch
    most = most if most is None else most * (kept // settings.batch)
    draw = stratified_draw(sharing.gather(ends.active, positions, size), kept, generator, most)
    place = torch.full((size,), -1)
    place[positions] = torch.arange(len(positions))
    here = place[draw.index] >= 0
    index = place[draw.index][here]
    context = model.select_context(context, index)
    trajectories = pool[:, index]
    like = pool.new_empty(kept, *pool.shape[2:])
    noise = [
        model.noise_like(like, generator, model.select_context(contexts, draw.index))[here]
        for _ in range(settings.endpoint_perturbations)
    ]
    pathwise = Pathwise(
        model,
        noise,
        settings.endpoint_deviation,
        settings.endpoint_percentile,
        settings.micro_batch or settings.batch,
    )
    terminal = ends.terminal(trajectories[-1], index, context, weight, pathwise)
    carrying = active & ends.active
    return _Batch(
        trajectories,
        here.nonzero().squeeze(1),
        context,
        terminal,
        draw.weights[here].to(trajectories),
        _active_share(carrying, carrying[index] & terminal.moving, carrying[index], sharing, size),
        failed / size,
        size,
        ends.ratio is not None,
    )


def _active_share(carrying: Tensor, moving: Tensor, drawn: Tensor, sharing: Processes, size: int) -> float:
    """Share of a pool with a gradient: that which may have one, times how much of it has, where it is known.

    Args:
        carrying: where the tilt is active, as far as its values tell, bool (pool,).
        moving: of the batch, those of them whose gradient is not zero, bool (batch,).
        drawn: of the batch, those of them, bool (batch,).
        sharing: processes that have a part each.
        size: of the pool of all.
    """
    counts = torch.stack([some.double().sum() for some in (carrying, moving, drawn)])
    may, has, known = sharing.total(counts).tolist()
    return may / size * (has / known if known else 1.0)


@dataclass(frozen=True)
class _Buffer:
    """Trajectories of some updates, with what their regression needs.

    Attributes:
        batch: the trajectories.
        at: the steps that the targets are known at, long (known,).
        adjoints: of these steps, (known, own, ...).
        velocities: the base's, of the same shape.
        clipped: share of the adjoints' controls that were shortened, of all processes.
        moving: trajectories whose endpoint has a gradient, of all processes.
    """

    batch: _Batch
    at: Tensor
    adjoints: Tensor
    velocities: Tensor
    clipped: float
    moving: int


def _fill(
    base: FlowModel,
    batch: _Batch,
    at: Tensor,
    scale: LossScale,
    steps: list[MemorylessStep],
    settings: AdjointMatchingSettings,
    sharing: Processes,
    start: int,
) -> _Buffer:
    """Solve the adjoints of some trajectories at some steps, a few at a time, back to the step ``start``."""
    trajectories = batch.trajectories
    adjoints = velocities = torch.zeros_like(trajectories[at])
    clipped = 0
    if len(batch.weights):
        solved = []
        for part in torch.arange(len(batch.weights)).split(settings.micro_batch or settings.batch):
            whole = len(part) == len(batch.weights)
            own = trajectories if whole else trajectories[:, part]
            terminal = batch.terminal if whole else batch.terminal.select(part)
            context = batch.context if whole else base.select_context(batch.context, part)
            solved.append(
                _targets(base, own, terminal, steps, at, context, settings.adjoint, settings.target, start)
            )
        adjoints, velocities = (
            found[0] if len(found) == 1 else torch.cat(found, dim=1) for found in zip(*solved, strict=True)
        )
        adjoints, clipped = _clipped(adjoints, _scale_at(scale, at, trajectories), settings.control_clip)
    counts = torch.tensor([clipped, int(batch.terminal.moving.sum())], dtype=torch.float64)
    clipped, moving = sharing.total(counts).tolist()
    return _Buffer(batch, at, adjoints, velocities, clipped / (len(at) * settings.kept), int(moving))


def _scale_at(scale: LossScale, at: Tensor, like: Tensor) -> LossScale:
    return LossScale(scale.mean[at].to(like), scale.noise[at].to(like))


def _accumulate(
    model: FlowModel,
    buffer: _Buffer,
    members: Tensor,
    chosen: Tensor,
    scale: LossScale,
    settings: AdjointMatchingSettings,
) -> tuple[Tensor, Tensor]:
    """Add this process's part of the loss's gradient to the model's parameters.

    Args:
        members: positions of the update's trajectories among those of all processes, long.

    Returns:
        Its part of the loss, (), and of the squared controls at the chosen steps, (chosen,), float64.
    """
    batch = buffer.batch
    loss, energies = torch.zeros((), dtype=torch.float64), torch.zeros(len(chosen), dtype=torch.float64)
    mine = torch.isin(batch.positions, members).nonzero().squeeze(1)
    if not len(mine):
        return loss, energies
    known = torch.zeros(settings.steps, dtype=torch.long).index_copy(
        0, buffer.at, torch.arange(len(buffer.at))
    )
    known = known[chosen]
    times = torch.tensor(model.time_grid(settings.steps), dtype=torch.float64)[chosen]
    trajectories = batch.trajectories
    of_control = model.context_for("control", batch.context)
    for part in mine.split(settings.micro_batch or len(mine)):
        squares, controls = _residuals(
            model,
            trajectories[chosen][:, part],
            times.to(trajectories),
            buffer.velocities[known][:, part],
            buffer.adjoints[known][:, part],
            _scale_at(scale, chosen, trajectories),
            model.select_context(of_control, part),
        )
        own = (squares * batch.weights[part]).sum() / (len(chosen) * settings.batch)
        own.backward()
        loss += float(own.detach())
        energies += (controls * batch.weights[part]).double().sum(1)
    return loss, energies


def _network_passes(
    base: FlowModel, settings: AdjointMatchingSettings, buffer: _Buffer, chosen: int, fresh: bool, start: int
) -> int:
    """Network passes of one update, by :data:`flowtilt.control.base.FORWARD` and its like.

    Args:
        base: the model that is being tilted.
        settings: of the regression.
        buffer: of the update.
        chosen: time steps in the loss.
        fresh: whether the buffer was filled for this update.
        start: number of the step that adjoints were solved back to.
    """
    batch = buffer.batch
    control = base.evaluations("control")
    training = chosen * settings.batch * TRAINING * control
    if not fresh:
        return training
    rollout = batch.pool * (settings.steps + 2 * batch.mirrored) * FORWARD * base.evaluations("sampling")
    lean = settings.adjoint == "lean"
    # Along a trajectory there is nothing left to pull back at the first step, and else at the last.
    inner = int((_adjoint_of(buffer.at, settings.target) < settings.steps - 1).sum())
    pulled = (settings.steps - 1 - start) * PULLBACK + FORWARD if lean else inner * PULLBACK
    adjoints = buffer.moving * pulled * base.evaluations("adjoint")
    # The lean adjoint's forward passes give the base's velocities if they are there for the whole batch.
    shared = lean and buffer.moving == settings.kept and control == base.evaluations("adjoint")
    velocities = 0 if shared else len(buffer.at) * settings.kept * FORWARD * control
    return rollout + adjoints + velocities + training


def _diverged(what: str, update: int, settings: AdjointMatchingSettings) -> str:
    return (
        f"Adjoint Matching: {what} at update {update} of {settings.updates}; "
        "lower learning_rate, set control_clip, or raise the KL weight (of fdc, that of a step)"
    )


def _order(settings: AdjointMatchingSettings, generator: torch.Generator) -> Tensor:
    """The order in which a pass takes the kept trajectories; of a single batch there is but one."""
    if settings.kept == settings.batch:
        return torch.arange(settings.batch)
    return torch.randperm(settings.kept, generator=generator)


Schedule = Callable[[float], FirstVariation]
"""The tilt of an update by the share of the updates before it, in [0, 1)."""


def solve(
    base: FlowModel,
    tilt: FirstVariation | Schedule,
    kl_weight: float,
    settings: AdjointMatchingSettings,
    generator: torch.Generator,
    progress: Progress | None = None,
    slot: Slot | None = None,
) -> Solution:
    """Fine-tune a copy of ``base`` to the distribution proportional to ``p_base exp(tilt / kl_weight)``.

    Processes that were joined (:mod:`flowtilt.parallel`) share the trajectories of every update. Both models
    run in evaluation mode all the while, in the regression too: their difference is the control, and dropout
    or the statistics of a batch would be taken for one. The solution has the base's own mode.

    Args:
        base: the model to tilt; left unchanged.
        tilt: what to tilt by; or a schedule that ends at it. Every update is unbiased for the problem of
            its own tilt, so that the last ones solve the problem at the schedule's end.
        kl_weight: positive, in units of the tilt a nat.
        settings: of the regression.
        generator: source of all randomness.
        progress: called with each update's row of the history.
        slot: where the solve keeps its state, and goes on from if it was stopped.

    Returns:
        The fine-tuned model and its history: ``loss``, ``active_share`` (of the pool, the
        endpoints on which the tilt is active and has a gradient that is not zero), ``failed_share`` (those
        without a value of a reward that may fail; they have no gradient), ``path_kl`` (the
        path-space KL divergence from the base, in nats, estimated on the steps of the loss),
        ``gradient_norm``, ``clipped_share`` (of the controls asked for in the loss, those that were
        shortened), ``network_passes`` (states that have gone through the network since the start, a backward
        pass to the input counted as one and to the parameters as two; what the tilt's own gradient takes is
        not in it), ``seconds``.

    Raises:
        ValueError: if ``kl_weight`` is not positive.
        TrainingDiverged: if the loss or the trajectories stop being finite, or the control energy is above
            :data:`flowtilt.control.base.MOST_NATS`; the message names the update.
        NoValues: if the tilt has no value on any trajectory of an update.
        CheckpointError: if the state to go on from belongs to another solve.
    """
    check_value("the KL weight of a solve", kl_weight, POSITIVE)
    base = copy.deepcopy(base).requires_grad_(False)
    model = copy.deepcopy(base)
    for parameter in model.tunable():
        parameter.requires_grad_(True)
    optimiser = Adam(model.tunable(), settings.moments, settings.weight_decay)
    state = TrainingState(model, optimiser, generator, (settings, kl_weight), slot)
    with evaluating(base, model):
        _train(base, model, state, tilt, kl_weight, settings, progress)
    model.requires_grad_(False)
    return Solution(model, state.history)


def _train(
    base: FlowModel,
    model: FlowModel,
    state: TrainingState,
    tilt: FirstVariation | Schedule,
    kl_weight: float,
    settings: AdjointMatchingSettings,
    progress: Progress | None,
) -> None:
    """All updates of a solve that are still to be done; see :func:`solve`."""
    optimiser, generator = state.optimiser, state.generator
    steps = memoryless_steps(base, settings.steps)
    scale = loss_scale(base, steps, settings.target)
    parts = settings.parts(base.time_grid(settings.steps))
    # The adjoint of the state that the first of these steps starts from belongs to the step before it.
    start = max(0, parts[0].start - 1) if settings.target == "state" else parts[0].start
    several = settings.updates_of_a_buffer
    sharing = processes()
    passes = int(state.history[-1]["network_passes"]) if state.history else 0
    for update in range(len(state.history), settings.updates):
        fresh = update % several == 0  # also of the first after an interruption
        if fresh:
            own = tilt if isinstance(tilt, FirstVariation) else tilt(update / settings.updates)
            strength = min(1.0, (update + 1) / max(1.0, settings.ramp * settings.updates))
            try:
                batch = _draw_batch(model, own, settings, steps, -strength / kl_weight, generator, sharing)
            except TrainingDiverged as error:
                raise TrainingDiverged(_diverged(str(error), update, settings)) from None
            except NoValues as error:
                raise NoValues(
                    f"Adjoint Matching: {error} of update {update} of {settings.updates}; look at the model "
                    "that draws them, or raise batch and pool"
                ) from None
        chosen = draw_steps(parts, generator)
        if fresh:
            at = chosen if several == 1 else torch.arange(parts[0].start, settings.steps)
            buffer = _fill(base, batch, at, scale, steps, settings, sharing, start)
        number = update % (settings.kept // settings.batch)
        if number == 0:
            order = _order(settings, generator)
        members = order[number * settings.batch : (number + 1) * settings.batch]
        optimiser.clear_gradients()
        own_loss, energies = _accumulate(model, buffer, members, chosen, scale, settings)
        loss = float(sharing.total(own_loss))
        if not math.isfinite(loss):
            raise TrainingDiverged(_diverged(f"the loss is {loss}", update, settings))
        sharing.sum_gradients(optimiser.parameters)
        norm = torch.nn.utils.clip_grad_norm_(optimiser.parameters, settings.gradient_clip)
        optimiser.step(rate_of(update, settings))
        passes += _network_passes(base, settings, buffer, len(chosen), fresh, start)
        row: dict[str, Any] = {
            "update": update,
            "loss": loss,
            "active_share": buffer.batch.active_share,
            "failed_share": buffer.batch.failed_share,
            "path_kl": path_kl(sharing.total(energies) / settings.batch, parts, settings.steps),
            "gradient_norm": float(norm),
            "clipped_share": buffer.clipped,
            "network_passes": passes,
            "seconds": state.seconds(),
        }
        latest = [*state.history[1 - WINDOW :], row]
        spent = sum(each["path_kl"] for each in latest) / len(latest)
        if not spent <= MOST_NATS:
            found = f"the model has moved {spent:.4g} nats from its base, more than {MOST_NATS:g},"
            raise TrainingDiverged(_diverged(found, update, settings))
        state.add(row, progress, whole=(update + 1) % several == 0)
