"""Sampling from a flow: the probability-flow ODE, the memoryless SDE, and log-likelihoods.

All samplers run on the model's grid of times from noise (0) to data (1), in the precision of the model, and
with the model in evaluation mode, which they leave as they found it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from flowtilt.interpolants import Interpolant, MemorylessStep, add_scaled, memoryless_step
from flowtilt.model import Context, FlowModel, evaluated
from flowtilt.parallel import ALONE, Processes
from flowtilt.ranges import COUNT, below, check, check_value

Field = Callable[[Tensor, Tensor], Tensor]


@lru_cache(maxsize=32)
def _steps_of(path: Interpolant, data_variance: float, times: tuple[float, ...]) -> list[MemorylessStep]:
    return [memoryless_step(path, t, s, data_variance) for t, s in itertools.pairwise(times)]


def memoryless_steps(model: FlowModel, steps: int) -> list[MemorylessStep]:
    """The coefficients of all steps of the memoryless process on the model's time grid."""
    return _steps_of(model.path, model.data_variance, tuple(model.time_grid(steps)))


CHUNK = 2048
"""Samples that pass through a network together: small enough for its activations to stay in cache."""


def _chunks(count: int) -> list[int]:
    return [min(CHUNK, count - start) for start in range(0, count, CHUNK)]


def positions_of(count: int, sharing: Processes = ALONE) -> Tensor:
    """Which of ``count`` trajectories of :func:`sample_sde` a process simulates, long."""
    own, start = [], 0
    for size in _chunks(count):
        own.append(torch.arange(start, start + size)[sharing.share(size)])
        start += size
    return torch.cat(own)


@evaluated
@torch.no_grad()
def sample_sde(
    model: FlowModel,
    count: int,
    steps: int,
    generator: torch.Generator,
    context: Context = None,
    sharing: Processes = ALONE,
) -> Tensor:
    """Trajectories of the memoryless SDE, shape (steps + 1, count, ...).

    Weak order 1 in the step size; see :func:`flowtilt.interpolants.memoryless_step` for how the
    two ends are treated. The final step carries no noise.

    Args:
        count: number of trajectories, at least 1.
        sharing: processes that simulate a part each, :func:`positions_of`, which is then what is returned.
    """
    check_value("a sampler's count", count, COUNT)
    coefficients = memoryless_steps(model, steps)
    parts, start = [], 0
    for size in _chunks(count):
        index, own = torch.arange(start, start + size), sharing.share(size)
        every, part = (model.select_context(context, some) for some in (index, index[own]))
        # All processes draw all noise, so that each sample has the one that it has in a single process.
        states = [model.prior(size, generator, every)[own]]
        for t, step in zip(model.time_grid(steps)[:-1], coefficients, strict=True):
            x = states[-1]
            v = model.velocity(x, x.new_tensor(t), part)
            step = step.like(x)
            x_next = add_scaled(step.state * x, v, step.velocity)
            if step.noisy:
                like = x if sharing.count == 1 else x.new_empty(size, *x.shape[1:])
                x_next = add_scaled(x_next, model.noise_like(like, generator, every)[own], step.noise)
            states.append(x_next)
        parts.append(torch.stack(states))
        start += size
    return torch.cat(parts, dim=1)


def _open_ends(times: list[float], margin: float) -> list[float]:
    """Move the two ends inwards: a velocity may be singular exactly at 0 or 1."""
    return [min(max(t, margin), 1 - margin) for t in times]


@dataclass(frozen=True)
class OdeSettings:
    """How the probability-flow ODE is solved.

    Attributes:
        steps: number of steps of the classical Runge-Kutta method (order 4), on the model's time grid.
        margin: distance kept from both ends of time, where a velocity may be singular.
    """

    steps: int = 50
    margin: float = 1e-4

    def __post_init__(self) -> None:
        check(self, "an ODE's ", steps=COUNT, margin=below(0.5))


