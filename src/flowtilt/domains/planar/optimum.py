"""The largest value of a functional over laws on a grid, and the steps of Flow Density Control there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowtilt.domains.planar.grid import log_sum_exp, tail_tilt
from flowtilt.functionals.base import FiniteLaw, Functional, Objective
from flowtilt.functionals.divergences import KL, Wasserstein1
from flowtilt.functionals.utilities import SQ, CVaR, ExpectedReward
from flowtilt.metrics.transport import ground_distances
from flowtilt.words import Side


@dataclass(frozen=True)
class Optimum:
    """A maximiser that was found.

    Attributes:
        log_p: log probabilities, (n,).
        value: of the functional there.
        slack: ``max_x G'(x) - E_p G'``, how much more a concave functional could be worth anywhere; the
            mean over modes of these for a law of points and modes.
        steps: how many were taken.
    """

    log_p: np.ndarray
    value: float
    slack: float
    steps: int


def tilt(law: FiniteLaw, exponents: np.ndarray) -> tuple[FiniteLaw, float]:
    """The law proportional to ``p exp(exponents)``, and the logarithm of its normaliser.

    A law of pairs of a point and a mode is tilted in each mode by itself, since no model can change how
    likely a mode is: the second is then the mean over modes of the logarithms of their normalisers.
    """
    tilted = law.log_p + exponents
    if law.modes is None:
        normaliser = log_sum_exp(tilted)
        return replace(law, log_p=tilted - normaliser), normaliser
    kept = np.bincount(law.modes, law.p)
    normalisers = np.array([log_sum_exp(tilted[law.modes == k]) for k in range(len(kept))]) - np.log(kept)
    return replace(law, log_p=tilted - normalisers[law.modes]), float(kept @ normalisers)


def mirror_step(objective: Functional, law: FiniteLaw, weight: float) -> FiniteLaw:
    """One exact step of Flow Density Control: the :func:`tilt` of ``p`` by ``G' / weight``."""
    return tilt(law, objective.finite_variation(law) / weight)[0]


def mirror_iterates(objective: Functional, law: FiniteLaw, weight: float, count: int) -> list[FiniteLaw]:
    """The laws after each of ``count`` steps from ``law``."""
    iterates = []
    for _ in range(count):
        law = mirror_step(objective, law, weight)
        iterates.append(law)
    return iterates


def maximise(
    objective: Functional,
    starts: Sequence[FiniteLaw],
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
        starts: laws on the same points; all but the first are left out where they are not feasible.
        tolerance: the ascent ends when the slack is this share of what was gained since the start.
        steps: most steps of each ascent.
    """
    first, *others = starts
    feasible = [first, *(start for start in others if _is_feasible(objective, start))]
    return max((_ascend(objective, start, tolerance, steps) for start in feasible), key=lambda o: o.value)


def _is_feasible(objective: Functional, law: FiniteLaw) -> bool:
    try:
        objective.finite_value(law)
    except ValueError:  # as functionals raise outside of their domain
        return False
    return True


def _ascend(objective: Functional, law: FiniteLaw, tolerance: float, steps: int) -> Optimum:
    first = value = objective.finite_value(law)
    variation = objective.finite_variation(law)
    weight = max(float(np.sqrt(law.p @ (variation - law.p @ variation) ** 2)), 1e-12)
    taken = 0
    while taken < steps:
        if _slack(variation, law) <= tolerance * max(value - first, 1e-12):
            break
        found = _line_search(objective, law, value, variation, weight / 2)
        if found is None:
            break  # no step of any size gains more than rounding
        law, value, weight = found
        taken += 1
        variation = objective.finite_variation(law)
    return Optimum(law.log_p, value, _slack(variation, law), taken)


def _slack(variation: np.ndarray, law: FiniteLaw) -> float:
    if law.modes is None:
        return float(variation.max() - law.p @ variation)
    kept = np.bincount(law.modes, law.p)
    highest = np.array([variation[law.modes == k].max() for k in range(len(kept))])
    return float(kept @ highest - law.p @ variation)


def _line_search(
    objective: Functional, law: FiniteLaw, value: float, variation: np.ndarray, weight: float
) -> tuple[FiniteLaw, float, float] | None:
    """The step of the smallest weight that keeps its promise; the law, its value and the weight."""
    mean = float(law.p @ variation)
    for _ in range(60):
        candidate, normaliser = tilt(law, (variation - mean) / weight)
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


def transport_optimum(objective: Objective, law: FiniteLaw) -> Optimum:
    """The maximiser of an expected reward less a multiple of W1 from the reference, exactly.

    Any coupling of the reference with some law is allowed, so that each point's mass moves on its own
    to where ``r(y) - alpha d(x, y)`` is largest.

    Raises:
        TypeError: for another utility or divergence.
    """
    reward, distance = objective.utility, objective.divergence
    if not (isinstance(reward, ExpectedReward) and isinstance(distance, Wasserstein1)):
        raise TypeError("the transport optimum is known for an expected reward under W1 only")
    rewards = reward.finite_variation(law)
    points = law.points.numpy(force=True)
    worth = rewards - objective.alpha * ground_distances(points, points, distance.weights)
    best = worth.argmax(axis=1)
    p = np.bincount(best, law.reference, minlength=len(best))
    value = float(law.reference @ worth.max(axis=1))
    return Optimum(law.with_p(p).log_p, value, 0.0, 0)


def tail_optimum(objective: Objective, law: FiniteLaw) -> Optimum:
    """The maximiser of a tail mean under KL, by its exact dual threshold (see :mod:`flowtilt.thresholds`).

    Raises:
        TypeError: for another utility or divergence.
    """
    tail = objective.utility
    if not (isinstance(tail, CVaR | SQ) and isinstance(objective.divergence, KL)):
        raise TypeError("the dual optimum is known for a tail mean under KL only")
    side: Side = "lower" if isinstance(tail, CVaR) else "upper"
    mass = tail.level if isinstance(tail, CVaR) else 1 - tail.level
    rewards = tail.reward(law.points).double().numpy(force=True)
    log_p = tail_tilt(law.log_reference, rewards, objective.alpha, mass, side)[0]
    return Optimum(log_p, objective.finite_value(replace(law, log_p=log_p)), 0.0, 0)


def optimum_of(objective: Objective, starts: Sequence[FiniteLaw]) -> Optimum:
    """The maximiser, in closed form where there is one."""
    utility, divergence = objective.utility, objective.divergence
    if isinstance(utility, ExpectedReward) and isinstance(divergence, Wasserstein1):
        return transport_optimum(objective, starts[0])
    if isinstance(utility, CVaR | SQ) and isinstance(divergence, KL) and objective.alpha > 0:
        return tail_optimum(objective, starts[0])
    return maximise(objective, starts)
