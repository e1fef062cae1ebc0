"""The largest value of a functional over distributions on a grid, and Flow Density Control's steps there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowtilt.domains.planar.grid import log_sum_exp, tail_tilt
from flowtilt.functionals.base import FiniteDistribution, Functional, Objective
from flowtilt.functionals.divergences import KL, Wasserstein1
from flowtilt.functionals.utilities import SQ, CVaR, ExpectedReward
from flowtilt.metrics.transport import ground_distances
from flowtilt.words import Tail


@dataclass(frozen=True)
class Optimum:
    """A maximiser that was found.

    Attributes:
        log_p: log probabilities, (n,).
        value: of the functional there.
        slack: ``max_x G'(x) - E_p G'``, how much more a concave functional could be worth anywhere; the
            mean over modes of these for a distribution of points and modes.
        steps: how many were taken.
    """

    log_p: np.ndarray
    value: float
    slack: float
    steps: int


def tilt(distribution: FiniteDistribution, exponents: np.ndarray) -> tuple[FiniteDistribution, float]:
    """The distribution proportional to ``p exp(exponents)``, and the logarithm of its normaliser.

    A distribution of pairs of a point and a mode is tilted in each mode by itself, since no model can change
    how likely a mode is: the second is then the mean over modes of the logarithms of their normalisers.
    """
    tilted = distribution.log_p + exponents
    if distribution.modes is None:
        normaliser = log_sum_exp(tilted)
        return replace(distribution, log_p=tilted - normaliser), normaliser
    kept = np.bincount(distribution.modes, distribution.p)
    normalisers = np.array([log_sum_exp(tilted[distribution.modes == k]) for k in range(len(kept))]) - np.log(
        kept
    )
    return replace(distribution, log_p=tilted - normalisers[distribution.modes]), float(kept @ normalisers)


def mirror_step(objective: Functional, distribution: FiniteDistribution, weight: float) -> FiniteDistribution:
    """One exact step of Flow Density Control: the :func:`tilt` of ``p`` by ``G' / weight``."""
    return tilt(distribution, objective.finite_variation(distribution) / weight)[0]


def mirror_iterates(
    objective: Functional, distribution: FiniteDistribution, weight: float, count: int
) -> list[FiniteDistribution]:
    """The distributions after each of ``count`` steps from ``distribution``."""
    iterates = []
    for _ in range(count):
        distribution = mirror_step(objective, distribution, weight)
        iterates.append(distribution)
    return iterates


def maximise(
    objective: Functional,
    starts: Sequence[FiniteDistribution],
    tolerance: float = 1e-6,
    steps: int = 500,
) -> Optimum:
    """The best of mirror ascents from several starts.

    Each step has the smallest KL weight, halved before and doubled until the value rises by at least
    what relative smoothness promises (Lu, Freund and Nesterov 2018):
    ``G(q) >= G(p) + <G'(p), q - p> - weight KL(q || p)``. So the value never falls, and for a concave
    functional ``slack`` bounds what is missing. For one that is not, it is the best stationary point.

    Args:
        objective: the functional to raise.
        starts: distributions on the same points; all but the first are left out where they are not feasible.
        tolerance: the ascent ends when the slack is this share of what was gained since the start.
        steps: most steps of each ascent.
    """
    first, *others = starts
    feasible = [first, *(start for start in others if _is_feasible(objective, start))]
    return max((_ascend(objective, start, tolerance, steps) for start in feasible), key=lambda o: o.value)


def _is_feasible(objective: Functional, distribution: FiniteDistribution) -> bool:
    try:
        objective.finite_value(distribution)
    except ValueError:  # as functionals raise outside of their domain
        return False
    return True


