"""Metrics of a distribution in the plane, by one estimator for network, exact and resolved rows.

This module and what it imports stay clear of torch: evaluating a run takes less time than
importing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flowtilt.domains.planar.experiment import TailExperiment
from flowtilt.metrics.tails import tail_mean

if TYPE_CHECKING:
    from scipy.interpolate import RectBivariateSpline

Metrics = dict[str, float | None]

FLOOR = 2.0
"""Nats that the pretrained log-density may be below that of the data's distribution before the latter takes
its place.

See :func:`flowtilt.domains.planar.truth.floored`.
"""


@dataclass(frozen=True)
class GriddedDensity:
    """A log-density on a coarse square grid of points, interpolated by a cubic spline.

    A pretrained density is smooth: a coarse grid and a spline give it anywhere to a few 1e-3 nats.

    Attributes:
        axis: coordinates along either side, rising, (n,).
        log_density: in nats at the points, first axis x, (n, n); or given each mode, (modes, n, n).
        floored: where it is a floor and not the model's own, booleans of the same shape; None for nowhere.
    """

    axis: np.ndarray
    log_density: np.ndarray
    floored: np.ndarray | None = None

    def at(self, points: np.ndarray, modes: np.ndarray | None = None) -> np.ndarray:
        """Log-density at points (n, 2), (n,); points off the grid take the value at its border.

        Args:
            points: where.
            modes: of the points, integers (n,), if the density is one given the mode.
        """
        if self.log_density.ndim == 3:
            each = np.stack([own.at(points) for own in self._by_mode])
            return each[modes, np.arange(len(points))]
        clipped = np.clip(points, self.axis[0], self.axis[-1])
        return self._spline.ev(clipped[:, 0], clipped[:, 1])

    def floored_at(self, points: np.ndarray, modes: np.ndarray | None = None) -> np.ndarray:
        """Whether the value at points (n, 2) is not the model's own: a floor, or the border's, (n,).

        By the nearest point of the grid; the arguments are those of :meth:`at`.
        """
        off = np.abs(points).max(axis=1) > self.axis[-1]
        if self.floored is None:
            return off
        nearest = np.rint((points - self.axis[0]) / (self.axis[1] - self.axis[0])).astype(int)
        x, y = np.clip(nearest, 0, len(self.axis) - 1).T
        return off | (self.floored[x, y] if modes is None else self.floored[modes, x, y])

    def on(self, axis: np.ndarray) -> np.ndarray:
        """Log-density at all points of a square grid with this axis inside the own one.

        (m, m), or (modes, m, m) if the density is one given the mode.
        """
        if self.log_density.ndim == 3:
            return np.stack([own.on(axis) for own in self._by_mode])
        return self._spline(axis, axis)

    @property
    def _by_mode(self) -> list[GriddedDensity]:
        return [GriddedDensity(self.axis, own) for own in self.log_density]

    @property
    def _spline(self) -> RectBivariateSpline:
        from scipy.interpolate import (
            RectBivariateSpline,  # a fifth of a second, which most jobs can do without
        )

        return RectBivariateSpline(self.axis, self.axis, self.log_density)


def falls(values: Sequence[float | None]) -> int:
    """How many of a method's steps lower its objective, by more than rounding.

    Args:
        values: of the objective before the first step and after each.
    """
    found = np.array(values, dtype=np.float64)
    return int((np.diff(found) < -1e-10 * np.abs(found[:-1])).sum())


def sample_divergence(
    log_density: np.ndarray, reference: GriddedDensity, points: np.ndarray, modes: np.ndarray | None = None
) -> Metrics:
    """KL divergence of a distribution from a reference by the distribution's samples, and how much of it
    rests on a floor.

    ``floored_mass`` is the share of samples at which the reference is not the pretrained network's own
    density: there the divergence is known from below alone.

    Args:
        log_density: of the distribution at its samples, in nats, (n,).
        reference: see :func:`flowtilt.domains.planar.truth.reference_density`.
        points: the samples, (n, 2).
        modes: of the samples, integers (n,), if densities are given the mode.
    """
    ratio = log_density.astype(np.float64) - reference.at(points, modes)
    return {"kl": float(ratio.mean()), "floored_mass": float(reference.floored_at(points, modes).mean())}


def zone_masses(experiment: TailExperiment, x: np.ndarray, bumps: np.ndarray, weights: np.ndarray) -> Metrics:
    """Where a distribution puts its mass: left of the plateau, right of it, and on the bumps.

    Args:
        experiment: with the landscape's edges.
        x: first coordinates, (n,).
        bumps: the bumps' profile in [0, 1] there, (n,).
        weights: probabilities, (n,).
    """
    reward = experiment.reward
    return {
        "mass_left": float(weights[x < reward.left_edge].sum()),
        "mass_right": float(weights[x > reward.right_edge].sum()),
        "mass_bumps": float(weights[bumps > 0.5].sum()),
    }


def reward_metrics(
    experiment: TailExperiment, kind: str, rewards: np.ndarray, weights: np.ndarray | None, kl: float | None
) -> Metrics:
    """Metrics of a distribution from rewards, weights and its KL divergence; one estimator for all rows.

    ``objective`` is what a method of this kind maximises (the regularised mean reward for ``am``,
    the regularised tail mean for all others), ``tail_objective`` is the latter for every row.

    Args:
        experiment: whose objective it is.
        kind: of the method.
        rewards: (n,).
        weights: probabilities, (n,), or None for samples.
        kl: from the pretrained distribution, in nats.
    """
    problem, sign = experiment.objective, experiment.reward.sign
    tail = tail_mean(rewards, problem.mass, problem.tail, weights)
    mean = float(np.average(rewards, weights=weights))
    divergence = 0.0 if kl is None else kl
    mean_objective, tail_objective = mean - problem.alpha * divergence, tail - problem.tail_alpha * divergence
    return {
        experiment.mean_metric: sign * mean,
        experiment.tail_metric: sign * tail,
        "kl": divergence,
        "objective": mean_objective if kind == "am" else tail_objective,
        "tail_objective": tail_objective,
    }
