"""Mirror steps by accumulated exponents: the recursion, and a line search that never falls and gets there."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flowtilt.domains.planar.build import build_data, build_reward
from flowtilt.domains.planar.experiment import TailExperiment
from flowtilt.domains.planar.grid import Grid, finite_distribution, normalise
from flowtilt.domains.planar.landscapes import Bowl, Slope
from flowtilt.domains.planar.optimum import maximise, mirror_iterates, tail_optimum
from flowtilt.functionals.base import FiniteDistribution, NoValues, Objective, WeightedSum
from flowtilt.functionals.design import OptimalDesign
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import (
    SQ,
    CVaR,
    Entropy,
    ExpectedReward,
    LogBarrier,
    MeanVariance,
)
from flowtilt.mirror import ascend_exactly, find_step, fixed_step
from flowtilt.rewards import Reward

SLOPE, BOWL = Slope(height=35.0, middle=1.0, softness=1.0), Bowl((0.0, 0.0), 1.0)
ROOT = Path(__file__).parents[1]


def gaussian_distribution(cells=24, extent=4.0):
    grid = Grid(extent, cells)
    log_p = normalise(-0.5 * (grid.points**2).sum(-1)).ravel()
    return FiniteDistribution(grid.flat_points, log_p, log_p)


DISTRIBUTION = gaussian_distribution()
UTILITIES = {
    "expected_reward": (ExpectedReward(SLOPE), 8.0),
    "cvar": (CVaR(SLOPE, 0.3), 8.0),
    "sq": (SQ(SLOPE, 0.1), 8.0),
    "sq_sharp": (SQ(SLOPE, 0.01), 60.0),
    "mean_variance": (MeanVariance(SLOPE, 0.02), 8.0),
    "seeks_variance": (MeanVariance(SLOPE, -0.02), 8.0),
    "log_barrier": (LogBarrier(SLOPE, BOWL, bound=3.0, strength=5.0), 8.0),
    "log_det": (OptimalDesign("log_det"), 0.5),
    "trace": (OptimalDesign("trace", ridge=0.1), 0.5),
    "sum": (
        WeightedSum(((1.0, ExpectedReward(SLOPE)), (0.5, SQ(SLOPE, 0.05)), (0.2, CVaR(SLOPE, 0.2)))),
        8.0,
    ),
    "entropy": (Entropy(), 0.5),
}
every = pytest.mark.parametrize("name", UTILITIES)


def objective_of(name):
    utility, alpha = UTILITIES[name]
    return Objective(utility, KL(None), alpha)


# --- The recursion -----------------------------------------------------------------------------


@every
def test_exponents_are_the_steps_by_densities(name):
    """``h`` knows the divergence: the steps are those by ``f - alpha (log p - log p_base)``."""
    utility, alpha = UTILITIES[name]
    eta = 20 * alpha
    steps = ascend_exactly(utility, alpha, DISTRIBUTION, 4, eta=eta)
    iterates = mirror_iterates(objective_of(name), DISTRIBUTION, eta, 4)
    h = np.zeros(len(DISTRIBUTION.log_p))
    for step, iterate in zip(steps, iterates, strict=True):
        np.testing.assert_allclose(step.distribution.log_p, iterate.log_p, rtol=1e-8, atol=1e-9)
        h = h + step.added
        ratio = step.distribution.log_p - DISTRIBUTION.log_p
        np.testing.assert_allclose(h - h[0], ratio - ratio[0], rtol=1e-8, atol=1e-8)


@every
def test_the_gain_of_a_step_is_what_the_objective_gains(name):
    utility, alpha = UTILITIES[name]
    objective, value = objective_of(name), objective_of(name).finite_value(DISTRIBUTION)
    for step in ascend_exactly(utility, alpha, DISTRIBUTION, 3):
        after = objective.finite_value(step.distribution)
        assert after - value == pytest.approx(step.gain, abs=1e-9 * max(1, abs(value)))
        value = after


@pytest.mark.parametrize("name", ["sq_sharp", "sum", "log_barrier"])
def test_the_direction_is_a_mean_of_first_variations_as_functions(name):
    """What a solver is given, on any points: the planes' variations less alpha h."""
    utility, alpha = UTILITIES[name]
    step = find_step(utility, alpha, DISTRIBUTION, np.zeros(len(DISTRIBUTION.log_p)))
    assert step.mix.sum() == pytest.approx(1)
    f = sum(
        w * plane.variation.value(DISTRIBUTION.points).numpy()
        for w, plane in zip(step.mix, step.planes, strict=True)
    )
    difference = step.added - f / step.eta
    np.testing.assert_allclose(difference, difference[0], atol=1e-9)


# --- Ascent ------------------------------------------------------------------------------------


def random_distribution(seed):
    log_p = normalise(
        np.random.default_rng(seed).normal(size=DISTRIBUTION.log_p.shape)
        - 0.5 * (DISTRIBUTION.points.numpy() ** 2).sum(1)
    )
    return FiniteDistribution(DISTRIBUTION.points, log_p, log_p)


