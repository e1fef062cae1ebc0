"""The truth beside every method: gridded pretrained densities, and rows solved exactly on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import torch

from flowtilt.domains.planar.build import build_data, build_reward
from flowtilt.domains.planar.data import GaussianMixture, ModeMixtures
from flowtilt.domains.planar.experiment import PlanarExperiment, TailExperiment
from flowtilt.domains.planar.grid import (
    Blur,
    Grid,
    best_of_tilt,
    expected_reward_tilt,
    gaussian_blur,
    hinge_tilt,
    kl_divergence,
    mirror_ascent,
    no_blur,
    normalise,
    searched_ascent,
)
from flowtilt.domains.planar.rows import FLOOR, GriddedDensity, Metrics, falls, reward_metrics, zone_masses
from flowtilt.domains.planar.sections import TailMethodConfig
from flowtilt.model import FlowModel
from flowtilt.sampling import OdeSettings, log_likelihood
from flowtilt.thresholds import threshold


def build_grid(experiment: PlanarExperiment) -> Grid:
    """The fine grid of the exact rows."""
    return Grid(experiment.grid.extent, experiment.grid.cells)


def gridded_density(model: FlowModel, experiment: PlanarExperiment) -> GriddedDensity:
    """A model's own log-density, given each mode if it has any, by the ODE at each grid point."""
    axis = np.linspace(-experiment.grid.extent, experiment.grid.extent, experiment.grid.density_cells)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    settings = OdeSettings(steps=experiment.evaluation.ode_steps)
    parts = torch.from_numpy(points).float().split(1024)

    def given(mode: int | None) -> np.ndarray:
        contexts = [None if mode is None else torch.full((len(part),), mode) for part in parts]
        values = [log_likelihood(model, *both, settings) for both in zip(parts, contexts, strict=True)]
        return torch.cat(values).double().numpy().reshape(len(axis), len(axis))

    if modes := experiment.data.mode_count:
        return GriddedDensity(axis, np.stack([given(mode) for mode in range(modes)]))
    return GriddedDensity(axis, given(None))


def floored(density: GriddedDensity, data: GaussianMixture | ModeMixtures) -> GriddedDensity:
    """A pretrained density that is nowhere below the data's distribution by more than :data:`FLOOR` nats.

    Where it saw no data a network's log-density is whatever its extrapolation gives, thousands of nats
    below the distribution that it was trained on, and as certain to the solver of the ODE as any other value.
    A divergence from it would be carried by the few samples there. Where there are data, networks are off by
    less than the floor's depth, so that it is not active there.
    """
    points = np.stack(np.meshgrid(density.axis, density.axis, indexing="ij"), axis=-1)
    floor = data.log_density(points) - FLOOR
    return GriddedDensity(density.axis, np.maximum(density.log_density, floor), density.log_density < floor)


def reference_density(model: FlowModel, experiment: PlanarExperiment) -> GriddedDensity:
    """What divergences are measured from: a pretrained model's :func:`gridded_density`, :func:`floored`."""
    return floored(gridded_density(model, experiment), build_data(experiment))


