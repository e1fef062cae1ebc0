"""Mirror steps by accumulated exponents, and a line search that keeps them ascending.

Flow Density Control raises ``G(p) = U(p) - alpha KL(p || p_base)`` by tilting ``p_k`` by its first variation
over a weight ``eta``. From exact steps ``p_k`` is proportional to ``p_base exp(h_k)``, with

    h_{k+1} = (1 - alpha / eta) h_k + f_k / eta,    h_0 = 0,

where ``f_k`` is the first variation of the utility U alone: the divergence's is ``h_k``, up to a constant. So
nothing but values of first variations of U is asked for, neither scores nor densities. What this cannot see
is the error of the solves, by which a model is not ``p_k``.

On samples of ``p_k`` the candidates for the next distribution have weights ``w``, and

    G(eta) - const = U(w) - alpha (sum_i w_i log(w_i / p_i) + sum_i w_i h_k(x_i)),

so that eta can be *searched* before any network is trained: it is the one that raises G most among those of
at least ``alpha``, up to where ``h`` is a mean of first variations, that keep the effective sample size. A
step that no eta makes rise is none, and G never falls.

A functional with a kink, as that of an upper tail, has many first variations there, and none need ascend
by itself: with a hinge that holds just the tail's mass, any step moves mass over its edge. Trial
distributions beyond the kink have first variations of their own. Each is an upper bound of a concave U,

    U(q)  <=  U(p_j) + <f_j, q - p_j>,

and the mean of them that makes the least upper bound of G near ``p_k`` is the direction of the next trial.
That is a proximal bundle method (Kiwiel 1990), and costs no training either: a step is taken when trials gain
nothing any more. Where U is not concave the bounds are none, and the line search is what decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flowtilt.functionals.base import (
    FiniteDistribution,
    FirstVariation,
    Functional,
    NoValues,
    WeightedVariation,
)
from flowtilt.model import Context
from flowtilt.ranges import NOT_NEGATIVE, POSITIVE, SHARE, check_value
from flowtilt.tilts import Groups, Tilted, strongest, tilted

TRIALS = 8
"""Most first variations that a direction is a mean of."""

ENOUGH = 1e-3
"""Share of a step's gain below which another trial is not worth its evaluations."""

ROUNDING = 1e-12
"""Share of the size of G that a gain must exceed."""

FINEST = 2.0**-24
"""The weakest candidate, as a share of the strongest."""


@dataclass(frozen=True)
class Plane:
    """The linear part of a utility at one distribution: ``U(p) + <f, q - p>`` is ``constant + <f, q>``.

    Attributes:
        values: f at the points, (n,).
        constant: in units of the utility.
        variation: f as a function of the endpoint, if the utility's has values; else None.
    """

    values: np.ndarray
    constant: float
    variation: FirstVariation | None = None


@dataclass(frozen=True)
class MirrorStep:
    """A step that was found, or that there is none.

    Attributes:
        distribution: the distribution after it.
        eta: its KL weight, in units of the utility a nat; infinite for no step.
        gain: of G, not negative.
        added: exponents that it adds to ``h``, in nats, (n,).
        planes: first variations that its direction is a mean of.
        mix: their weights, of sum 1.
        under: the points' weights under the step.
    """

    distribution: FiniteDistribution
    eta: float
    gain: float
    added: np.ndarray
    planes: tuple[Plane, ...]
    mix: np.ndarray
    under: Tilted

    @property
    def first_variation(self) -> tuple[tuple[float, FirstVariation], ...]:
        """The mean of first variations that the direction is of, as functions of the endpoint.

        Raises:
            NoValues: if the utility's first variation has no values.
        """
        parts = []
        for weight, plane in zip(self.mix.tolist(), self.planes, strict=True):
            if plane.variation is None:
                raise NoValues("the first variation of this step is not known from weights of samples")
            if weight > 0:
                parts.append((weight, plane.variation))
        return tuple(parts)


@dataclass(frozen=True)
class Exponents(WeightedVariation):
    """A weighted sum of first variations that ask for the same rewards, which are evaluated once.

    What a chain of steps has added up, ``h_k``, as a function of the endpoint: in nats.
    """

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        nowhere = np.zeros(len(x))
        return torch.as_tensor(self.on(FiniteDistribution(x, nowhere, nowhere, context=context))).to(x)

    def after(self, step: MirrorStep, alpha: float) -> Exponents:
        """``h_{k+1} = (1 - alpha / eta) h_k + f_k / eta``; the parts of the step come first."""
        kept = tuple((weight * (1 - alpha / step.eta), part) for weight, part in self.parts)
        return Exponents(tuple((weight / step.eta, part) for weight, part in step.first_variation) + kept)

    def direction(self, step: MirrorStep, alpha: float) -> Exponents:
        """``f_k - alpha h_k``: what a solver tilts by under the weight ``eta``, in units of the utility."""
        return Exponents(step.first_variation + tuple((-alpha * weight, part) for weight, part in self.parts))


