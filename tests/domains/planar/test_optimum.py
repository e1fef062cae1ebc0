"""Optima on a grid: against closed forms, against other solvers, and by their own certificate."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize, minimize_scalar
from scipy.special import logsumexp

from flowtilt.domains.planar.grid import Grid, finite_distribution, normalise, tail_tilt
from flowtilt.domains.planar.landscapes import Bowl, Slope
from flowtilt.domains.planar.optimum import (
    maximise,
    mirror_iterates,
    mirror_step,
    optimum_of,
    tilt,
    transport_optimum,
)
from flowtilt.functionals.base import FiniteDistribution, Objective
from flowtilt.functionals.divergences import KL, MMD, Wasserstein1
from flowtilt.functionals.utilities import (
    SQ,
    CVaR,
    DiverseModes,
    Entropy,
    ExpectedReward,
    LogBarrier,
    MeanVariance,
)
from flowtilt.metrics.transport import ground_distances

SLOPE = Slope(height=35.0, middle=1.0, softness=1.0)
MODEL = None  # finite distributions never ask for the reference model


def gaussian_distribution(cells=24, extent=4.0):
    grid = Grid(extent, cells)
    log_p = normalise(-0.5 * (grid.points**2).sum(-1)).ravel()
    return FiniteDistribution(grid.flat_points, log_p, log_p)


DISTRIBUTION = gaussian_distribution()
REWARDS = SLOPE(DISTRIBUTION.points).numpy()


def tilted(exponents):
    return normalise(DISTRIBUTION.log_p + exponents)


def test_expected_reward_is_the_exponential_tilt():
    objective = Objective(ExpectedReward(SLOPE), KL(MODEL), 8.0)
    found = maximise(objective, [DISTRIBUTION])
    assert found.value == pytest.approx(8 * logsumexp(DISTRIBUTION.log_p + REWARDS / 8), abs=1e-5)
    assert np.exp(found.log_p) == pytest.approx(np.exp(tilted(REWARDS / 8)), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_entropy_is_a_power_of_the_pretrained_distribution(alpha):
    objective = Objective(Entropy(), KL(MODEL), alpha)
    found = maximise(objective, [DISTRIBUTION])
    power = normalise(alpha / (1 + alpha) * DISTRIBUTION.log_p)
    exact = objective.finite_value(DISTRIBUTION.with_p(np.exp(power)))
    assert found.value == pytest.approx(exact, abs=1e-6 * (exact - objective.finite_value(DISTRIBUTION)))
    assert found.value + found.slack >= exact - 1e-12


@pytest.mark.parametrize(("functional", "tail"), [(CVaR, "lower"), (SQ, "upper")])
def test_tails_reach_the_exact_dual(functional, tail):
    """The lower tail is convex: only with several starts is the best stationary point the optimum."""
    mass = 0.3
    objective = Objective(functional(SLOPE, mass), KL(MODEL), 8.0)
    best = DISTRIBUTION.with_p(np.exp(tail_tilt(DISTRIBUTION.log_p, REWARDS, 8.0, mass, tail)[0]))
    exact, before = objective.finite_value(best), objective.finite_value(DISTRIBUTION)
    starts = [DISTRIBUTION, *(DISTRIBUTION.with_p(np.exp(tilted(REWARDS / w))) for w in (2.0, 8.0, 32.0))]
    assert maximise(objective, starts).value == pytest.approx(exact, abs=1e-3 * (exact - before))
    assert maximise(objective, starts).value <= optimum_of(objective, [DISTRIBUTION]).value + 1e-9
    assert optimum_of(objective, [DISTRIBUTION]).value == pytest.approx(exact, rel=1e-12)


def test_mean_variance_reaches_the_best_of_its_linear_pieces():
    """``-Var r = max_c -E (r - c)^2``: for each c the optimum is a tilt, and c is one number."""
    risk, alpha = 0.02, 8.0

    def value(centre):
        return alpha * logsumexp(DISTRIBUTION.log_p + (REWARDS - risk * (REWARDS - centre) ** 2) / alpha)

    scan = max(np.linspace(REWARDS.min(), REWARDS.max(), 400), key=value)
    exact = -minimize_scalar(lambda c: -value(c), bounds=(scan - 1, scan + 1), method="bounded").fun
    objective = Objective(MeanVariance(SLOPE, risk), KL(MODEL), alpha)
    starts = [DISTRIBUTION, *(DISTRIBUTION.with_p(np.exp(tilted(REWARDS / w))) for w in (2.0, 8.0, 32.0))]
    assert maximise(objective, starts).value == pytest.approx(exact, abs=1e-4)


def test_log_barrier_stays_feasible_and_has_its_certificate():
    objective = Objective(LogBarrier(SLOPE, Bowl((0.0, 0.0), 1.0), bound=3.0, strength=5.0), KL(MODEL), 8.0)
    found = maximise(objective, [DISTRIBUTION])
    gained = found.value - objective.finite_value(DISTRIBUTION)
    assert 0 <= found.slack <= 1e-6 * gained
    cost = Bowl((0.0, 0.0), 1.0)(DISTRIBUTION.points).numpy()
    assert np.exp(found.log_p) @ cost < 3.0
    infeasible = DISTRIBUTION.with_p(np.exp(tilted(cost)))
    assert maximise(objective, [DISTRIBUTION, infeasible]).value == found.value


def test_value_never_falls_and_the_slack_bounds_what_is_missing():
    objective = Objective(ExpectedReward(SLOPE), MMD(MODEL, "gaussian", 1.0), 20.0)
    values = [maximise(objective, [DISTRIBUTION], steps=k).value for k in (0, 1, 3, 10, 30)]
    assert values == sorted(values)
    rough, fine = (maximise(objective, [DISTRIBUTION], tolerance=t, steps=4000) for t in (0.1, 0.01))
    assert rough.value <= fine.value <= rough.value + rough.slack


def test_transport_optimum_is_that_of_the_linear_program():
    """``max sum pi_ij (r_j - alpha d_ij)`` over plans with the reference as first marginal."""
    distribution = gaussian_distribution(cells=6, extent=2.5)
    weights, alpha = (0.25, 6.25), 2.5
    objective = Objective(ExpectedReward(SLOPE), Wasserstein1(MODEL, weights), alpha)
    found = transport_optimum(objective, distribution)
    points, n = distribution.points.numpy(), len(distribution.log_p)
    worth = SLOPE(distribution.points).numpy() - alpha * ground_distances(points, points, weights)
    marginal = np.kron(np.eye(n), np.ones(n))
    exact = -linprog(-worth.ravel(), A_eq=marginal, b_eq=distribution.p, method="highs").fun
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert objective.finite_value(distribution.with_p(np.exp(found.log_p))) == pytest.approx(exact, rel=1e-9)
    assert optimum_of(objective, [distribution]).value == found.value


def test_transport_optimum_is_for_its_own_problem_only():
    with pytest.raises(TypeError, match="expected reward under W1"):
        transport_optimum(Objective(Entropy(), KL(MODEL), 1.0), DISTRIBUTION)


def test_mirror_steps_have_the_closed_form_of_a_power():
    """Entropy under KL with step weight w: in ``p_pre^c``, c <- c - ((1 + alpha) c - alpha) / w."""
    alpha, weight = 0.25, 2.0
    iterates = mirror_iterates(Objective(Entropy(), KL(MODEL), alpha), DISTRIBUTION, weight, 3)
    power = 1.0
    for iterate in iterates:
        power -= ((1 + alpha) * power - alpha) / weight
        assert iterate.log_p == pytest.approx(normalise(power * DISTRIBUTION.log_p), abs=1e-10)


def test_the_first_step_does_not_feel_the_kink_of_a_distance():
    objective = Objective(ExpectedReward(SLOPE), Wasserstein1(MODEL, (1.0, 1.0)), 2.0)
    (first,) = mirror_iterates(objective, DISTRIBUTION, 8.0, 1)
    assert first.log_p == pytest.approx(tilted(REWARDS / 8), abs=1e-12)


def test_slope_is_half_its_height_in_the_middle_and_levels_off():
    """In the middle, where (x + y) / sqrt(2) = 1, its slope along the diagonal is ``height / softness``."""
    step = 1e-4
    along = torch.tensor([1.0, 40.0, -40.0, 1 + step, 1 - step], dtype=torch.float64)
    points = (along / np.sqrt(2))[:, None].repeat(1, 2)
    middle, high, low, above, below = Slope(35.0, 1.0, 0.5)(points).tolist()
    assert (middle, high, low) == pytest.approx((17.5, 35.0, 0.0), abs=1e-9)
    assert (above - below) / (2 * step) == pytest.approx(35.0 / 0.5, rel=1e-6)


# --- Modes -------------------------------------------------------------------------------------

ALPHA, SHIFT = 1.5, 0.5  # of the case in hierarchy_2d


def two_modes(cells=40, extent=5.0):
    """Unit Gaussians at (-SHIFT, 0) and (SHIFT, 0)."""
    grid = Grid(extent, cells)
    centres = np.array([[-SHIFT, 0.0], [SHIFT, 0.0]])
    return finite_distribution(grid, -0.5 * ((grid.points - centres[:, None, None]) ** 2).sum(-1))


def uneven_distribution(seed=0):
    """Seven points in each of three modes, which are not equally likely."""
    random = np.random.default_rng(seed)
    table = random.dirichlet(np.ones(21)).reshape(3, 7)
    points = torch.arange(7.0, dtype=torch.float64).repeat(3)[:, None]
    reference = random.dirichlet(np.ones(7), 3) * table.sum(1, keepdims=True)
    modes = np.repeat(np.arange(3), 7)
    return (
        table,
        reference,
        FiniteDistribution(points, np.log(table.ravel()), np.log(reference.ravel()), modes),
    )


def test_a_tilt_keeps_every_mode_s_probability_and_returns_what_it_promises():
    """``log normaliser = <exponents, q> - KL(q || p)``, the largest of distributions with the same modes."""
    table, _, distribution = uneven_distribution()
    exponents = np.random.default_rng(1).normal(size=21)
    tilted, normaliser = tilt(distribution, exponents)
    q = tilted.p.reshape(3, 7)
    np.testing.assert_allclose(q.sum(1), table.sum(1), rtol=1e-12)
    for own, before, by in zip(q, table, exponents.reshape(3, 7), strict=True):
        np.testing.assert_allclose(own / own.sum(), before * np.exp(by) / (before @ np.exp(by)), rtol=1e-12)
    assert normaliser == pytest.approx(tilted.p @ (exponents - tilted.log_p + distribution.log_p), rel=1e-12)


def test_a_mirror_step_of_diverse_modes_is_the_best_distribution_by_brute_force():
    """``max_q <G', q> - weight KL(q || p)`` mode by mode, by a general optimiser over each mode's simplex."""
    table, reference, distribution = uneven_distribution()
    objective, weight = Objective(DiverseModes(3), KL(MODEL), 0.7), 2.0
    stepped = mirror_step(objective, distribution, weight).p.reshape(3, 7)
    marginal = table.sum(0)
    for k in range(3):
        share = table[k].sum()
        before = table[k] / share
        # The definition: log p_k(x) / mean p(x), less alpha times log p_k(x) / reference_k(x).
        slope = np.log(before / marginal) - 0.7 * np.log(table[k] / reference[k])

        def cost(logits, slope=slope, before=before):
            log_q = logits - logsumexp(logits)
            return -np.exp(log_q) @ (slope - weight * (log_q - np.log(before)))

        found = minimize(cost, np.log(before), method="BFGS", options={"gtol": 1e-9}).x
        np.testing.assert_allclose(stepped[k] / share, np.exp(found - logsumexp(found)), atol=1e-6)


def test_diverse_modes_reach_the_power_of_the_odds():
    """For two modes of equal normalisers the optimum's odds of a mode are the pretrained ones to the power
    ``alpha / (alpha - 1)``: its distribution is ``p_pre(x | z) p(z | x)^(1 / alpha)`` up to a constant."""
    distribution = two_modes()
    objective = Objective(DiverseModes(2), KL(MODEL), ALPHA)
    found = optimum_of(objective, [distribution])
    x = distribution.points[:, 0].numpy() * np.where(distribution.modes == 0, -1.0, 1.0)
    odds = -np.logaddexp(0, -2 * SHIFT * x * ALPHA / (ALPHA - 1))
    best, _ = tilt(distribution, odds / ALPHA)
    assert np.exp(found.log_p) == pytest.approx(best.p, abs=1e-6)
    exact, before = objective.finite_value(best), objective.finite_value(distribution)
    assert found.value == pytest.approx(exact, abs=1e-6 * (exact - before))
    # In the plane's own units, on a line: alpha log E (2 p(z | x))^(1 / alpha).
    line = np.linspace(-9, 9, 4001)
    density = np.exp(-0.5 * (line - SHIFT) ** 2) / np.sqrt(2 * np.pi)
    power = (2 / (1 + np.exp(-2 * SHIFT * line * ALPHA / (ALPHA - 1)))) ** (1 / ALPHA)
    assert exact == pytest.approx(ALPHA * np.log(np.trapezoid(density * power, line)), abs=1e-5)


def test_no_distribution_of_two_modes_is_better_than_the_optimum():
    """``G* = max_q alpha E_z log E_pre[(M q(z | x))^(1 / alpha) | z]`` over every guess q of the mode.

    It is concave for alpha above 1: another problem, by another optimiser, from a random start.
    """
    distribution = two_modes(cells=16, extent=4.0)
    reference = distribution.reference.reshape(2, -1) * 2

    def guess(logits):
        u = 1 / (1 + np.exp(-logits))
        powers = [(2 * q) ** (1 / ALPHA) for q in (1 - u, u)]
        means = [own @ power for own, power in zip(reference, powers, strict=True)]
        slope = (-reference[0] * powers[0] / means[0] * u + reference[1] * powers[1] / means[1] * (1 - u)) / 2
        return -ALPHA / 2 * np.log(means).sum(), -slope

    start = np.random.default_rng(0).normal(size=reference.shape[1])
    found = minimize(
        guess, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    )
    objective = Objective(DiverseModes(2), KL(MODEL), ALPHA)
    best = maximise(objective, [distribution])
    gained = best.value - objective.finite_value(distribution)
    assert best.value == pytest.approx(-found.fun, abs=1e-5 * gained)
    assert best.slack <= 1e-5 * gained


def test_three_steps_of_the_case_close_most_of_the_gap():
    """The log odds go ``c <- (1 - (alpha - 1) / w) c + alpha / w`` for steps of weight w, from 1."""
    distribution = two_modes()
    objective = Objective(DiverseModes(2), KL(MODEL), ALPHA)
    odds = 1.0
    for iterate in mirror_iterates(objective, distribution, ALPHA, 3):
        odds = (1 - (ALPHA - 1) / ALPHA) * odds + 1
        left, right = iterate.log_p.reshape(2, -1)
        np.testing.assert_allclose(
            right - left, odds * 2 * SHIFT * distribution.points[: len(left), 0].numpy(), atol=1e-9
        )
    before, best = objective.finite_value(distribution), optimum_of(objective, [distribution]).value
    assert objective.finite_value(iterate) - before == pytest.approx(0.97 * (best - before), rel=0.01)