@dataclass(frozen=True)
class TailGrid:
    """An experiment's tail problem on its grid for one pretrained density.

    Holds what its exact rows and those at finite resolution share, each computed once.

    Attributes:
        experiment: with the landscape and the methods.
        density: of the pretrained model.
    """

    experiment: TailExperiment
    density: GriddedDensity

    @cached_property
    def grid(self) -> Grid:
        return build_grid(self.experiment)

    @cached_property
    def log_p(self) -> np.ndarray:
        """Log cell probabilities of the pretrained distribution, (cells, cells)."""
        return normalise(self.density.on(self.grid.axis))

    @cached_property
    def rewards(self) -> np.ndarray:
        """At the cell centres, (cells, cells)."""
        return self.grid.rewards(build_reward(self.experiment))

    @cached_property
    def order(self) -> np.ndarray:
        """Cells in rising order of their reward, (cells^2,): sorted once, for the tails of all rows."""
        return np.argsort(self.rewards, axis=None, kind="stable")

    @cached_property
    def rising(self) -> np.ndarray:
        """The rewards in that order, (cells^2,)."""
        return self.rewards.ravel()[self.order]

    def measured(self, log_q: np.ndarray, kind: str) -> Metrics:
        """Metrics of a distribution for a method of this kind; see :func:`reward_metrics`."""
        weights, kl = np.exp(log_q).ravel()[self.order], kl_divergence(log_q, self.log_p)
        return reward_metrics(self.experiment, kind, self.rising, weights, kl)

    @cached_property
    def bumps(self) -> np.ndarray:
        """The bumps' profile at the cell centres, (cells^2,)."""
        return build_reward(self.experiment).bumps(self.grid.flat_points).numpy()

    @cached_property
    def floored(self) -> np.ndarray:
        """Where the pretrained density is a floor, booleans at the cell centres, (cells^2,)."""
        return self.density.floored_at(self.grid.flat_points.numpy())

    @cached_property
    def threshold(self) -> float:
        """TFFT's dual threshold for the gridded distribution."""
        problem = self.experiment.objective
        weights = np.exp(self.log_p).ravel()
        return threshold(self.rewards.ravel(), problem.tail_alpha, problem.mass, problem.tail, weights)


@dataclass(frozen=True)
class _Solved:
    """A method's distribution, and those that led to it.

    Attributes:
        log_p: log cell probabilities, (cells, cells).
        iterates: of fdc, after each of its steps; none of other methods.
    """

    log_p: np.ndarray
    iterates: list[np.ndarray] = field(default_factory=list)


def _distributions(problem: TailGrid, blur: Blur) -> dict[str, _Solved]:
    """Every method, solved on the grid, by its name."""
    experiment = problem.experiment
    objective, methods = experiment.objective, experiment.methods
    log_p, rewards = problem.log_p, problem.rewards
    alpha, mass, tail = objective.tail_alpha, objective.mass, objective.tail
    ascents: dict[tuple[float | None, float], list[np.ndarray]] = {}

    def steps_of(name: str) -> tuple[float | None, float]:
        """The fixed step, or none and the effective share that a searched one keeps."""
        step = methods[name].fixed_step
        return step, experiment.solver_of(name).share if step is None else 0.0

    def ascent(name: str) -> list[np.ndarray]:
        """Iterates of mirror ascent by the steps of a method, as many as any method asks for."""
        step, share = key = steps_of(name)
        if key not in ascents:
            same = [m for other, m in methods.items() if m.kind == "fdc" and steps_of(other) == key]
            longest = max(m.iterations or 1 for m in same)
            if step is None:
                ascents[key] = searched_ascent(log_p, rewards, alpha, mass, tail, longest, share, blur)
            else:
                ascents[key] = mirror_ascent(log_p, rewards, alpha, alpha / step, mass, tail, longest, blur)
        return ascents[key]

    @cache
    def single(kind: str) -> _Solved:
        """The one tilt of all methods of a kind: what they differ in is how a network is trained."""
        if kind == "am":
            return _Solved(expected_reward_tilt(log_p, rewards, objective.alpha, blur))
        if kind == "tfft":
            return _Solved(hinge_tilt(log_p, rewards, problem.threshold, alpha, mass, tail, blur))
        return _Solved(log_p)

    def solve(name: str, method: TailMethodConfig) -> _Solved:
        if method.n is not None:
            return _Solved(best_of_tilt(log_p, rewards, method.n))
        if method.kind != "fdc":
            return single(experiment.goal_of(name))
        iterates = ascent(name)[: method.iterations]
        return _Solved(iterates[-1] if iterates else log_p, iterates)

    return {name: solve(name, method) for name, method in methods.items()}


@dataclass(frozen=True)
class ExactRows:
    """Metrics and distributions of all methods of an experiment, solved on the grid.

    Attributes:
        metrics: by row name (``am_exact``, ...).
        distributions: cell probabilities by row name, (cells, cells).
    """

    metrics: dict[str, Metrics]
    distributions: dict[str, np.ndarray]