def numbers_of(variation: FirstVariation) -> list[float]:
    """What tells a first variation from others of the same functional: thresholds, means, slopes."""
    if isinstance(variation, WeightedVariation):
        return [number for _, part in variation.parts for number in numbers_of(part)]
    found: list[float] = []
    for value in _numeric(variation).values():
        found += [value] if isinstance(value, float) else value.flatten().tolist()
    return found


def with_numbers(variation: FirstVariation, numbers: Iterator[float]) -> FirstVariation:
    """The first variation of the same functional with other numbers, in the order of :func:`numbers_of`."""
    if isinstance(variation, WeightedVariation):
        parts = tuple((weight, with_numbers(part, numbers)) for weight, part in variation.parts)
        return replace(variation, parts=parts)
    changes = {
        name: next(numbers)
        if isinstance(value, float)
        else value.new_tensor([next(numbers) for _ in range(value.numel())]).reshape(value.shape)
        for name, value in _numeric(variation).items()
    }
    return replace(variation, **changes) if changes else variation  # type: ignore[type-var]


def _numeric(variation: FirstVariation) -> dict[str, float | Tensor]:
    """Fields of a first variation that are numbers, by name."""
    return {name: value for name, value in vars(variation).items() if isinstance(value, float | Tensor)}


def plane_at(utility: Functional, distribution: FiniteDistribution) -> Plane:
    """The linear part of a utility at a distribution on points."""
    variation = utility.variation_at(distribution) if utility.by_values else None
    values = utility.finite_variation(distribution) if variation is None else variation.on(distribution)
    return Plane(values, utility.finite_value(distribution) - float(distribution.p @ values), variation)


def groups_of(distribution: FiniteDistribution) -> Groups:
    """The groups of a distribution on points: its modes, whose probabilities no step changes."""
    if distribution.modes is None:
        return Groups.single(len(distribution.log_p))
    return Groups(distribution.modes, np.bincount(distribution.modes, distribution.p))


def find_step(
    utility: Functional,
    alpha: float,
    distribution: FiniteDistribution,
    exponents: np.ndarray,
    share: float = 0.0,
    groups: Groups | None = None,
    trials: int = TRIALS,
    gaining: float = 0.0,
) -> MirrorStep:
    """The step from ``distribution`` that raises ``U - alpha KL`` most.

    Args:
        utility: U.
        alpha: weight of the divergence from the base, not negative.
        distribution: the current distribution.
        exponents: ``h`` at its points, in nats, (n,); a constant of each group does not matter.
        share: effective share of the points that a step must keep, in [0, 1); 0 for any.
        groups: points with a normaliser in common; by default those of one mode.
        trials: most first variations of a direction; 1 for the current one's alone.
        gaining: effective share that what a step adds must rest on, see :class:`flowtilt.tilts.Tilted`.

    Raises:
        ValueError: without alpha and share, where nothing bounds a step.
    """
    check_value("the weight of the divergence", alpha, NOT_NEGATIVE)
    check_value("the effective share of a step", share, SHARE)
    if alpha == 0 and share == 0:
        raise ValueError(
            "without a divergence nothing bounds a step: give alpha, or the effective share that it keeps"
        )
    search = _Search(
        utility, alpha, distribution, exponents, share, groups or groups_of(distribution), gaining
    )
    planes, mix = [plane_at(utility, distribution)], np.ones(1)
    best, before = None, 0.0
    for trial in range(1, trials + 1):
        found, beyond, most = search.along(search.direction(planes, mix))
        if found is not None and (best is None or found.gain > best.gain):
            best = replace(found, planes=tuple(planes), mix=mix)
        gain = 0.0 if best is None else best.gain
        # The first trials of a kink may gain nothing, and lead to one that does.
        if trial == trials or (trial > 2 and gain - before <= ENOUGH * gain and gain > 0):
            break
        before = gain
        planes.append(plane_at(utility, beyond))
        mix = search.least_bound(planes, most)
    return best if best is not None else search.none(planes[0])


