"""Rows of the experiments on functionals: distributions on the grid, samples, what is measured of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from flowtilt.domains.planar.build import build_data, build_model, build_slope
from flowtilt.domains.planar.data import GaussianMixture
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.grid import Grid, finite_distribution, kl_divergence
from flowtilt.domains.planar.optimum import Optimum, mirror_iterates, optimum_of, tail_optimum, tilt
from flowtilt.domains.planar.problems import build_objective
from flowtilt.domains.planar.rows import GriddedDensity, Metrics, falls
from flowtilt.functionals.base import FiniteDistribution, Objective
from flowtilt.functionals.critic import CriticSettings, train_critic
from flowtilt.metrics.entropy import histogram_entropy, likelihood_entropy
from flowtilt.metrics.transport import ground_distances, kantorovich
from flowtilt.mirror import ascend_exactly


@dataclass(frozen=True)
class Cloud:
    """Points in the plane with probabilities: samples, or the cells of a grid.

    Attributes:
        points: (n, 2).
        weights: (n,), of sum 1.
        log_density: in nats, at the first points or at all, (m,); given the mode if there are modes.
        modes: of the points, integers (n,), if the model has modes.
    """

    points: np.ndarray
    weights: np.ndarray
    log_density: np.ndarray
    modes: np.ndarray | None = None

    @classmethod
    def of_samples(
        cls, points: np.ndarray, log_density: np.ndarray, modes: np.ndarray | None = None
    ) -> Cloud:
        weights = np.full(len(points), 1 / len(points))
        return cls(points.astype(np.float64), weights, log_density, modes)

    @property
    def mean(self) -> np.ndarray:
        return self.weights @ self.points

    def first(self, count: int) -> Cloud:
        """The first points alone, reweighted."""
        weights = self.weights[:count]
        modes = None if self.modes is None else self.modes[:count]
        return Cloud(self.points[:count], weights / weights.sum(), self.log_density[:count], modes)


def shift_metrics(cloud: Cloud, reference: Cloud) -> Metrics:
    """How far the mean moved along each axis, and the ratio of the two distances."""
    horizontal, vertical = np.abs(cloud.mean - reference.mean)
    return {
        "horizontal_shift": float(horizontal),
        "vertical_shift": float(vertical),
        "horizontal_over_vertical_shift": float(horizontal / vertical) if vertical > 0 else None,
    }


def transport_metrics(experiment: FunctionalExperiment, cloud: Cloud, reference: Cloud) -> Metrics:
    """Exact W1 from the reference in each ground metric of the configuration."""
    config = experiment.evaluation.transport
    if config is None:
        return {}
    metrics = shift_metrics(cloud, reference)
    for name, weights in config.metrics.items():
        cost = ground_distances(cloud.points, reference.points, weights)
        metrics[f"w1_{name}"] = kantorovich(cost, cloud.weights, reference.weights).value
    return metrics


def coverage(experiment: FunctionalExperiment, cloud: Cloud) -> float | None:
    """Probability of the region around the data's lightest component: nearer to its mean than to any other.
    Undefined for data of a single component, and for those of several modes."""
    data = build_data(experiment)
    if not isinstance(data, GaussianMixture) or len(data.weights) == 1:
        return None
    distances = np.linalg.norm(cloud.points[:, None] - data.means, axis=-1)
    return float(cloud.weights[distances.argmin(axis=1) == data.weights.argmin()].sum())


@dataclass(frozen=True)
class GridProblem:
    """One method's problem on the grid.

    Attributes:
        objective: what it maximises.
        grid: of the distributions.
        start: the pretrained distribution, whose density has a floor.
        floored: where that is active, booleans at the points of the distribution, (n,).
    """

    objective: Objective
    grid: Grid
    start: FiniteDistribution
    floored: np.ndarray

    def distribution(self, log_p: np.ndarray) -> FiniteDistribution:
        """A distribution from log probabilities of the cells, (cells^2,), or of the cells in every mode."""
        return replace(self.start, log_p=log_p)

    def cloud(self, log_p: np.ndarray) -> Cloud:
        points, modes = self.start.points.numpy(force=True), self.start.modes
        log_density = log_p - 2 * np.log(self.grid.spacing)
        if modes is not None:
            log_density = log_density - np.log(np.bincount(modes, np.exp(log_p)))[modes]
        return Cloud(points, np.exp(log_p), log_density, modes)

    def cells(self, log_p: np.ndarray) -> np.ndarray:
        """Cell probabilities of a sample, over all modes, (cells, cells)."""
        return np.exp(log_p).reshape(-1, self.grid.cells, self.grid.cells).sum(axis=0)


def grid_problem(experiment: FunctionalExperiment, method: str, density: GriddedDensity) -> GridProblem:
    """A method's problem for a gridded pretrained density."""
    grid = Grid(experiment.grid.extent, experiment.grid.cells)
    objective = build_objective(experiment, method, build_model(experiment))
    start = finite_distribution(grid, density.on(grid.axis))
    floored = density.floored_at(start.points.numpy(force=True), start.modes)
    return GridProblem(objective, grid, start, floored)


