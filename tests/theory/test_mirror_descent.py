"""Mirror ascent against its bounds: utilities, constants, optima, and every bound at every K."""

from __future__ import annotations

import numpy as np
import pytest

from flowtilt.pipeline.theory.config import load_theory
from flowtilt.pipeline.theory.mirror_descent import (
    FIT_ABOVE,
    LOG_ERROR,
    Problem,
    Run,
    _against_bounds,
    bounds,
    build_problem,
    fitted_rate,
    ratios,
    relative_curvature,
    study,
)
from flowtilt.theory.distributions import excess, gaussian_mixture, kl_divergence, normalise, square_grid
from flowtilt.theory.utilities import Entropy, ExpectedReward, KernelMatching, LogBarrier, OptimalDesign
from small import CONFIG

FILE = CONFIG / "theory" / "mirror_descent.yaml"
CONFIGURED = load_theory(FILE, {"grid": {"cells": 10}, "iterations": 30})
NAMES = list(CONFIGURED.problems)


@pytest.fixture(scope="module")
def problems():
    points = square_grid(CONFIGURED.grid.extent, CONFIGURED.grid.cells)
    data = CONFIGURED.data
    base = gaussian_mixture(points, *map(np.array, (data.weights, data.means, data.deviations)))
    return {name: build_problem(c, points, base) for name, c in CONFIGURED.problems.items()}


@pytest.fixture(scope="module")
def optima(problems):
    return {name: problem.optimum() for name, problem in problems.items()}


@pytest.fixture(scope="module")
def tables():
    return study(CONFIGURED)


def distributions_near(problem, count, seed=0, spread=0.7):
    """Random distributions: the base times the exponential of noise."""
    rng = np.random.default_rng(seed)
    return [
        normalise(problem.log_base + spread * rng.normal(size=problem.log_base.size)) for _ in range(count)
    ]


# --------------------------------------------------------------------------- distributions and utilities


def test_excess_keeps_its_digits_through_zero():
    d = np.array([1e-14, 1e-8, -1e-5, 0.99e-3, 1.01e-3, -0.3, 2.0])
    exact = [5e-29 * (1 - 1e-14 / 3), 5e-17, 5e-11 * (1 + 1e-5 / 3)]
    np.testing.assert_allclose(excess(d)[:3], exact, rtol=1e-8)
    # Both branches against the series' next terms, at the point where they meet.
    series = [sum((-x) ** n / np.prod(np.arange(1.0, n + 1)) for n in range(2, 9)) for x in d[3:5]]
    np.testing.assert_allclose(excess(d)[3:5], series, rtol=1e-11)
    np.testing.assert_allclose(excess(d)[5:], d[5:] + np.exp(-d[5:]) - 1, rtol=1e-14)


def test_divergence_of_close_distributions_is_half_the_weighted_square():
    p = np.full(50, 1 / 50)
    change = 1e-10 * np.where(np.arange(50) % 2, 1.0, -1.0)
    kl = kl_divergence(np.log(p) + np.log1p(change), np.log(p))
    assert kl == pytest.approx(0.5e-20, rel=1e-5)  # log p is rounded to 1e-16 of 4: 5e-6 of the change


