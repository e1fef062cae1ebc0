"""The reference of every divergence in the plane: the pretrained network's density above a floor."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import cast

import numpy as np
import pytest
import torch

from flowtilt.domains.planar.build import build_data
from flowtilt.domains.planar.data import GaussianMixture
from flowtilt.domains.planar.distributions import GridProblem, grid_problem, network_grid_metrics
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.rows import FLOOR, GriddedDensity, sample_divergence
from flowtilt.domains.planar.truth import floored
from small import tiny

EDGE, SPREAD = -3.4375, 1.5
OUTSIDE = NormalDist(0, SPREAD).cdf(EDGE)
"""Mass of N(0, 1.5^2 I) left of the edge: 1 %."""
GRID = {"grid": {"extent": 6.0, "cells": 100, "density_cells": 97}}
AXIS = np.linspace(-6, 6, 97)
POINTS = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1)


@pytest.fixture(scope="module")
def experiment() -> FunctionalExperiment:
    return cast(FunctionalExperiment, tiny("entropy_2d", **GRID))


@pytest.fixture(scope="module")
def data(experiment: FunctionalExperiment) -> GaussianMixture:
    return cast(GaussianMixture, build_data(experiment))


@pytest.fixture(scope="module")
def wide() -> GaussianMixture:
    """What a tuned model would be: wider than the data."""
    return GaussianMixture(np.ones(1), np.zeros((1, 2)), np.full((1, 2), SPREAD))


@pytest.fixture(scope="module")
def corrupted(data: GaussianMixture) -> GriddedDensity:
    """The data's own distribution, but for -3,000 nats where a network has seen no data."""
    broken = np.where(POINTS[..., 0] < EDGE, -3000.0, data.log_density(POINTS))
    return GriddedDensity(AXIS, broken)


def exact_divergence(wide: GaussianMixture, data: GaussianMixture) -> float:
    """``KL(wide || data)`` by Gauss-Hermite quadrature, as far out as either has any mass."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    points = SPREAD * np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1)
    ratio = wide.log_density(points) - data.log_density(points)
    return float(np.einsum("i,j,ij->", weights, weights, ratio) / (2 * np.pi))


def draws(wide: GaussianMixture, count: int) -> np.ndarray:
    """Samples on the grid alone."""
    points = wide.sample(count, torch.Generator().manual_seed(3)).double().numpy()
    return points[np.abs(points).max(axis=1) < AXIS[-1]]


def test_what_a_network_cannot_say_does_not_carry_the_divergence(
    wide: GaussianMixture, data: GaussianMixture, corrupted: GriddedDensity
) -> None:
    """A hundredth of the samples would carry nearly all of it; the floor gives that of the distribution."""
    points = draws(wide, 20_000)
    own = wide.log_density(points)
    assert sample_divergence(own, corrupted, points)["kl"] > 20  # type: ignore[operator]
    found = sample_divergence(own, floored(corrupted, data), points)
    ratio = own - data.log_density(points)
    error = 4 * ratio.std() / math.sqrt(len(points))
    # Where the floor is active the reference is lower than the distribution by just as much.
    assert found["floored_mass"] == pytest.approx(OUTSIDE, abs=4 * math.sqrt(OUTSIDE / len(points)) + 1e-3)
    wanted = exact_divergence(wide, data) + FLOOR * OUTSIDE
    assert found["kl"] == pytest.approx(wanted, abs=error + 0.01)


def test_on_the_grid_as_by_samples(
    experiment: FunctionalExperiment, wide: GaussianMixture, data: GaussianMixture, corrupted: GriddedDensity
) -> None:
    own = GriddedDensity(AXIS, wide.log_density(POINTS))

    def measured(reference: GriddedDensity) -> tuple[GridProblem, dict[str, float | None]]:
        problem = grid_problem(experiment, "fdc_alpha_0.5", reference)
        return problem, network_grid_metrics(problem, own)

    broken, right = measured(corrupted)[1], measured(GriddedDensity(AXIS, data.log_density(POINTS)))[1]
    problem, found = measured(floored(corrupted, data))
    assert broken["kl"] > 20  # type: ignore[operator]
    assert found["kl"] == pytest.approx(right["kl"] + FLOOR * OUTSIDE, abs=0.01)  # type: ignore[operator]
    assert found["kl"] == pytest.approx(exact_divergence(wide, data) + FLOOR * OUTSIDE, abs=0.03)
    assert found["floored_mass"] == pytest.approx(OUTSIDE, abs=1.5e-3)
    # G is of the same divergence.
    entropy = problem.objective.utility.finite_value(problem.distribution(own.on(problem.grid.axis).ravel()))
    assert entropy > 0
    fallen = right["functional"] - found["functional"]  # type: ignore[operator]
    assert fallen == pytest.approx(0.5 * FLOOR * OUTSIDE, abs=0.005)


def test_a_density_that_is_right_is_left_alone(data: GaussianMixture) -> None:
    """Errors of up to the floor's depth, of either sign, stay as they are."""
    noise = np.random.default_rng(0).uniform(-FLOOR, FLOOR, POINTS.shape[:2])
    density = GriddedDensity(AXIS, data.log_density(POINTS) + noise)
    kept = floored(density, data)
    np.testing.assert_array_equal(kept.log_density, density.log_density)
    assert not kept.floored_at(POINTS.reshape(-1, 2)).any()


def test_points_off_the_grid_count_as_floored(corrupted: GriddedDensity, data: GaussianMixture) -> None:
    """Of them the reference is the border's value, which is as little their own."""
    points = np.array([[0.0, 0.0], [-5.0, 0.0], [6.5, 0.0], [0.0, -7.0], [3.0, 3.0]])
    assert floored(corrupted, data).floored_at(points).tolist() == [False, True, True, True, False]
    inside = replace(corrupted, floored=None)
    assert inside.floored_at(points).tolist() == [False, False, True, True, False]


def test_each_mode_has_its_own_floor() -> None:
    experiment = tiny("modes_2d", grid={"extent": 6.0, "cells": 16, "density_cells": 97})
    data = build_data(experiment)
    broken = data.log_density(POINTS).copy()
    broken[1, 0, 0] = -3000.0
    found = floored(GriddedDensity(AXIS, broken), data)
    corner, both = np.full((2, 2), -6.0), np.array([0, 1])
    assert found.floored_at(corner, both).tolist() == [False, True]
    assert found.log_density[1, 0, 0] == data.log_density(POINTS)[1, 0, 0] - FLOOR
