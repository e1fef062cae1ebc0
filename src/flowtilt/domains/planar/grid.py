"""Distributions on a fine grid of the plane, and the papers' methods solved exactly on them.

A distribution is an array of cell probabilities; a tilt is an array of exponents. Nothing is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from flowtilt.functionals.base import FiniteDistribution
from flowtilt.functionals.utilities import SQ, CVaR, Hinge
from flowtilt.metrics.tails import hinge, quantile
from flowtilt.mirror import MirrorStep, find_step
from flowtilt.model import Context
from flowtilt.rewards import Reward
from flowtilt.thresholds import threshold
from flowtilt.words import Tail, read_tail

Blur = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Grid:
    """Cell centres of a square grid over ``[-extent, extent]^2``.

    Attributes:
        extent: half the side, dimensionless as the planar coordinates are.
        cells: number of cells along a side.
    """

    extent: float
    cells: int

    @property
    def spacing(self) -> float:
        return 2 * self.extent / self.cells

    @property
    def axis(self) -> np.ndarray:
        return -self.extent + self.spacing * (np.arange(self.cells) + 0.5)

    @property
    def points(self) -> np.ndarray:
        """Cell centres, (cells, cells, 2); the first axis runs along x."""
        return np.stack(np.meshgrid(self.axis, self.axis, indexing="ij"), axis=-1)

    @property
    def flat_points(self) -> torch.Tensor:
        """The same as a batch, float64, (cells^2, 2)."""
        return torch.from_numpy(self.points.reshape(-1, 2))

    def rewards(self, reward: Reward, shift: float = 0.0) -> np.ndarray:
        """A reward at all cell centres, or at points shifted from them along both axes, (cells, cells)."""
        flat = torch.from_numpy(self.points.reshape(-1, 2) + shift)
        return reward(flat).numpy().reshape(self.cells, self.cells)


def log_sum_exp(values: np.ndarray) -> float:
    """``log sum exp`` over all entries, of which one at least is finite; scipy's takes longer to import."""
    top = float(values.max())
    return top + math.log(np.exp(values - top).sum())


def normalise(log_density: np.ndarray) -> np.ndarray:
    """Log cell probabilities from an unnormalised log-density on the cells."""
    return log_density - log_sum_exp(log_density)


def finite_distribution(grid: Grid, log_density: np.ndarray) -> FiniteDistribution:
    """The distribution on a grid's cells of a log-density there, which is its own reference.

    Args:
        log_density: in nats at the cell centres, up to a constant, (cells, cells); or of every mode,
            (modes, cells, cells). The distribution is then one of pairs of a cell and a mode, mode by mode,
            with modes equally likely.
    """
    if log_density.ndim == 2:
        log_p = normalise(log_density).ravel()
        return FiniteDistribution(grid.flat_points, log_p, log_p)
    count = len(log_density)
    log_p = np.concatenate([normalise(own).ravel() for own in log_density]) - np.log(count)
    modes = np.repeat(np.arange(count), grid.cells**2)
    return FiniteDistribution(grid.flat_points.repeat(count, 1), log_p, log_p, modes)


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """``KL(p || q)`` in nats, from log cell probabilities."""
    p = np.exp(log_p)
    return float(np.sum(np.where(p > 0, p * (log_p - log_q), 0.0)))


def no_blur(exponent: np.ndarray) -> np.ndarray:
    return exponent


def gaussian_blur(width: float, grid: Grid) -> Blur:
    """Blur exponents with a Gaussian of standard deviation ``width`` (units of the plane)."""
    from scipy.ndimage import gaussian_filter  # takes a quarter of a second, and most jobs do not need it

    def blur(exponent: np.ndarray) -> np.ndarray:
        return gaussian_filter(exponent, width / grid.spacing, mode="nearest")

    return blur


def expected_reward_tilt(
    log_p: np.ndarray, rewards: np.ndarray, kl_weight: float, blur: Blur = no_blur
) -> np.ndarray:
    """The distribution that Adjoint Matching aims at: ``p exp(r / kl_weight)``; log cell probabilities."""
    return normalise(log_p + blur(rewards / kl_weight))


def tail_tilt(
    log_p: np.ndarray, rewards: np.ndarray, alpha: float, mass: float, tail: Tail, blur: Blur = no_blur
) -> tuple[np.ndarray, float]:
    """TFFT on the grid: the exact dual threshold, and the distribution tilted by its hinge. Without blur this
    is the maximiser of ``tail mean - alpha KL`` (the tail problem's optimum)."""
    at = threshold(rewards.ravel(), alpha, mass, tail, weights=np.exp(log_p).ravel())
    return hinge_tilt(log_p, rewards, at, alpha, mass, tail, blur), at