@pytest.mark.parametrize("name", NAMES)
def test_variation_is_the_derivative_of_the_value(problems, name):
    problem, step = problems[name], 1e-6
    p = np.exp(distributions_near(problem, 1)[0])
    rng = np.random.default_rng(1)
    for _ in range(3):
        v = p * rng.normal(size=p.size)
        v -= p * v.sum()
        utility = problem.utility
        slope = (utility.value(p + step * v) - utility.value(p - step * v)) / (2 * step)
        assert slope == pytest.approx(utility.variation(p) @ v, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_curvature_is_the_derivative_of_the_variation(problems, name):
    utility, step = problems[name].utility, 1e-6
    p = np.exp(distributions_near(problems[name], 1)[0])
    v = p * np.random.default_rng(2).normal(size=p.size)
    v -= p * v.sum()
    slope = (utility.variation(p + step * v) - utility.variation(p - step * v)) / (2 * step)
    np.testing.assert_allclose(-utility.curvature(p) @ v, slope, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_the_distance_from_the_tangent(problems, name):
    utility = problems[name].utility
    for log_p, log_q in zip(
        distributions_near(problems[name], 5, 3), distributions_near(problems[name], 5, 4), strict=True
    ):
        p, q = np.exp(log_p), np.exp(log_q)
        direct = utility.value(q) + utility.variation(q) @ (p - q) - utility.value(p)
        assert utility.divergence(log_p, log_q) == pytest.approx(direct, abs=1e-12)


# --------------------------------------------------------------------------- constants


@pytest.mark.parametrize("name", NAMES)
def test_proven_constants_hold_for_random_distributions(problems, name):
    problem = problems[name]
    L = problem.utility.smoothness(problem.log_base, problem.alpha) + problem.alpha
    low = problem.utility.strong_concavity + problem.alpha
    distributions = distributions_near(problem, 12, 5)
    for distribution in distributions[:4]:
        smallest, largest = relative_curvature(problem, distribution)
        assert low * (1 - 1e-9) <= smallest <= largest <= L * (1 + 1e-9)
    found = ratios(problem, zip(distributions[:6], distributions[6:], strict=True))
    assert low * (1 - 1e-9) <= min(found) <= max(found) <= L * (1 + 1e-9)


def on_two_cells(size, i, j, share):
    """Nearly all mass on two cells, so that the distribution is still positive."""
    p = np.full(size, 1e-13)
    p[i], p[j] = share, 1 - share
    return np.log(p / p.sum())


def test_kernel_constant_is_attained_at_the_two_farthest_cells(problems):
    problem = problems["kernel_matching"]
    kernel = problem.utility.kernel
    i, j = np.unravel_index(int(kernel.argmin()), kernel.shape)
    largest = relative_curvature(problem, on_two_cells(len(kernel), i, j, 0.5))[1]
    L = problem.utility.smoothness(problem.log_base, problem.alpha) + problem.alpha
    assert largest == pytest.approx(L, rel=1e-9)


def test_design_constant_is_nearly_attained():
    """On the features 0 and a the ratio is s^2 p (1 - p) / (1 + p s)^2 with s = a^2 / ridge."""
    s = 1e4
    utility = OptimalDesign(np.array([[0.0], [100.0]]), ridge=1.0, weight=2.0)
    problem = Problem(utility, 0.5, np.log([0.5, 0.5]))
    share = 1 / s
    largest = relative_curvature(problem, np.log([1 - share, share]))[1] - 0.5
    assert largest == pytest.approx(2 * s**2 * share * (1 - share) / 4, rel=1e-9)
    assert largest == pytest.approx(utility.smoothness(problem.log_base, 0.5), rel=2 / s)


def test_barrier_constant_is_attained_at_its_largest_mean_cost(problems):
    problem = problems["log_barrier"]
    utility = problem.utility
    most = utility._largest_mean_cost(problem.log_base, problem.alpha)
    i, j = int(utility.cost.argmin()), int(utility.cost.argmax())
    share = (utility.cost[j] - most) / (utility.cost[j] - utility.cost[i])
    largest = relative_curvature(problem, on_two_cells(utility.cost.size, i, j, share))[1]
    L = utility.smoothness(problem.log_base, problem.alpha) + problem.alpha
    assert largest == pytest.approx(L, rel=1e-6)  # the other cells hold 1e-11 of the mass


def test_no_distribution_above_the_start_has_a_larger_mean_cost(problems):
    """Distributions that push the mean cost up as cheaply as can be: tilts by reward and cost."""
    problem = problems["log_barrier"]
    utility = problem.utility
    most = utility._largest_mean_cost(problem.log_base, problem.alpha)
    start = problem.value(problem.log_base)
    costs = []
    for k in np.linspace(-1.0, 1.0, 2001):
        distribution = normalise(problem.log_base + (utility.reward + k * utility.cost) / problem.alpha)
        if problem.value(distribution) >= start:
            costs.append(np.exp(distribution) @ utility.cost)
    # Along the tilts the bound is attained, up to the spacing of k.
    assert most - 0.01 <= max(costs) <= most


@pytest.mark.parametrize("budget", [1.05, 2.0, 5.0])
def test_barrier_constant_where_no_cost_exceeds_the_budget(budget):
    """An interior maximum of the ratio, against a scan over mean costs."""
    rng = np.random.default_rng(0)
    utility = LogBarrier(rng.normal(size=30), np.linspace(0.0, 1.0, 30), budget, weight=0.7)
    base = np.full(30, -np.log(30.0))
    most = min(1.0, utility._largest_mean_cost(base, 0.5))
    m = np.linspace(0.0, most, 200_001)
    scan = (0.7 * (1 - m) * m / (budget - m) ** 2).max()
    assert utility.smoothness(base, 0.5) == pytest.approx(scan, rel=1e-6)


def test_infeasible_barrier_is_named():
    utility = LogBarrier(np.zeros(3), np.array([1.0, 2.0, 3.0]), budget=2.0, weight=1.0)
    with pytest.raises(ValueError, match=r"pretrained mean cost 2 is not below budget 2; raise the budget"):
        utility.smoothness(np.log(np.full(3, 1 / 3)), 1.0)


# --------------------------------------------------------------------------- optima and iterates


@pytest.mark.parametrize("name", NAMES)
def test_optimum_is_certified_and_where_a_long_ascent_ends(problems, optima, name):
    problem, optimum = problems[name], optima[name]
    assert 0 <= problem.certificate(optimum) < 1e-26
    L = problem.utility.smoothness(problem.log_base, problem.alpha) + problem.alpha
    distribution = problem.ascend(L, 1500)[-1]
    np.testing.assert_allclose(np.exp(distribution), np.exp(optimum), atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_certificate_bounds_the_gap_and_gaps_are_differences_of_values(problems, optima, name):
    problem, optimum = problems[name], optima[name]
    for distribution in distributions_near(problem, 5, 6, spread=0.2):
        gap = problem.divergence(distribution, optimum)
        assert gap == pytest.approx(problem.value(optimum) - problem.value(distribution), abs=1e-12)
        assert gap <= problem.certificate(distribution) * (1 + 1e-12)


def test_expected_reward_arrives_in_one_step_and_in_closed_form(problems, optima):
    problem = problems["expected_reward"]
    tilt = normalise(problem.log_base + problem.utility.reward / problem.alpha)
    np.testing.assert_allclose(optima["expected_reward"], tilt, atol=1e-13)
    np.testing.assert_allclose(problem.ascend(problem.alpha, 1)[-1], tilt, atol=1e-13)
    for k, distribution in enumerate(problem.ascend(4 * problem.alpha, 10)):
        share = 1 - 0.75**k
        expected = normalise(problem.log_base + share * problem.utility.reward / problem.alpha)
        np.testing.assert_allclose(distribution, expected, atol=1e-13)


def test_entropy_iterates_are_powers_of_the_base(problems, optima):
    problem = problems["entropy"]
    end = problem.alpha / (problem.alpha + problem.utility.weight)
    np.testing.assert_allclose(optima["entropy"], normalise(end * problem.log_base), atol=1e-13)
    L = problem.alpha + problem.utility.weight
    np.testing.assert_allclose(problem.ascend(L, 1)[-1], optima["entropy"], atol=1e-13)
    for k, distribution in enumerate(problem.ascend(4 * L, 10)):
        power = end + (1 - end) * 0.75**k
        np.testing.assert_allclose(distribution, normalise(power * problem.log_base), atol=1e-12)


def test_kernel_optimum_solves_its_own_equation(problems, optima):
    problem, p = problems["kernel_matching"], np.exp(optima["kernel_matching"])
    tilt = problem.log_base - problem.utility.weight / problem.alpha * problem.utility.kernel @ (
        p - problem.utility.target
    )
    np.testing.assert_allclose(optima["kernel_matching"], normalise(tilt), atol=1e-13)


# --------------------------------------------------------------------------- bounds and rates


def test_bounds_in_their_limits():
    sublinear, linear = bounds(3.0, 0.0, 2.0, 5)
    np.testing.assert_allclose(sublinear, 6 / np.arange(1, 6))
    np.testing.assert_array_equal(linear, sublinear)
    np.testing.assert_array_equal(bounds(2.0, 2.0, 1.0, 4), np.zeros((2, 4)))
    sublinear, linear = bounds(3.0, 1e-9, 2.0, 5)
    np.testing.assert_allclose(linear, sublinear, rtol=1e-8)
    sublinear, linear = bounds(4.0, 1.0, 2.0, 3)
    np.testing.assert_allclose(sublinear, [6, 3, 2])
    np.testing.assert_allclose(linear, [2 / ((4 / 3) ** k - 1) for k in (1, 2, 3)])
    assert (bounds(1.5, 1.0, 1.0, 3000)[1] >= 0).all()  # it underflows, and does not overflow


def test_bounds_hold_at_every_iteration(tables):
    assert len(tables["iterations"]) == 30 * len(tables["runs"])
    for row in tables["iterations"]:
        assert row["verdict"] == "holds", row
        slack = 1e-26 * 1e3
        assert row["gap"] <= row["linear_bound"] * (1 + 1e-9) + slack
        assert row["linear_bound"] <= row["sublinear_bound"] * (1 + 1e-12)
    for run in tables["runs"]:
        assert run["holds"] == run["iterations"] == 30


def test_runs_cover_proven_and_measured_constants(tables):
    runs = {(run["problem"], run["run"]): run for run in tables["runs"]}
    for name in ("optimal_design", "kernel_matching", "log_barrier"):
        proven, measured = runs[name, "proven"], runs[name, "measured"]
        assert proven["l"] <= measured["l"] <= measured["L"] < proven["L"]
        assert proven["l"] * (1 - 1e-6) <= proven["observed_l"] <= proven["observed_L"] <= proven["L"]
    for name in ("expected_reward", "entropy"):
        assert runs[name, "proven"]["L"] == runs[name, "proven"]["l"]
        assert (name, "measured") not in runs


def test_fitted_rates_are_within_the_guaranteed_ones(tables):
    fitted = [run for run in tables["runs"] if run["fitted_rate"] is not None]
    assert len(fitted) >= 7
    for run in fitted:
        assert run["fitted_rate"] <= run["guaranteed_rate"] + 3 * run["fitted_rate_error"]
    for run in fitted:
        if run["run"] == "proven x 4":  # both are linear in log p: gaps fall as (1 - 1/4)^2
            assert run["fitted_rate"] == pytest.approx(0.5625, rel=0.02)


def test_too_large_steps_are_reported_as_violations(problems, optima):
    problem = problems["kernel_matching"]
    needed = relative_curvature(problem, optima["kernel_matching"])[1]
    run = Run("too large", 0.3 * needed, problem.alpha, problem.ascend(0.3 * needed, 30))
    rows = _against_bounds(problem, run, optima["kernel_matching"], "kernel_matching")
    assert any(row["verdict"] == "violated" for row in rows)


def test_fitted_rate_of_a_geometric_sequence():
    gaps = 3 * 0.6 ** np.arange(40)
    assert fitted_rate(gaps, 0.0) == pytest.approx((0.6, 0.0), abs=1e-12)
    cut = np.where(gaps > 1e-6, gaps, 1e-6)
    rate = fitted_rate(cut, 1e-6)
    assert rate is not None
    assert rate[0] == pytest.approx(0.6, abs=1e-12)
    assert fitted_rate(gaps[:5], 0.0) is None
    assert fitted_rate(np.zeros(10), FIT_ABOVE * LOG_ERROR**2) is None


def test_ratios_leave_out_pairs_that_are_too_close(problems):
    problem = problems["entropy"]
    distribution = problem.log_base
    assert (
        ratios(problem, [(distribution, distribution), (distribution, normalise(distribution * (1 + 1e-12)))])
        == []
    )
    assert isinstance(problem.utility, Entropy)
    assert isinstance(problems["kernel_matching"].utility, KernelMatching)
    assert isinstance(problems["expected_reward"].utility, ExpectedReward)
