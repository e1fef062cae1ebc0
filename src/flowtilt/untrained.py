"""Baselines that train nothing: best of N, resampling of a bank, and sequential Monte Carlo.

All three tilt the samples of a pretrained flow and leave its weights alone. A fine-tuning pays once; they pay
for every sample that is kept, and return what it has cost in network passes and reward calls. As in
:mod:`flowtilt.tilts`, contexts have a distribution of their own, which stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowtilt.interpolants import add_scaled, broadcast_time, convert
from flowtilt.model import Context, FlowModel, evaluated
from flowtilt.ranges import COUNT, MASS, POSITIVE, check, check_value
from flowtilt.rewards import Reward
from flowtilt.sampling import CHUNK, memoryless_steps
from flowtilt.tilts import Groups, tilted

Draw = Callable[[FlowModel, int, torch.Generator, Context], Tensor]
"""A sampler: from a model, a number of samples, a generator and their context to samples (count, ...)."""


@dataclass(frozen=True)
class Kept:
    """Samples that a baseline has kept.

    Attributes:
        samples: (count, ...).
        context: of each sample.
        rewards: of each sample, NaN where an evaluation failed, (count,).
        drawn: samples that were drawn, or particles, for each one that is kept.
        network_passes: of the pretrained network, for each one that is kept.
        reward_calls: of the reward, for each one that is kept.
        kl: from the pretrained distribution, in nats: see each function.
        effective_share: effective samples over those that were drawn, where they are weighted; else 1. Of
            sequential Monte Carlo ``1 / (1 + sum_k (1 / s_k - 1))`` by the shares at all resamplings and at
            the end: an upper bound, since copies have their past in common. Over contexts it is the harmonic
            mean, as in :class:`flowtilt.tilts.Tilted`.
        distinct_share: distinct samples over those kept.
        log_normalisers: ``log E[exp(tilt) | group]`` as estimated, where one is, by group.
    """

    samples: Tensor
    context: Context
    rewards: Tensor
    drawn: float
    network_passes: float
    reward_calls: float
    kl: float
    effective_share: float = 1.0
    distinct_share: float = 1.0
    log_normalisers: np.ndarray | None = None


# -------------------------------------------------------------------------------- best of N


def best_of(
    model: FlowModel,
    reward: Reward,
    n: int,
    count: int,
    draw: Draw,
    passes: int,
    generator: torch.Generator,
    context: Context = None,
    chunk: int = CHUNK,
) -> Kept:
    """Of every ``n`` fresh samples of one context, the one of the largest reward.

    Where the pretrained reward has the distribution function ``F`` in a context, that of what is kept is
    ``F^n``, which is ``log n - (n - 1) / n`` nats from the pretrained distribution if ``F`` is continuous,
    and no more in any case (Beirami et al. 2024). A sample whose evaluation failed counts as worse than any
    other.

    Args:
        n: samples that each kept one is chosen from, at least 1.
        count: samples to keep.
        draw: the sampler.
        passes: network passes of one of its samples.
        context: of the samples to keep; drawn if not given.
        chunk: samples that are drawn together.
    """
    check_value("n, of the best of n,", n, COUNT)
    check_value("samples to keep", count, COUNT)
    context = model.draw_context(count, generator) if context is None else context
    parts = []
    for index in torch.arange(count).split(chunk):
        part = model.select_context(context, index)
        best = draw(model, len(index), generator, part).clone()
        rewards = reward(best, part).clone()
        for _ in range(n - 1):
            samples = draw(model, len(index), generator, part)
            found = reward(samples, part)
            better = (found > rewards) | (rewards.isnan() & ~found.isnan())
            best[better], rewards[better] = samples[better], found[better]
        parts.append((best, rewards))
    samples, rewards = (torch.cat(each) for each in zip(*parts, strict=True))
    return Kept(samples, context, rewards, n, n * passes, n, math.log(n) - (n - 1) / n)


# -------------------------------------------------------------------------------- resampling


def systematic(probabilities: np.ndarray, count: int, offset: float) -> np.ndarray:
    """Indices of ``count`` samples by systematic resampling, sorted, (count,).

    Each sample is there ``count p_i`` times, rounded down or up (Kitagawa 1996).

    Args:
        probabilities: of sum 1, (N,).
        offset: the one random number that it takes, in [0, 1).
    """
    edges = np.cumsum(probabilities)
    edges /= edges[-1]
    return np.searchsorted(edges, (np.arange(count) + offset) / count, side="right").clip(max=len(edges) - 1)


def _shared_out(shares: np.ndarray, count: int, offset: float) -> np.ndarray:
    """Whole numbers of sum ``count`` in proportion to ``shares``, each rounded down or up; of mean
    ``count shares`` over the offset."""
    exact = count * shares
    whole = np.floor(exact + 1e-9)  # what is whole but for rounding errors stays
    left = np.maximum(exact - whole, 0)
    if rest := count - int(whole.sum()):
        whole += np.bincount(systematic(left / left.sum(), rest, offset), minlength=len(shares))
    return whole.astype(np.int64)


@dataclass(frozen=True)
class Resampled:
    """A bank that was resampled.

    Attributes:
        index: into the bank, in random order, (count,).
        kl: of the bank's weights from equal ones, in nats; see :class:`flowtilt.tilts.Tilted`.
        effective_share: effective samples of the bank, over all.
        distinct_share: distinct samples over those kept.
    """

    index: np.ndarray
    kl: float
    effective_share: float
    distinct_share: float


def resample(exponents: np.ndarray, groups: Groups, count: int, generator: torch.Generator) -> Resampled:
    """Importance resampling of a bank under the tilt by ``exponents``, within each group.

    Args:
        exponents: of the samples, in nats, (N,).
        groups: of the samples; each is kept in proportion to its own probability.
        count: samples to keep.

    Raises:
        ValueError: for exponents that are not finite.
    """
    check_value("samples to keep", count, COUNT)
    under = tilted(exponents, groups)
    offsets = torch.rand(len(groups) + 1, generator=generator, dtype=torch.float64).numpy(force=True)
    chosen = []
    for group, number in enumerate(_shared_out(groups.shares, count, offsets[-1])):
        own = np.flatnonzero(groups.labels == group)
        p = under.probabilities[own]
        chosen.append(own[systematic(p / p.sum(), number, offsets[group])] if number else own[:0])
    index = np.concatenate(chosen)[torch.randperm(count, generator=generator).numpy(force=True)]
    return Resampled(index, under.kl, under.effective_share, len(np.unique(index)) / count)


# -------------------------------------------------------------------------------- sequential Monte Carlo


@dataclass(frozen=True)
class SteeringSettings:
    """How particles are steered.

    Attributes:
        particles: simulated for each sample that is kept.
        steps: of the memoryless process.
        every: steps from one weighting to the next; the last one is at the end in any case.
        share: effective share of a group's particles below which they are resampled.
    """

    particles: int = 4
    steps: int = 20
    every: int = 1
    share: float = 0.5

    def __post_init__(self) -> None:
        check(self, "steering's ", particles=COUNT, steps=COUNT, every=COUNT, share=MASS)


@evaluated
@torch.no_grad()
def steer(
    model: FlowModel,
    reward: Reward,
    kl_weight: float,
    count: int,
    settings: SteeringSettings,
    generator: torch.Generator,
    context: Context = None,
    chunk: int = CHUNK,
) -> Kept:
    """Samples of ``p(x | c) exp(reward / kl_weight)`` by sequential Monte Carlo along the memoryless process.

    Feynman-Kac steering (Singhal et al. 2025) with the reward at the posterior mean ``E[x_1 | x_t]``: at time
    t a trajectory has the potential ``s(t) reward(E[x_1 | x_t]) / kl_weight``. Here ``s`` is
    ``alpha^2 / (alpha^2 + beta^2)``, the share of the state's variance that is data, for data of variance 1.
    At the end the potential is that of the sample itself, at full strength: so weights are right for any
    ``s``, and the normaliser is without bias. Where the posterior mean misleads, particles are lost.

    The network pass of a step gives the posterior mean as well: steering costs reward calls beside a plain
    sample, and no passes. Particles of one context compete with each other alone. The reward of an evaluation
    that failed is the worst of all particles'.

    The divergence of what is kept is ``E[reward] / kl_weight - log Z``, the mean over contexts, by the final
    weights of all particles.

    Args:
        kl_weight: alpha, positive, in units of the reward.
        count: samples to keep.
        context: of the samples to keep; drawn if not given.
        chunk: particles that go through the network, and the reward, together.

    Raises:
        ValueError: for settings out of range.
    """
    check_value("kl_weight", kl_weight, POSITIVE)
    check_value("samples to keep", count, COUNT)
    context = model.draw_context(count, generator) if context is None else context
    of = torch.arange(count).repeat_interleave(settings.particles)
    context = model.select_context(context, of)
    labels = model.context_labels(context)
    groups = Groups.of(None if labels is None else labels.numpy(force=True), np.arange(len(of)))
    cloud = _Cloud(groups, settings.share, generator)
    x, times = model.prior(len(of), generator, context), model.time_grid(settings.steps)
    weightings = 1

    def in_parts(function: Callable[..., Tensor], states: Tensor) -> Tensor:
        parts = torch.arange(len(states)).split(chunk)
        return torch.cat([function(states[p], context=model.select_context(context, p)) for p in parts])

    for k, step in enumerate(memoryless_steps(model, settings.steps)):
        t = x.new_tensor(times[k])
        v = in_parts(partial(model.velocity, t=t), x)
        if k and k % settings.every == 0:
            strength = float(_data_share(model, t, x))
            found = in_parts(reward, convert(v, x, t, model.path, "velocity", "endpoint"))
            weightings += 1
            if (index := cloud.weighted(strength / kl_weight * _settled(found))) is not None:
                x, v = x[index], v[index]
        step = step.like(x)
        x = add_scaled(step.state * x, v, step.velocity)
        if step.noisy:
            x = add_scaled(x, model.noise_like(x, generator, context), step.noise)
            cloud.apart()
    rewards = in_parts(reward, x)
    cloud.weighted(_settled(rewards) / kl_weight, last=True)
    index, kl = cloud.kept(settings.particles)
    return Kept(
        x[index],
        model.select_context(context, index),
        rewards[index],
        settings.particles,
        settings.particles * settings.steps * model.evaluations("sampling"),
        settings.particles * weightings,
        kl,
        cloud.effective_share,
        len(np.unique(cloud.copies[index.numpy(force=True)])) / count,
        cloud.log_normalisers,
    )


def _data_share(model: FlowModel, t: Tensor, x: Tensor) -> Tensor:
    """``alpha^2 / (alpha^2 + beta^2)`` at a time; the mean over columns that have paths of their own."""
    at = broadcast_time(t, x)
    alpha, beta = model.path.alpha(at).square(), model.path.beta(at).square()
    return (alpha / (alpha + beta)).mean()


def _settled(rewards: Tensor) -> Tensor:
    """Rewards with the worst one in the place of those that failed, in float64."""
    values = rewards.double()
    failed = values.isnan()
    if bool(failed.all()):
        return torch.zeros_like(values)
    return values.masked_fill(failed, float(values[~failed].min()))


class _Cloud:
    """Weights of particles, group by group, and which are copies of each other.

    Attributes:
        log_normalisers: as estimated so far, (groups,).
        noise: ``sum_k (1 / s_k - 1)`` by a group's shares at its resamplings and at the end, (groups,).
        copies: like numbers for particles in one place, (N,).
    """

    def __init__(self, groups: Groups, share: float, generator: torch.Generator) -> None:
        self.groups, self.share, self.generator = groups, share, generator
        self.members = [np.flatnonzero(groups.labels == group) for group in range(len(groups))]
        size = len(groups.labels)
        self.log_weights, self.potentials = np.zeros(size), np.zeros(size)
        self.log_normalisers, self.noise = np.zeros(len(groups)), np.zeros(len(groups))
        self.copies = np.arange(size)

    def apart(self) -> None:
        """No particle is where another one is: noise has moved them."""
        self.copies = np.arange(len(self.copies))

    def weighted(self, potentials: Tensor, last: bool = False) -> Tensor | None:
        """Weigh all particles by the rise of their potentials (N,), and resample groups that need it.

        Returns:
            The particles' indices among those before, (N,), if some were resampled; at the ``last`` weighting
            none are.
        """
        new = potentials.numpy(force=True)
        self.log_weights += new - self.potentials
        self.potentials = new.copy()
        index, moved = np.arange(len(new)), False
        for group, own in enumerate(self.members):
            p = self._normalised(own)
            share = 1 / (p @ p) / len(own)
            if last or share < self.share:
                self.noise[group] += 1 / share - 1
            if last or share >= self.share:
                continue
            moved = True
            self.log_normalisers[group] += _log_mean_exp(self.log_weights[own])
            index[own] = own[systematic(p, len(own), self._uniform())]
            self.log_weights[own] = 0.0
        if not moved:
            return None
        self.potentials, self.copies = self.potentials[index], self.copies[index]
        return torch.from_numpy(index).to(potentials.device)

    def kept(self, particles: int) -> tuple[Tensor, float]:
        """One particle for each ``particles`` that follow each other, by the weights of their group: indices
        (count,) whose contexts are in the order of the particles'; and the divergence of the weights."""
        index, kl = np.empty(len(self.copies) // particles, dtype=np.int64), 0.0
        for group, own in enumerate(self.members):
            p = self._normalised(own)
            self.log_normalisers[group] += _log_mean_exp(self.log_weights[own])
            kl += self.groups.shares[group] * (p @ self.potentials[own] - self.log_normalisers[group])
            chosen = own[systematic(p, len(own) // particles, self._uniform())]
            order = torch.randperm(len(chosen), generator=self.generator).numpy(force=True)
            index[own[::particles] // particles] = chosen[order]
        return torch.from_numpy(index), float(kl)

    @property
    def effective_share(self) -> float:
        """See :class:`Kept`."""
        return float(1 / (self.groups.shares @ (1 + self.noise)))

    def _normalised(self, own: np.ndarray) -> np.ndarray:
        """Weights of the particles of a group, of sum 1."""
        w = np.exp(self.log_weights[own] - self.log_weights[own].max())
        return w / w.sum()

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def _log_mean_exp(values: np.ndarray) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).mean()))