def distribution_metrics(problem: GridProblem, log_p: np.ndarray) -> Metrics:
    """The objective at a distribution on the grid, its KL divergence from the pretrained distribution, and
    the mass on a floor.

    ``floored_mass`` is the distribution's own mass where the pretrained density is a floor (see
    :func:`flowtilt.domains.planar.truth.floored`): there divergences are known from below alone.
    """
    held = np.exp(log_p) > 0
    return {
        "functional": problem.objective.finite_value(problem.distribution(log_p)),
        "kl": kl_divergence(log_p[held], problem.start.log_p[held]),
        "floored_mass": float(np.exp(log_p)[problem.floored].sum()),
    }


def grid_metrics(experiment: FunctionalExperiment, problem: GridProblem, log_p: np.ndarray) -> Metrics:
    """Metrics of a distribution on the grid."""
    cloud, reference = problem.cloud(log_p), problem.cloud(problem.start.log_p)
    metrics = distribution_metrics(problem, log_p)
    reward = build_slope(experiment)
    if reward is not None:
        metrics["mean_reward"] = float(cloud.weights @ reward(problem.start.points).numpy())
    metrics |= transport_metrics(experiment, cloud, reference)
    if experiment.evaluation.entropy is not None:
        held = cloud.weights > 0
        metrics["entropy_likelihood"] = -float(cloud.weights[held] @ cloud.log_density[held])
        metrics["coverage"] = coverage(experiment, cloud)
    return metrics


def sample_metrics(
    experiment: FunctionalExperiment, cloud: Cloud, rewards: np.ndarray | None, reference: Cloud | None
) -> Metrics:
    """Metrics of a run's samples, by the same names as those of the grid."""
    metrics: Metrics = {}
    if rewards is not None:
        metrics["mean_reward"] = float(rewards.mean(dtype=np.float64))
    transport, entropy = experiment.evaluation.transport, experiment.evaluation.entropy
    if transport is not None and reference is not None:
        count = transport.samples
        metrics |= transport_metrics(experiment, cloud.first(count), reference.first(count))
        metrics |= shift_metrics(cloud, reference)
    if entropy is not None:
        metrics["entropy"] = histogram_entropy(cloud.points[: entropy.samples], entropy.extent, entropy.bins)
        metrics["entropy_likelihood"] = likelihood_entropy(cloud.log_density)
        metrics["coverage"] = coverage(experiment, cloud)
        metrics["outside"] = float((np.abs(cloud.points).max(axis=1) > entropy.extent).mean())
    return metrics


class SolvedRow(NamedTuple):
    """One method solved on the grid: its metrics, and log cell probabilities, (cells^2,) for each mode."""

    metrics: Metrics
    log_p: np.ndarray


def grid_optimum(experiment: FunctionalExperiment, problem: GridProblem) -> Optimum:
    """The best distribution on the grid for a problem."""
    return optimum_of(problem.objective, _starts(experiment, problem))