def _ascend(objective: Functional, distribution: FiniteDistribution, tolerance: float, steps: int) -> Optimum:
    first = value = objective.finite_value(distribution)
    variation = objective.finite_variation(distribution)
    weight = max(float(np.sqrt(distribution.p @ (variation - distribution.p @ variation) ** 2)), 1e-12)
    taken = 0
    while taken < steps:
        if _slack(variation, distribution) <= tolerance * max(value - first, 1e-12):
            break
        found = _line_search(objective, distribution, value, variation, weight / 2)
        if found is None:
            break  # no step of any size gains more than rounding
        distribution, value, weight = found
        taken += 1
        variation = objective.finite_variation(distribution)
    return Optimum(distribution.log_p, value, _slack(variation, distribution), taken)


def _slack(variation: np.ndarray, distribution: FiniteDistribution) -> float:
    if distribution.modes is None:
        return float(variation.max() - distribution.p @ variation)
    kept = np.bincount(distribution.modes, distribution.p)
    highest = np.array([variation[distribution.modes == k].max() for k in range(len(kept))])
    return float(kept @ highest - distribution.p @ variation)


def _line_search(
    objective: Functional,
    distribution: FiniteDistribution,
    value: float,
    variation: np.ndarray,
    weight: float,
) -> tuple[FiniteDistribution, float, float] | None:
    """The step of the smallest weight that keeps its promise; the distribution, its value and the weight."""
    mean = float(distribution.p @ variation)
    for _ in range(60):
        candidate, normaliser = tilt(distribution, (variation - mean) / weight)
        # <G', q - p> - weight KL(q || p) = weight log E_p exp((G' - E_p G') / weight)
        promised = weight * normaliser
        try:
            reached = objective.finite_value(candidate)
        except ValueError:  # outside of the functional's domain
            reached = -np.inf
        if reached >= value + promised - 1e-13 * abs(value):
            return (candidate, reached, weight) if reached > value else None
        weight *= 2
    return None


def transport_optimum(objective: Objective, distribution: FiniteDistribution) -> Optimum:
    """The maximiser of an expected reward less a multiple of W1 from the reference, exactly.

    Any coupling of the reference with some distribution is allowed, so that each point's mass moves on its
    own to where ``r(y) - alpha d(x, y)`` is largest.

    Raises:
        TypeError: for another utility or divergence.
    """
    reward, distance = objective.utility, objective.divergence
    if not (isinstance(reward, ExpectedReward) and isinstance(distance, Wasserstein1)):
        raise TypeError("the transport optimum is known for an expected reward under W1 only")
    rewards = reward.finite_variation(distribution)
    points = distribution.points.numpy(force=True)
    worth = rewards - objective.alpha * ground_distances(points, points, distance.weights)
    best = worth.argmax(axis=1)
    p = np.bincount(best, distribution.reference, minlength=len(best))
    value = float(distribution.reference @ worth.max(axis=1))
    return Optimum(distribution.with_p(p).log_p, value, 0.0, 0)


def tail_optimum(objective: Objective, distribution: FiniteDistribution) -> Optimum:
    """The maximiser of a tail mean under KL, by its exact dual threshold (see :mod:`flowtilt.thresholds`).

    Raises:
        TypeError: for another utility or divergence.
    """
    utility = objective.utility
    if not (isinstance(utility, CVaR | SQ) and isinstance(objective.divergence, KL)):
        raise TypeError("the dual optimum is known for a tail mean under KL only")
    tail: Tail = "lower" if isinstance(utility, CVaR) else "upper"
    rewards = utility.reward(distribution.points).double().numpy(force=True)
    log_p = tail_tilt(distribution.log_reference, rewards, objective.alpha, utility.mass, tail)[0]
    return Optimum(log_p, objective.finite_value(replace(distribution, log_p=log_p)), 0.0, 0)


def optimum_of(objective: Objective, starts: Sequence[FiniteDistribution]) -> Optimum:
    """The maximiser, in closed form where there is one."""
    utility, divergence = objective.utility, objective.divergence
    if isinstance(utility, ExpectedReward) and isinstance(divergence, Wasserstein1):
        return transport_optimum(objective, starts[0])
    if isinstance(utility, CVaR | SQ) and isinstance(divergence, KL) and objective.alpha > 0:
        return tail_optimum(objective, starts[0])
    return maximise(objective, starts)
