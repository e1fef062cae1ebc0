"""How a functional curves in the distribution, measured along random chords between finite distributions.

For distributions p and q and a share s, ``F((1 - s) p + s q) - (1 - s) F(p) - s F(q)`` is never negative for
a concave functional, never positive for a convex one, and 0 for a linear one. The paper's tiers say
which *problems* are convex: to raise a concave utility, or to lower a convex divergence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowtilt.functionals.base import Distribution, FiniteDistribution, Functional, Need, Tier
from flowtilt.functionals.registry import DIVERGENCES, UTILITIES, Ingredients, Registry
from flowtilt.interpolants import Linear, broadcast_time
from flowtilt.model import Context, FlowModel
from flowtilt.rewards import Reward
from flowtilt.words import check_word

Curvature = Literal["linear", "concave", "convex", "neither"]


@dataclass(frozen=True)
class Chords:
    """Gaps of a functional above its chords.

    Attributes:
        lowest: the smallest gap, in units of the functional.
        highest: the largest.
        rounding: size below which a gap is rounding.
    """

    lowest: float
    highest: float
    rounding: float

    @property
    def is_concave(self) -> bool:
        """No gap is negative."""
        return self.lowest >= -self.rounding

    @property
    def is_convex(self) -> bool:
        """No gap is positive."""
        return self.highest <= self.rounding

    @property
    def curvature(self) -> Curvature:
        if self.is_concave and self.is_convex:
            return "linear"
        if self.is_concave or self.is_convex:
            return "concave" if self.is_concave else "convex"
        return "neither"


def random_distributions(
    distribution: FiniteDistribution, count: int, seed: int
) -> Iterator[FiniteDistribution]:
    """Distributions on the points of ``distribution``, from nearly uniform to nearly on a single point.

    Where points have modes, each mode keeps its probability: fine-tuning does not change it.
    """
    random = np.random.default_rng(seed)
    modes = (
        np.zeros(len(distribution.log_p), dtype=np.int64)
        if distribution.modes is None
        else distribution.modes
    )
    kept = np.bincount(modes, distribution.p)
    for _ in range(count):
        weights = np.exp(random.choice([0.3, 1.0, 3.0]) * random.normal(size=len(modes)))
        yield distribution.with_p(weights * (kept / np.bincount(modes, weights))[modes])


def chords(
    functional: Functional, distribution: FiniteDistribution, count: int = 200, seed: int = 0
) -> Chords:
    """Gaps of a functional above random chords between distributions on the points of ``distribution``."""
    random = np.random.default_rng(seed + 1)
    distributions = list(random_distributions(distribution, 2 * count, seed))
    gaps, sizes = [], []
    for a, b in zip(distributions[:count], distributions[count:], strict=True):
        share = random.uniform(0.1, 0.9)
        between = functional.finite_value(distribution.with_p((1 - share) * a.p + share * b.p))
        ends = functional.finite_value(a), functional.finite_value(b)
        gaps.append(between - (1 - share) * ends[0] - share * ends[1])
        sizes.append(max(map(abs, (between, *ends))))
    return Chords(min(gaps), max(gaps), 1e-10 * max(sizes))


def curvature(
    functional: Functional, distribution: FiniteDistribution, count: int = 200, seed: int = 0
) -> Curvature:
    """Whether a functional is linear, concave, convex or neither, as far as random chords show."""
    return chords(functional, distribution, count, seed).curvature


def measured_tier(found: Curvature, kind: str) -> Tier:
    """The tier that a measured curvature puts a functional in.

    Args:
        kind: ``utility``, to be raised, or ``divergence``, to be lowered.
    """
    check_word(kind, ("utility", "divergence"), "the kind of a functional")
    if found == "linear":
        return "linear"
    return "convex" if found == ("concave" if kind == "utility" else "convex") else "general"


class _Gaussians(FlowModel):
    """Given a mode z, an integer for each sample, the flow of N(means[z], variance I) in the plane.

    Samples without a mode have the first; with a single mean, modes do not matter.
    """

    path = Linear()
    data_variance = 1.0

    def __init__(self, means: list[list[float]], variance: float = 1.0) -> None:
        super().__init__()
        self.means, self.variance = torch.tensor(means, dtype=torch.float64), variance

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        at = broadcast_time(t, x)
        alpha, beta = self.path.alpha(at), self.path.beta(at)
        alpha_rate, beta_rate = self.path.alpha_rate(at), self.path.beta_rate(at)
        mean = self.means.to(x)[0 if context is None or len(self.means) == 1 else context]
        slope = (self.variance * alpha * alpha_rate + beta * beta_rate) / (self.variance * alpha**2 + beta**2)
        return alpha_rate * mean + slope * (x - alpha * mean)

    def draw_context(self, count: int, generator: torch.Generator) -> Context:
        if len(self.means) == 1:
            return None
        return torch.randint(len(self.means), (count,), generator=generator)

    def select_context(self, context: Context, index: Tensor) -> Context:
        return None if context is None else context[index]


class _Slope(Reward):
    """``x + y / 2``."""

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return x[:, 0] + 0.5 * x[:, 1]


class _Distance(Reward):
    """``y^2 / (1 + y^2)``, below 1."""

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return 1 - 1 / (1 + x[:, 1] ** 2)


def example_problem(points: int = 15, seed: int = 0) -> tuple[FiniteDistribution, Ingredients]:
    """A small finite distribution in the plane on which every registered functional is defined.

    Args:
        points: number of them; each occurs once in either of two modes.
    """
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(size=(points, 2))).repeat(2, 1)
    p, q = (np.exp(0.7 * random.normal(size=2 * points)) for _ in range(2))
    modes = np.repeat([0, 1], points)
    distribution = FiniteDistribution(x, np.log(p / p.sum()), np.log(q / q.sum()), modes)
    return distribution, Ingredients(reward=_Slope(), reference=_Gaussians([[0.0, 0.0]]), cost=_Distance())


def example_distribution(count: int = 40, seed: int = 0) -> Distribution:
    """Samples of a model in the plane that has two modes, half of them of either, in double precision."""
    model = _Gaussians([[0.5, -0.3], [-0.8, 0.4]], variance=0.7)
    context = torch.arange(count) % 2
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Distribution(model, model.means[context] + math.sqrt(model.variance) * noise, context)


@dataclass(frozen=True)
class TierRow:
    """One functional in the table of tiers.

    Attributes:
        kind: ``utility`` or ``divergence``.
    """

    kind: str
    name: str
    parameters: dict[str, Any]
    needs: Need
    paper: Tier
    curvature: Curvature
    measured: Tier


def tier_table(registries: tuple[Registry, ...] = (UTILITIES, DIVERGENCES)) -> list[TierRow]:
    """The paper's tier beside the measured one, for every example of every registered functional."""
    distribution, ingredients = example_problem()
    rows = []
    for registry in registries:
        for name, entry in registry.items():
            for example in entry.examples:
                found = curvature(registry.build(name, example, ingredients), distribution)
                measured = measured_tier(found, registry.kind)
                row = (registry.kind, name, dict(example), entry.needs, entry.tier, found, measured)
                rows.append(TierRow(*row))
    return rows