@every
@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_objective_never_falls(name, seed, share):
    distribution = DISTRIBUTION if seed is None else random_distribution(seed)
    utility, alpha = UTILITIES[name]
    objective = objective_of(name)
    steps = ascend_exactly(utility, alpha, distribution, 6, share=share)
    values = [
        objective.finite_value(distribution),
        *(objective.finite_value(step.distribution) for step in steps),
    ]
    assert (np.diff(values) > 0).all()
    assert values[-1] > values[0]
    for step in steps:
        assert step.gain > 0
        assert step.eta >= alpha * (1 - 1e-12)
        assert step.under.effective_share >= share * (1 - 1e-9)


OPTIMA = {
    "expected_reward": 1,
    "sq": 4,
    "sq_sharp": 4,
    "log_barrier": 6,
    "log_det": 6,
    "trace": 6,
    "entropy": 2,
}
"""Concave problems, and the K within which G is within 1e-3 of what there is to gain."""


@pytest.mark.parametrize("name", OPTIMA)
def test_concave_problems_reach_their_optimum(name):
    utility, alpha = UTILITIES[name]
    objective = objective_of(name)
    before = objective.finite_value(DISTRIBUTION)
    if name.startswith("sq"):
        best = tail_optimum(objective, DISTRIBUTION).value
    elif name == "entropy":
        best = objective.finite_value(
            replace(DISTRIBUTION, log_p=normalise(alpha / (1 + alpha) * DISTRIBUTION.log_p))
        )
    else:
        found = maximise(objective, [DISTRIBUTION], tolerance=1e-7, steps=3000)
        best = found.value + found.slack  # at least the optimum
    steps = ascend_exactly(utility, alpha, DISTRIBUTION, OPTIMA[name])
    reached = before + sum(step.gain for step in steps)
    assert best - reached <= 1e-3 * (best - before)


def landscape(name, cells=160):
    """A main experiment's problem on a grid, for the distribution of the data."""
    settings = yaml.safe_load((ROOT / "config" / "experiments" / f"{name}.yaml").read_text())
    settings["grid"]["cells"] = cells
    experiment = TailExperiment(**settings, starts_from=name)
    grid, problem = Grid(experiment.grid.extent, cells), experiment.objective
    distribution = finite_distribution(grid, build_data(experiment).log_density(grid.points))
    functional = CVaR if problem.tail == "lower" else SQ
    return distribution, functional(build_reward(experiment), problem.mass), problem.tail_alpha


def objective_at(utility, alpha, distribution):
    return Objective(utility, KL(None), alpha).finite_value(distribution)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_on_the_novelty_landscape_the_optimum_is_reached_where_a_fixed_step_falls(share):
    """Its tail has a kink once the spikes hold one per cent of the mass."""
    distribution, utility, alpha = landscape("novelty_2d")
    before = objective_at(utility, alpha, distribution)
    best = tail_optimum(Objective(utility, KL(None), alpha), distribution).value
    steps = ascend_exactly(utility, alpha, distribution, 4, share=share)
    values = [before, *(objective_at(utility, alpha, step.distribution) for step in steps)]
    assert (np.diff(values) > 0).all()
    assert best - values[-1] <= 1e-3 * (best - before)
    # At a fixed weight it falls, as a gain says.
    fixed = fixed_step(utility, alpha, distribution, np.zeros(len(distribution.log_p)), 4 * alpha)
    assert fixed.gain < -1000
    assert objective_at(utility, alpha, fixed.distribution) == pytest.approx(before + fixed.gain)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_on_the_risk_landscape_it_ends_in_a_stationary_point(share):
    """CVaR is convex: what is reached is a fixed point of the full step, at most the optimum of the scan."""
    distribution, utility, alpha = landscape("risk_averse_2d")
    before = objective_at(utility, alpha, distribution)
    best = tail_optimum(Objective(utility, KL(None), alpha), distribution).value
    steps = ascend_exactly(utility, alpha, distribution, 12, share=share)
    values = [before, *(objective_at(utility, alpha, step.distribution) for step in steps)]
    assert (np.diff(values) > 0).all()
    assert values[-1] <= best + 1e-9 * abs(best)
    h = sum(step.added for step in steps)
    last = find_step(utility, alpha, steps[-1].distribution, h)
    assert last.gain <= 1e-6 * (values[-1] - before)
    assert fixed_step(utility, alpha, steps[-1].distribution, h, alpha).gain <= 1e-6 * (values[-1] - before)


def test_a_lower_tail_has_stationary_points_that_only_the_scan_gets_past():
    """A far good region: exact steps trim the tail where they start, the dual's scan moves all the mass."""

    class Two(Reward):
        def value(self, x, context=None):
            return torch.where(x[:, 0] > 2.2, 30.0, -x[:, 0].abs())

    utility, alpha = CVaR(Two(), 0.5), 6.0
    best = tail_optimum(Objective(utility, KL(None), alpha), DISTRIBUTION).value
    steps = ascend_exactly(utility, alpha, DISTRIBUTION, 20)
    assert len(steps) < 20
    assert best - objective_at(utility, alpha, steps[-1].distribution) > 3