@dataclass(frozen=True)
class _Search:
    """What all trials of a step have in common; see :func:`find_step`."""

    utility: Functional
    alpha: float
    distribution: FiniteDistribution
    exponents: np.ndarray
    share: float
    groups: Groups
    gaining: float = 0.0

    def direction(self, planes: list[Plane], mix: np.ndarray) -> np.ndarray:
        """``f - alpha h``, of mean 0 in each group, (n,)."""
        f = sum(weight * plane.values for weight, plane in zip(mix, planes, strict=True))
        g, p = f - self.alpha * self.exponents, self.p
        return g - self.groups.each(self.groups.sums(p * g) / self.groups.sums(p))

    def candidate(self, direction: np.ndarray, strength: float) -> tuple[float, Tilted, FiniteDistribution]:
        """Gain of G, weights and distribution at ``strength = 1 / eta``."""
        under = tilted(strength * direction, self.groups, log_p=self.distribution.log_p)
        distribution = replace(self.distribution, log_p=self.distribution.log_p + under.log_weights)
        try:
            utility = self.utility.finite_value(distribution)
        except ValueError:  # outside of the functional's domain
            return -math.inf, under, distribution
        moved = float((under.probabilities - self.p) @ self.exponents)
        gain = utility - self.before - self.alpha * (under.kl + moved)
        return gain if abs(gain) > ROUNDING * self.scale else 0.0, under, distribution

    @cached_property
    def scale(self) -> float:
        """Size of what a gain is a difference of."""
        return abs(self.before) + self.alpha * float(self.p @ np.abs(self.exponents))

    @cached_property
    def before(self) -> float:
        """U at the current distribution."""
        return self.utility.finite_value(self.distribution)

    @cached_property
    def p(self) -> np.ndarray:
        """Its probabilities, (n,)."""
        return self.distribution.p

    def along(self, direction: np.ndarray) -> tuple[MirrorStep | None, FiniteDistribution, float]:
        """The best step along a direction, if one rises; what is just beyond it; the largest strength."""
        largest = self.largest(direction)
        evaluate = _Kept(lambda strength: self.candidate(direction, strength))
        tried, top = largest, largest
        while tried >= largest * FINEST:
            if evaluate.gain(tried) > evaluate.gain(top):
                top = tried
            if evaluate.gain(top) > 0 and tried < top / 2:
                break
            tried /= 2
        _, top, beyond = _golden(evaluate.gain, top / 2, top, min(2 * top, largest))
        gain, under, distribution = evaluate(top)
        step = (
            MirrorStep(distribution, 1 / top, gain, top * direction, (), np.ones(1), under)
            if gain > 0
            else None
        )
        return step, evaluate(beyond)[2], largest

    def largest(self, direction: np.ndarray) -> float:
        """The largest strength that is allowed."""
        span = float(np.ptp(direction))
        most = 1 / self.alpha if self.alpha > 0 else 1e6 / span if span > 0 else 1.0
        if self.share == 0:
            return most
        log_p = self.distribution.log_p
        return most * strongest(most * direction, self.groups, self.share, log_p=log_p, gaining=self.gaining)

    def least_bound(self, planes: list[Plane], strength: float) -> np.ndarray:
        """Weights of planes at which the largest bound of G near the current distribution is least.

        By duality that is the least, over means of the planes, of ``constant + log-normaliser / strength``,
        which is convex in the weights: a problem in as many numbers as there are planes.
        """
        from scipy.optimize import minimize  # a third of a second, and smooth functionals do without

        values, constants = np.stack([p.values for p in planes]), np.array([p.constant for p in planes])
        p_log, groups = self.distribution.log_p, self.groups
        log_share = np.log(groups.sums(self.p))

        def bound(mix: np.ndarray) -> tuple[float, np.ndarray]:
            e = strength * (mix @ values - self.alpha * self.exponents) + p_log
            top = groups.log_sums(e)
            q = np.exp(e - groups.each(top - log_share))
            log_normaliser = float(np.exp(log_share) @ (top - log_share))
            return strength * float(mix @ constants) + log_normaliser, strength * (constants + values @ q)

        count = len(planes)
        whole = {"type": "eq", "fun": lambda mix: mix.sum() - 1, "jac": lambda mix: np.ones(count)}
        start, bounds = np.full(count, 1 / count), [(0.0, 1.0)] * count
        found = minimize(bound, start, jac=True, method="SLSQP", bounds=bounds, constraints=whole).x
        mix = np.clip(np.nan_to_num(found, nan=1 / count), 0, 1)
        return mix / mix.sum()

    def none(self, plane: Plane) -> MirrorStep:
        """No step."""
        still = np.zeros_like(self.exponents)
        under = tilted(still, self.groups, log_p=self.distribution.log_p)
        return MirrorStep(self.distribution, math.inf, 0.0, still, (plane,), np.ones(1), under)