def _runge_kutta_step(field: Field, x: Tensor, t: float, h: float) -> Tensor:
    at = x.new_tensor
    k1 = field(x, at(t))
    k2 = field(x + 0.5 * h * k1, at(t + 0.5 * h))
    k3 = field(x + 0.5 * h * k2, at(t + 0.5 * h))
    k4 = field(x + h * k3, at(t + h))
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def _integrate(field: Field, x: Tensor, times: list[float]) -> Tensor:
    for t, s in itertools.pairwise(times):
        x = _runge_kutta_step(field, x, t, s - t)
    return x


def _velocity_field(model: FlowModel, context: Context, x: Tensor, t: Tensor) -> Tensor:
    return model.velocity(x, t, context)


@evaluated
@torch.no_grad()
def sample_ode(
    model: FlowModel,
    count: int,
    generator: torch.Generator,
    context: Context = None,
    settings: OdeSettings = OdeSettings(),
) -> Tensor:
    """Samples of the probability-flow ODE ``dx/dt = v(x, t)`` at time 1, shape (count, ...)."""
    check_value("a sampler's count", count, COUNT)
    times = _open_ends(model.time_grid(settings.steps), settings.margin)
    parts, start = [], 0
    for size in _chunks(count):
        part = model.select_context(context, torch.arange(start, start + size))
        x = model.prior(size, generator, part)
        parts.append(_integrate(partial(_velocity_field, model, part), x, times))
        start += size
    return torch.cat(parts)


def _exact_divergence(model: FlowModel, x: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Velocity and its divergence, by one pull-back per dimension."""
    v, pull = model.linearised(x[None], t[None], context)(0)
    divergence = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for i in range(x[0].numel()):
        unit = torch.zeros(x[0].numel(), dtype=x.dtype, device=x.device)
        unit[i] = 1.0
        divergence = divergence + pull(unit.view_as(x[0]).expand_as(x)).reshape(len(x), -1)[:, i]
    return v, divergence


def _augmented_field(model: FlowModel, shape: torch.Size, context: Context) -> Field:
    """The field of (x, log p(x)) along the ODE: ``d log p / dt = -div v`` (Chen et al. 2018)."""

    def field(y: Tensor, t: Tensor) -> Tensor:
        x = y[:, :-1].reshape(-1, *shape)
        v, divergence = _exact_divergence(model, x, t, context)
        return torch.cat([v.reshape(len(y), -1), -divergence[:, None]], dim=1)

    return field


def _prior_log_density(x: Tensor) -> Tensor:
    flat = x.reshape(len(x), -1)
    constant = 0.5 * flat.shape[1] * torch.log(flat.new_tensor(2 * torch.pi))
    return -0.5 * (flat**2).sum(1) - constant


@evaluated
def sample_with_log_density(
    model: FlowModel,
    count: int,
    generator: torch.Generator,
    context: Context = None,
    settings: OdeSettings = OdeSettings(),
) -> tuple[Tensor, Tensor]:
    """Samples of the probability-flow ODE with their own log-densities, (count, ...) and (count,).

    The divergence is exact (one backward pass per dimension): meant for low dimensions.
    """
    x = model.prior(count, generator, context)
    y = torch.cat([x.reshape(count, -1), _prior_log_density(x)[:, None]], dim=1)
    times = _open_ends(model.time_grid(settings.steps), settings.margin)
    y = _integrate(_augmented_field(model, x.shape[1:], context), y, times)
    return y[:, :-1].reshape(x.shape), y[:, -1]


@evaluated
def log_likelihood(
    model: FlowModel, x: Tensor, context: Context = None, settings: OdeSettings = OdeSettings()
) -> Tensor:
    """Log-density of data ``x`` (batch, ...) under the probability-flow ODE, in nats, (batch,).

    Solves the ODE from data back to noise, with the prior taken as standard normal and an exact
    divergence (one backward pass per dimension): meant for low dimensions.
    """
    y = torch.cat([x.reshape(len(x), -1), x.new_zeros(len(x), 1)], dim=1)
    times = _open_ends(model.time_grid(settings.steps), settings.margin)[::-1]
    y = _integrate(_augmented_field(model, x.shape[1:], context), y, times)
    # Backwards in time the last entry holds log p(x_0) - log p(x_1) with the opposite sign.
    return _prior_log_density(y[:, :-1]) - y[:, -1]