def solved_rows(experiment: FunctionalExperiment, method: str, problem: GridProblem) -> dict[str, SolvedRow]:
    """A method's own steps solved exactly (``exact``), and the optimum of its problem (``optimum``).

    Each row has the objective at the pretrained distribution as ``functional_before``; ``slack`` bounds what
    the optimum of a concave objective may still lack. The pretrained model has no optimum.
    """
    before = problem.objective.finite_value(problem.start)
    iterates = exact_iterates(experiment, method, problem)
    of_steps: Metrics = {}
    if experiment.methods[method].kind == "fdc":
        of_steps["falls"] = falls([before, *map(problem.objective.finite_value, iterates)])
    solved: dict[str, tuple[np.ndarray, Metrics]] = {"exact": (iterates[-1].log_p, of_steps)}
    if experiment.methods[method].kind != "pretrained":
        best = grid_optimum(experiment, problem)
        solved["optimum"] = best.log_p, {"slack": best.slack}
    return {
        solution: SolvedRow(
            grid_metrics(experiment, problem, log_p) | {"functional_before": before} | more, log_p
        )
        for solution, (log_p, more) in solved.items()
    }


def exact_iterates(
    experiment: FunctionalExperiment, method: str, problem: GridProblem
) -> list[FiniteDistribution]:
    """The distributions after each exact step of a method; the pretrained one for a method without any."""
    config, objective, start = experiment.methods[method], problem.objective, problem.start
    if config.kind == "pretrained":
        return [start]
    if config.kind == "tfft":
        return [problem.distribution(tail_optimum(objective, start).log_p)]
    if config.kind == "am":  # the configuration admits an expected reward under KL alone
        return mirror_iterates(objective, start, objective.alpha, 1)
    steps = config.iterations or 1
    if config.step_weight is not None:
        return mirror_iterates(objective, start, config.step_weight, steps)
    share = experiment.solver_of(method).share
    taken = ascend_exactly(objective.utility, objective.alpha, start, steps, share=share)
    return [step.distribution for step in taken] or [start]


TILTS = (0.25, 1.0, 4.0)
"""Nats by which other starts of the search for an optimum tilt one spread of the reward over the grid."""


def _starts(experiment: FunctionalExperiment, problem: GridProblem) -> list[FiniteDistribution]:
    """The pretrained distribution and its tilts by the reward: past kinks, and to other stationary points."""
    reward = build_slope(experiment)
    starts = [problem.start]
    if reward is not None:
        rewards = reward(problem.start.points).numpy()
        scaled = (rewards - rewards.mean()) / rewards.std()
        starts += [tilt(problem.start, nats * scaled)[0] for nats in TILTS]
    return starts


def network_grid_metrics(problem: GridProblem, density: GriddedDensity) -> Metrics:
    """A network's objective and divergence on the grid of the optimum, by its own log-density there.

    ``grid_mass`` is how much of its probability lies on the grid: 1 less what is off it, and less or
    more what the coarse log-density misses.
    """
    log_density = density.on(problem.grid.axis)
    metrics = distribution_metrics(problem, finite_distribution(problem.grid, log_density).log_p)
    cells = problem.grid.cells**2
    mass = float(np.exp(log_density).reshape(-1, cells).sum(axis=1).mean() * problem.grid.spacing**2)
    return metrics | {"grid_mass": mass}


def critic_metrics(experiment: FunctionalExperiment, cloud: Cloud, reference: Cloud, seed: int) -> Metrics:
    """W1 from the reference in each ground metric, by a critic: a lower estimate of the exact one."""
    config = experiment.evaluation.transport
    if config is None:
        return {}
    own, other = (torch.from_numpy(c.first(config.samples).points).float() for c in (cloud, reference))
    metrics: Metrics = {}
    for name, weights in config.metrics.items():
        critic = train_critic(own, other, weights, CriticSettings(config.critic_updates, seed=seed))
        metrics[f"w1_{name}_critic"] = float(critic.value(own).mean() - critic.value(other).mean())
    return metrics