def best_of_tilt(log_p: np.ndarray, rewards: np.ndarray, n: int) -> np.ndarray:
    """Log cell probabilities of the sample of the largest reward among ``n``, of the shape of ``log_p``.

    With ``F`` the distribution function of the reward and ``G`` that from below, cells of one reward have the
    probability ``F^n - G^n`` in place of ``F - G``, shared out as before.
    """
    _, value = np.unique(rewards, return_inverse=True)
    value = value.reshape(rewards.shape)
    mass = np.bincount(value.ravel(), np.exp(log_p).ravel())
    upto = np.cumsum(mass)
    # F^n - G^n without cancellation; where the mass is lost in rounding, its limit n F^(n-1) (F - G).
    share = np.clip(mass / np.maximum(upto, np.finfo(float).tiny), 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.log(-np.expm1(n * np.log1p(-share))) - np.log(share)
    log_ratio = (n - 1) * np.log(np.maximum(upto, 1e-300)) + np.where(share > 0, part, np.log(n))
    return normalise(log_p + log_ratio[value])


def hinge_tilt(
    log_p: np.ndarray,
    rewards: np.ndarray,
    at: float,
    alpha: float,
    mass: float,
    tail: Tail,
    blur: Blur = no_blur,
) -> np.ndarray:
    """The distribution tilted by the hinge at a threshold that is known; log cell probabilities."""
    return normalise(log_p + blur(hinge(rewards, at, mass, tail) / alpha))


def mirror_ascent(
    log_p: np.ndarray,
    rewards: np.ndarray,
    alpha: float,
    step_weight: float,
    mass: float,
    tail: Tail,
    iterations: int,
    blur: Blur = no_blur,
) -> list[np.ndarray]:
    """FDC on the grid for ``tail mean - alpha KL``: the iterates 1..K as log cell probabilities.

    Each solves ``max_q <first variation at p_{k-1}, q> - step_weight KL(q || p_{k-1})``. Only the
    hinge is blurred: it alone can be finer than a network resolves.
    """
    level = mass if read_tail(tail) == "lower" else 1 - mass
    iterates, current = [], log_p
    for _ in range(iterations):
        at = quantile(rewards, level, weights=np.exp(current))
        raised = blur(hinge(rewards, at, mass, tail) / step_weight)
        current = normalise(current + raised - alpha / step_weight * (current - log_p))
        iterates.append(current)
    return iterates


LEVELS = 2**14
"""Levels of the reward that a line search tells apart, a bin's width each."""


class _Itself(Reward):
    """The reward of a point that is a reward."""

    def value(self, x: torch.Tensor, context: Context = None) -> torch.Tensor:
        return x[:, 0]


@dataclass(frozen=True)
class RewardLevels:
    """Cells with nearly the same reward taken together.

    Tail means and the exponents of FDC's steps on them are functions of the reward, so that a line search
    need not tell apart cells that have the same. Which step is taken is chosen on the levels; the step
    itself is then that of every cell.

    Attributes:
        labels: level of each cell, (cells^2,).
        values: mean reward of each level, rising, (levels,).
    """

    labels: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, log_p: np.ndarray, rewards: np.ndarray, count: int = LEVELS) -> RewardLevels:
        """Levels of the cells of a distribution; those without probability are left out of the means."""
        r, p = rewards.ravel(), np.exp(log_p).ravel()
        span = max(float(np.ptp(r)), np.finfo(np.float64).tiny)
        bins = np.minimum(((r - r.min()) / span * count).astype(np.int64), count - 1)
        mass = np.bincount(bins, p, minlength=count)
        means = np.bincount(bins, p * r, minlength=count)
        held = mass > 0
        # A level without probability has the reward of its lower edge, which no step asks for.
        edges = r.min() + span * np.arange(count) / count
        values = np.divide(means, mass, out=edges, where=held)
        used = np.flatnonzero(np.bincount(bins, minlength=count))
        place = np.zeros(count, dtype=np.int64)
        place[used] = np.arange(len(used))
        return cls(place[bins], values[used])

    def distribution(self, log_p: np.ndarray) -> FiniteDistribution:
        """The distribution of the reward under log probabilities of the cells, (cells, cells)."""
        mass = np.bincount(self.labels, np.exp(log_p).ravel(), minlength=len(self.values))
        points = torch.from_numpy(self.values[:, None])
        with np.errstate(divide="ignore"):
            own = np.log(mass / mass.sum())
        return FiniteDistribution(points, own, own)


def searched_ascent(
    log_p: np.ndarray,
    rewards: np.ndarray,
    alpha: float,
    mass: float,
    tail: Tail,
    iterations: int,
    share: float = 0.0,
    blur: Blur = no_blur,
) -> list[np.ndarray]:
    """:func:`mirror_ascent` with the KL weight of each step by line search; fewer iterates where none gains.

    Args:
        log_p: log cell probabilities of the pretrained distribution, (cells, cells).
        rewards: of the cells, of the same shape.
        alpha: KL weight of the tail problem.
        mass: of the tail.
        tail: the tail.
        iterations: most steps.
        share: effective share that a step keeps; see :func:`flowtilt.mirror.find_step`.
        blur: of the exponents that a step adds. The search does not know of it: on samples of a model it does
            not know either what the fit will make of the step.
    """
    levels = RewardLevels.of(log_p, rewards)
    utility = (CVaR if read_tail(tail) == "lower" else SQ)(_Itself(), mass)
    h_levels, h_cells, iterates = np.zeros(len(levels.values)), np.zeros_like(log_p), []
    current = log_p
    for _ in range(iterations):
        step = find_step(utility, alpha, levels.distribution(current), h_levels, share)
        if not step.gain > 0:
            break
        kept = 1 - alpha / step.eta
        h_levels = kept * h_levels + _added(step, levels.values)
        h_cells = kept * h_cells + blur(_added(step, rewards))
        current = normalise(log_p + h_cells)
        iterates.append(current)
    return iterates


def _added(step: MirrorStep, rewards: np.ndarray) -> np.ndarray:
    """``f / eta`` of a step on a tail mean, a mean of hinges, at rewards of any shape."""
    total = np.zeros_like(rewards)
    for weight, part in step.first_variation:
        total += weight / step.eta * cast(Hinge, part).of_rewards(rewards)
    return total