class Spike(Reward):
    """Far out and high: an upper tail has a kink where the spike holds all of its mass."""

    def value(self, x, context=None):
        return torch.where(x[:, 0] > 2.2, 30.0 + 3 * x[:, 1], SLOPE.value(x) / 10)


@pytest.mark.parametrize("alpha", [3.0, 8.0, 40.0])
def test_at_a_kink_one_first_variation_stalls_and_a_mean_of_several_does_not(alpha):
    utility = SQ(Spike(), 0.1)
    best, before = (
        tail_optimum(Objective(utility, KL(None), alpha), DISTRIBUTION).value,
        objective_at(utility, alpha, DISTRIBUTION),
    )
    missing = {}
    for trials in (1, 8):
        distribution, h, value = DISTRIBUTION, np.zeros(len(DISTRIBUTION.log_p)), before
        for _ in range(8):
            step = find_step(utility, alpha, distribution, h, trials=trials)
            distribution, h, value = step.distribution, h + step.added, value + step.gain
        missing[trials] = (best - value) / (best - before)
    assert missing[1] > 5e-3
    assert -1e-9 < missing[8] < 1e-5


# --- Contexts and banks ------------------------------------------------------------------------


def test_a_step_keeps_the_probabilities_of_modes():
    modes = (DISTRIBUTION.points[:, 0] > 0.5).long().numpy()
    distribution = replace(DISTRIBUTION, modes=modes)
    steps = ascend_exactly(SQ(SLOPE, 0.1), 8.0, distribution, 3)
    for step in steps:
        np.testing.assert_allclose(
            np.bincount(modes, step.distribution.p), np.bincount(modes, DISTRIBUTION.p)
        )
    # What is reached is the optimum of the dual within modes, and less than that over all.
    alone = objective_at(
        SQ(SLOPE, 0.1), 8.0, ascend_exactly(SQ(SLOPE, 0.1), 8.0, DISTRIBUTION, 3)[-1].distribution
    )
    assert objective_at(SQ(SLOPE, 0.1), 8.0, steps[-1].distribution) < alone - 0.03


def test_a_bank_finds_the_step_of_the_grid():
    """Samples of p, their weights and rewards alone; a deviation of the gain is 3 %."""
    utility, alpha = UTILITIES["sq"]
    exact = find_step(utility, alpha, DISTRIBUTION, np.zeros(len(DISTRIBUTION.log_p)), share=0.3)
    count = 300_000
    index = np.random.default_rng(0).choice(len(DISTRIBUTION.log_p), count, p=DISTRIBUTION.p)
    uniform = np.full(count, -math.log(count))
    bank = FiniteDistribution(DISTRIBUTION.points[torch.as_tensor(index)], uniform, uniform)
    found = find_step(utility, alpha, bank, np.zeros(count), share=0.3)
    assert found.gain == pytest.approx(exact.gain, rel=0.06)
    assert found.under.effective_share == pytest.approx(exact.under.effective_share, rel=0.05)
    x = DISTRIBUTION.points.numpy()
    np.testing.assert_allclose(found.distribution.p @ x[index], exact.distribution.p @ x, atol=0.03)


def test_rewards_of_a_bank_are_evaluated_once():
    class Counting(Reward):
        calls = 0

        def value(self, x, context=None):
            type(self).calls += 1
            return SLOPE.value(x)

    reward = Counting()
    find_step(SQ(reward, 0.1), 8.0, gaussian_distribution(), np.zeros(24**2))
    assert reward.calls == 1


# --- Bad input ---------------------------------------------------------------------------------


def test_a_step_that_nothing_bounds_is_refused():
    with pytest.raises(ValueError, match="nothing bounds a step: give alpha, or the effective share"):
        find_step(ExpectedReward(SLOPE), 0.0, DISTRIBUTION, np.zeros(len(DISTRIBUTION.log_p)))
    step = find_step(ExpectedReward(SLOPE), 0.0, DISTRIBUTION, np.zeros(len(DISTRIBUTION.log_p)), share=0.5)
    assert step.under.effective_share == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    "utility", [Entropy(), WeightedSum(((1.0, ExpectedReward(SLOPE)), (1.0, Entropy())))]
)
def test_a_first_variation_without_values_is_refused_with_what_has_them(utility):
    assert not utility.by_values
    with pytest.raises(
        NoValues, match=r"variation of Entropy is not known from weights .* expected_reward, cvar, sq"
    ):
        utility.variation_at(DISTRIBUTION)


def test_nothing_to_raise_is_no_step():
    class Flat(Reward):
        def value(self, x, context=None):
            return torch.zeros(len(x))

    step = find_step(SQ(Flat(), 0.1), 1.0, DISTRIBUTION, np.zeros(len(DISTRIBUTION.log_p)))
    assert (step.gain, step.eta) == (0, math.inf)
    assert not step.added.any()
    assert ascend_exactly(SQ(Flat(), 0.1), 1.0, DISTRIBUTION, 3) == []