class _Kept:
    """Candidates by strength, each computed once."""

    def __init__(self, compute: Callable[[float], tuple[float, Tilted, FiniteDistribution]]) -> None:
        self._compute = compute
        self._gains: dict[float, float] = {}

    def __call__(self, strength: float) -> tuple[float, Tilted, FiniteDistribution]:
        return self._compute(strength)

    def gain(self, strength: float) -> float:
        if strength not in self._gains:
            self._gains[strength] = self._compute(strength)[0]
        return self._gains[strength]


def _golden(
    gain: Callable[[float], float], low: float, middle: float, high: float, sections: int = 12
) -> tuple[float, float, float]:
    """A narrower bracket of a largest gain, by golden section of the logarithm of the strength."""
    ratio = 0.5 * (3 - math.sqrt(5))
    for _ in range(sections):
        left = math.log(middle / low) >= math.log(high / middle)
        other = middle * ((low if left else high) / middle) ** ratio
        if gain(other) > gain(middle):
            low, middle, high = (low, other, middle) if left else (middle, other, high)
        else:
            low, high = (other, high) if left else (low, other)
    return low, middle, high


def bounded_step(
    utility: Functional,
    distribution: FiniteDistribution,
    exponents: np.ndarray,
    budget: tuple[float, float],
    share: float,
    groups: Groups,
    gaining: float = 0.0,
) -> MirrorStep:
    """The step along the first variation whose end has a given divergence from the base, if the points carry
    it and the utility rises so far; else the largest half of that, or of a half, that does. No step if none.

    Args:
        utility: U; there is no divergence in the objective.
        distribution: the current distribution.
        exponents: ``h`` at its points, in nats, (n,).
        budget: the divergence from the base after the step, and the logarithm of the normaliser of
            ``exp(h)``, mean over groups, in nats.
        share: effective share of the points that the step keeps.
        groups: points with a normaliser in common.
        gaining: effective share that what it adds must rest on.
    """
    search = _Search(utility, 0.0, distribution, exponents, share, groups, gaining)
    plane = plane_at(utility, distribution)
    direction = search.direction([plane], np.ones(1))
    goal, log_z = budget

    def paid(strength: float) -> float:
        added = strength * direction
        under = tilted(added, groups, log_p=distribution.log_p)
        normaliser = float(distribution.p @ (added - under.log_weights))
        return under.mean(exponents + added) - log_z - normaliser

    most = search.largest(direction)
    if paid(most) > goal:
        low, high = 0.0, most
        while high - low > 1e-9 * high:
            middle = 0.5 * (low + high)
            low, high = (middle, high) if paid(middle) <= goal else (low, middle)
        most = low
    strength = most
    while strength >= most * FINEST and most > 0:
        gain, under, after = search.candidate(direction, strength)
        if gain > 0:
            added = strength * direction
            return MirrorStep(after, 1 / strength, gain, added, (plane,), np.ones(1), under)
        strength /= 2
    return search.none(plane)


def ascend_exactly(
    utility: Functional,
    alpha: float,
    distribution: FiniteDistribution,
    steps: int,
    eta: float | None = None,
    share: float = 0.0,
) -> list[MirrorStep]:
    """Steps of Flow Density Control from the base ``distribution``, each exact; fewer where one gains
    nothing.

    Args:
        utility: U.
        alpha: weight of the divergence from ``distribution``.
        distribution: the base, and the start.
        steps: most steps.
        eta: fixed weight of all steps, at least alpha; by default it is searched for.
        share: effective share that a searched step keeps.
    """
    h, taken = np.zeros(len(distribution.log_p)), []
    for _ in range(steps):
        if eta is None:
            step = find_step(utility, alpha, distribution, h, share)
            if not step.gain > 0:
                break
        else:
            step = fixed_step(utility, alpha, distribution, h, eta)
        taken.append(step)
        distribution, h = step.distribution, h + step.added
    return taken


def fixed_step(
    utility: Functional,
    alpha: float,
    distribution: FiniteDistribution,
    exponents: np.ndarray,
    eta: float,
    groups: Groups | None = None,
) -> MirrorStep:
    """The step of weight ``eta``, whatever it gains: the gain says whether it is an ascent."""
    check_value("the KL weight of a step", eta, POSITIVE)
    search = _Search(utility, alpha, distribution, exponents, 0.0, groups or groups_of(distribution))
    plane = plane_at(utility, distribution)
    direction = search.direction([plane], np.ones(1))
    gain, under, after = search.candidate(direction, 1 / eta)
    return MirrorStep(after, eta, gain, direction / eta, (plane,), np.ones(1), under)