def exact_rows(problem: TailGrid, resolution: float | None = None) -> ExactRows:
    """Every method's steps, each solved exactly for the gridded pretrained density.

    What trains nothing has the tilt of its kind, and no row at finite resolution.

    Args:
        problem: whose methods to solve.
        resolution: standard deviation of the Gaussian that blurs the tilts' exponents, for rows
            at finite resolution (``am_resolved``, ...); None for exact rows.
    """
    experiment = problem.experiment
    blur = gaussian_blur(resolution, problem.grid) if resolution else no_blur
    suffix = "exact" if resolution is None else "resolved"
    x = problem.grid.points[..., 0].ravel()

    @cache
    def measured(name: str) -> tuple[Metrics, np.ndarray]:
        """Metrics and cell probabilities of a method's row."""
        solved, kind = methods[name], experiment.goal_of(name)
        distribution = np.exp(solved.log_p)
        row = problem.measured(solved.log_p, kind)
        if kind == "fdc" and resolution is None:
            passed = [problem.log_p, *solved.iterates][:-1]
            values = [problem.measured(log_q, kind)["objective"] for log_q in passed]
            row["falls"] = falls([*values, row["objective"]])
        row["floored_mass"] = float(distribution.ravel()[problem.floored].sum())
        row |= zone_masses(experiment, x, problem.bumps, distribution.ravel())
        return row, distribution

    methods = _distributions(problem, blur)
    first = {id(solved.log_p): name for name, solved in reversed(methods.items())}
    metrics, distributions = {}, {}
    for name, solved in methods.items():
        if resolution is not None and experiment.methods[name].keeps:
            continue  # no network has to follow its tilt
        same = first[id(solved.log_p)]
        if experiment.goal_of(same) != experiment.goal_of(name):
            same = name
        found, distribution = measured(same)
        metrics[f"{name}_{suffix}"], distributions[f"{name}_{suffix}"] = dict(found), distribution
    return ExactRows(metrics, distributions)


def coarsen(distribution: np.ndarray, cells: int) -> np.ndarray:
    """Sum cell probabilities over square blocks, down to about ``cells`` along a side."""
    block = max(1, distribution.shape[0] // cells)
    side = distribution.shape[0] // block
    trimmed = distribution[: side * block, : side * block]
    return trimmed.reshape(side, block, side, block).sum(axis=(1, 3))


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of absolute differences of two vectors of probabilities."""
    return 0.5 * float(np.abs(p - q).sum())


def resolution_mismatch(
    experiment: TailExperiment, runs: Sequence[tuple[GriddedDensity, np.ndarray]], widths: Sequence[float]
) -> np.ndarray:
    """Distance between networks' samples and Adjoint Matching's distribution at each blur width, (runs,
    widths).

    Total variation between histograms along both axes in bins of about a tenth.

    Args:
        experiment: one whose networks were fine-tuned by Adjoint Matching.
        runs: of each, the density of its pretrained model, and samples of the fine-tuned one, (n, 2).
        widths: candidates for the width of the blur; 0 is no blur.
    """
    grid, rewards = build_grid(experiment), build_grid(experiment).rewards(build_reward(experiment))
    bins = max(8, round(2 * grid.extent / 0.1))
    edges = np.linspace(-grid.extent, grid.extent, bins + 1)
    densities = [normalise(density.on(grid.axis)) for density, _ in runs]
    inside = [np.clip(samples, -grid.extent, grid.extent) for _, samples in runs]
    seen = [[np.histogram(x[:, axis], edges)[0] / len(x) for axis in (0, 1)] for x in inside]
    mismatches = np.empty((len(runs), len(widths)))
    for j, width in enumerate(widths):
        # The blur costs most, and is the same for all runs.
        exponent = (gaussian_blur(width, grid) if width else no_blur)(rewards / experiment.objective.alpha)
        for i, log_p in enumerate(densities):
            distribution = np.exp(normalise(log_p + exponent))
            along = [np.histogram(grid.axis, edges, weights=distribution.sum(1 - axis))[0] for axis in (0, 1)]
            mismatches[i, j] = np.mean([total_variation(a, b) for a, b in zip(along, seen[i], strict=True)])
    return mismatches
