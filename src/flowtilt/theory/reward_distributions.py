"""Known distributions of rewards, with the dual of a KL-regularised tail mean in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from flowtilt.words import Tail, read_tail

REACH = 12.0  # standard deviations beyond which a Gaussian has no mass in float64
GAUSS = np.polynomial.legendre.leggauss(160)  # nodes and weights for each smooth piece
SCAN = 4001  # points of the search for stationary thresholds


@dataclass(frozen=True)
class RewardDistribution:
    """A mixture of Gaussians, clipped to ``[low, high]``: what is cut off becomes an atom at the end.

    Attributes:
        weights: positive, (k,); normalised when used.
        means, deviations: (k,); a deviation of 0 is an atom.
        low, high: infinite if nothing is clipped.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    low: float = -np.inf
    high: float = np.inf

    @cached_property
    def _components(self) -> list[tuple[float, float, float]]:
        total = sum(self.weights)
        return [(w / total, m, d) for w, m, d in zip(self.weights, self.means, self.deviations, strict=True)]

    @property
    def support(self) -> tuple[float, float]:
        """An interval that holds all of the mass that float64 can see."""
        left = min(m - REACH * d for _, m, d in self._components)
        right = max(m + REACH * d for _, m, d in self._components)
        return max(left, self.low), min(right, self.high)

    @property
    def mean(self) -> float:
        """Mean before clipping."""
        return sum(w * m for w, m, _ in self._components)

    def moved(self, delta: float) -> RewardDistribution:
        """The same distribution, moved by ``delta`` before it is clipped."""
        means = tuple(m + delta for m in self.means)
        return RewardDistribution(self.weights, means, self.deviations, self.low, self.high)

    def density(self, t: np.ndarray) -> np.ndarray:
        """Density at ``t``, of its shape, atoms left out."""
        found = np.zeros_like(t, dtype=np.float64)
        for w, m, d in self._components:
            if d > 0:
                found += w * np.exp(-0.5 * ((t - m) / d) ** 2) / (d * np.sqrt(2 * np.pi))
        return np.where((t > self.low) & (t < self.high), found, 0.0)

    def largest_density(self) -> float:
        """A bound of the density, atoms left out."""
        return sum(w / (d * np.sqrt(2 * np.pi)) for w, _, d in self._components if d > 0)

    def below(self, t: float) -> float:
        """``P(r <= t)``."""
        if t < self.low:
            return 0.0
        if t >= self.high:
            return 1.0
        return float(sum(w * (ndtr((t - m) / d) if d > 0 else m <= t) for w, m, d in self._components))

    def above(self, t: float) -> float:
        """``P(r >= t)``."""
        if t > self.high:
            return 0.0
        if t <= self.low:
            return 1.0
        return float(sum(w * (ndtr((m - t) / d) if d > 0 else m >= t) for w, m, d in self._components))

    def active(self, t: float, scale: float, tail: Tail) -> float:
        """``E[exp((r - t) / scale); r beyond t]``: r > t on the upper tail, r < t on the lower."""
        if read_tail(tail) == "upper":
            inner, outer = max(t, self.low), self.high
            end = self.above(self.high) * np.exp((self.high - t) / scale) if t < self.high < np.inf else 0.0
            end += self.below(self.low) * np.exp((self.low - t) / scale) if t < self.low else 0.0
        else:
            inner, outer = self.low, min(t, self.high)
            end = self.below(self.low) * np.exp((self.low - t) / scale) if -np.inf < self.low < t else 0.0
            end += self.above(self.high) * np.exp((self.high - t) / scale) if self.high < t else 0.0
        if inner >= outer:
            return float(end)
        return float(end + sum(w * _tilted(m, d, inner, outer, t, scale) for w, m, d in self._components))

    def idle(self, t: float, tail: Tail) -> float:
        """Mass on which the hinge at ``t`` is flat."""
        return self.below(t) if read_tail(tail) == "upper" else self.above(t)

    def quadrature(self, *splits: float) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights for functions that are smooth between the given points.

        Gauss and Legendre's rule on each piece, and the atoms. Exact to about 1e-12 where the
        deviations are not much smaller than the pieces.
        """
        low, high = self.support
        ends = [low, *sorted(s for s in splits if low < s < high), high]
        x, w = GAUSS
        nodes, weights = [], []
        for a, b in pairwise(ends):
            points = 0.5 * (a + b) + 0.5 * (b - a) * x
            nodes.append(points)
            weights.append(0.5 * (b - a) * w * self.density(points))
        atoms = [(m, w) for w, m, d in self._components if d == 0]
        atoms += [(self.low, self.below(self.low))] if np.isfinite(self.low) else []
        atoms += [(self.high, self.above(self.high))] if np.isfinite(self.high) else []
        for at, mass in atoms:
            nodes.append(np.array([at]))
            weights.append(np.array([mass]))
        return np.concatenate(nodes), np.concatenate(weights)

    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A batch of ``count`` rewards before clipping, as distinct values with their counts.

        Returns:
            Values and counts, each (n,); n is ``count`` but for a distribution of atoms.
        """
        shares = rng.multinomial(count, [w for w, _, _ in self._components])
        drawn = [
            (np.array([m]), np.array([float(n)])) if d == 0 else (rng.normal(m, d, n), np.ones(n))
            for n, (_, m, d) in zip(shares, self._components, strict=True)
        ]
        values = np.concatenate([v for v, _ in drawn])
        counts = np.concatenate([c for _, c in drawn])
        return values[counts > 0], counts[counts > 0]


def _tilted(mean: float, sd: float, inner: float, outer: float, t: float, scale: float) -> float:
    """``E[exp((x - t) / scale); inner < x < outer]`` for one component, by completing the square."""
    if sd == 0:
        return float(np.exp((mean - t) / scale)) if inner < mean < outer else 0.0
    centre = mean + sd * sd / scale
    a, b = (inner - centre) / sd, (outer - centre) / sd
    # The difference is taken in the tail where both are small.
    mass = ndtr(-a) - ndtr(-b) if a > 0 else ndtr(b) - ndtr(a)
    with np.errstate(divide="ignore"):
        return float(np.exp((mean - t) / scale + 0.5 * (sd / scale) ** 2 + np.log(mass)))


@dataclass(frozen=True)
class TailDual:
    """The dual of one KL-regularised tail mean for a known distribution of rewards (Wang et al. 2026).

    ``t + alpha log Z(t)`` with ``Z = A + B``, A the distribution's tilted mass beyond t and B its mass on the
    flat side, minimised on the upper tail and maximised on the lower.

    Attributes:
        alpha: KL weight, positive, in units of the reward a nat.
        mass: of the tail, in (0, 1).
    """

    distribution: RewardDistribution
    alpha: float
    mass: float
    tail: Tail

    def __post_init__(self) -> None:
        object.__setattr__(self, "tail", read_tail(self.tail))

    @property
    def scale(self) -> float:
        """Scale of the exponents, ``alpha mass``."""
        return self.alpha * self.mass

    def parts(self, t: float) -> tuple[float, float]:
        """A and B."""
        return self.distribution.active(t, self.scale, self.tail), self.distribution.idle(t, self.tail)

    def value(self, t: float) -> float:
        """The dual objective, in units of the reward."""
        return t + self.alpha * float(np.log(sum(self.parts(t))))

    def slope(self, t: float) -> float:
        """``1 - A / (mass Z)``; it vanishes where the tilted distribution has ``mass`` beyond t."""
        active, idle = self.parts(t)
        return 1 - active / (active + idle) / self.mass

    def curvature(self, t: float) -> float:
        """Second derivative, away from atoms.

        ``(f Z + A B / scale) / (mass Z^2)`` on the upper tail, never negative; on the lower tail
        ``(A B / scale - f Z) / (mass Z^2)``, which is positive wherever the density f vanishes.
        """
        active, idle = self.parts(t)
        total = active + idle
        sign = 1 if self.tail == "upper" else -1
        density = float(self.distribution.density(np.array(t)))
        return (active * idle / self.scale + sign * density * total) / (self.mass * total**2)

    def largest_curvature(self) -> float:
        """A bound of the upper dual's curvature: ``(f_max + 1 / (4 scale)) / mass``, since Z >= 1."""
        return (self.distribution.largest_density() + 1 / (4 * self.scale)) / self.mass

    @cached_property
    def optimum(self) -> float:
        """The exact threshold: the best stationary point, each found by root finding."""
        low, high = self.distribution.support
        scan = np.linspace(low, high, SCAN)
        slopes = np.array([self.slope(float(t)) for t in scan])
        uphill = 1.0 if self.tail == "lower" else -1.0
        # Maxima of the lower dual, the minimum of the upper one: where the slope changes its sign so.
        at = np.flatnonzero((uphill * slopes[:-1] > 0) & (uphill * slopes[1:] <= 0))
        found = [brentq(self.slope, scan[i], scan[i + 1], xtol=1e-14, rtol=1e-15) for i in at]
        best = max([low, high, *found], key=lambda t: uphill * self.value(t))
        return float(best)

    @property
    def regular(self) -> bool:
        """Whether the slope vanishes at the threshold, instead of jumping over zero at a kink."""
        return abs(self.slope(self.optimum)) < 1e-6

    def influence(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Nodes' hinge function ``(1 - mass) a - mass b`` and weights; its mean is zero at a threshold."""
        nodes, weights = self.distribution.quadrature(t)
        return self.moment_function(nodes, t), weights

    def moment_function(self, rewards: np.ndarray, t: float) -> np.ndarray:
        """``(1 - mass) exp((r - t) / scale)`` beyond t, and ``-mass`` on the flat side."""
        beyond = rewards > t if self.tail == "upper" else rewards < t
        inside = np.where(beyond, rewards - t, 0.0)
        return np.where(beyond, (1 - self.mass) * np.exp(inside / self.scale), -self.mass)

    def deviation(self) -> float:
        """Standard deviation of ``sqrt(N) (estimate - threshold)`` in the limit of large batches.

        The delta method: the deviation of :meth:`moment_function` over ``mass Z |curvature|``. Zero at
        a kink, which the estimates hit with a probability that tends to one.
        """
        if not self.regular:
            return 0.0
        t = self.optimum
        doubled = self.distribution.active(t, self.scale / 2, self.tail)
        active, idle = self.parts(t)
        second = (1 - self.mass) ** 2 * doubled + self.mass**2 * idle
        return float(np.sqrt(second) / (self.mass * (active + idle) * abs(self.curvature(t))))

    def effective_share(self) -> float:
        """``(E w)^2 / E w^2`` of the tilt's weights: the effective sample size over the batch size."""
        t = self.optimum
        active, idle = self.parts(t)
        doubled = self.distribution.active(t, self.scale / 2, self.tail)
        return float((active + idle) ** 2 / (doubled + idle))
