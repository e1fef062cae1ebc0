import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from flowtilt.domains.planar.grid import (
    Grid,
    best_of_tilt,
    expected_reward_tilt,
    finite_distribution,
    gaussian_blur,
    kl_divergence,
    mirror_ascent,
    normalise,
    tail_tilt,
)
from flowtilt.domains.planar.landscapes import Spikes, Stripes
from flowtilt.domains.planar.rows import GriddedDensity
from flowtilt.metrics.tails import hinge, lower_tail_mean, quantile, upper_tail_mean
from flowtilt.rewards import Reward
from flowtilt.thresholds import dual_objective
from primal import best, objective

TAILS = ("lower", "upper")
TAIL_MEANS = {"lower": lower_tail_mean, "upper": upper_tail_mean}
tails = pytest.mark.parametrize("tail", TAILS)


def gain(log_q, log_p, rewards, alpha, mass, tail):
    """``tail mean - alpha KL``, by the package's own estimators."""
    return TAIL_MEANS[tail](rewards, mass, np.exp(log_q)) - alpha * kl_divergence(log_q, log_p)


def small_distribution(seed, n=6):
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.ones(n))).reshape(2, -1), rng.normal(size=(2, n // 2)) * 2


def planar_distribution(tail, cells=160):
    """A normal density and a landscape of each experiment, with features of a few cells."""
    grid = Grid(extent=5.0, cells=cells)
    log_p = normalise(-0.5 * (grid.points**2).sum(-1))
    zones = {
        "left_edge": -1.0,
        "right_edge": 1.0,
        "softness": 0.3,
        "width": 0.15,
        "spacing": 0.9,
        "inset": 0.4,
    }
    if tail == "lower":
        landscape = Stripes(left=80.0, plateau=100.0, right=20.0, bump=290.0, sign=-1, **zones)
    else:
        landscape = Spikes(left=70.0, plateau=50.0, right=10.0, bump=200.0, sign=1, **zones)
    return log_p, grid.rewards(landscape)


# --- The grid ----------------------------------------------------------------------------------


def test_cells_cover_the_square_and_the_first_axis_runs_along_x():
    class First(Reward):
        def value(self, x, context=None):
            return x[:, 0] + 10 * x[:, 1] ** 2

    grid = Grid(extent=2.0, cells=8)
    assert grid.spacing == 0.5
    np.testing.assert_allclose(grid.axis, [-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75])
    assert grid.points.shape == (8, 8, 2)
    rewards = grid.rewards(First())
    assert rewards.dtype == np.float64
    np.testing.assert_allclose(rewards, grid.axis[:, None] + 10 * grid.axis[None, :] ** 2)


def test_normalised_distributions_and_their_divergence():
    log_p = normalise(np.array([[0.0, 1000.0], [1001.0, -2000.0]]))
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-12)  # rounding of logs of 1e3
    p, q = np.array([0.1, 0.6, 0.3]), np.array([0.3, 0.3, 0.4])
    expected = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_divergence(np.log(p), np.log(q)) == pytest.approx(expected, rel=1e-14)
    assert kl_divergence(np.log(p), np.log(p)) == 0


def test_a_fine_grid_integrates_gaussians_exactly():
    """Equal cells integrate smooth densities to rounding: a tilt by ``r / weight`` moves the mean by it."""
    grid = Grid(extent=9.0, cells=180)
    x = grid.points[..., 0]
    log_p = normalise(-0.5 * (grid.points**2).sum(-1))
    log_q = expected_reward_tilt(log_p, 3 * x, kl_weight=2.0)
    assert float((np.exp(log_q) * x).sum()) == pytest.approx(1.5, abs=1e-9)
    assert kl_divergence(log_q, log_p) == pytest.approx(1.5**2 / 2, abs=1e-9)


@pytest.mark.parametrize("width", [0.1, 0.35])
def test_a_blur_is_a_gaussian_of_the_width_in_units_of_the_plane(width):
    grid = Grid(extent=3.0, cells=120)
    blur = gaussian_blur(width, grid)
    np.testing.assert_allclose(blur(np.full((120, 120), 2.5)), 2.5, rtol=1e-12)
    point = np.zeros((120, 120))
    point[60, 60] = 1
    profile = blur(point).sum(axis=1)
    centred = grid.axis - grid.axis[60]
    assert profile.sum() == pytest.approx(1, abs=1e-12)
    # The filter is cut at four standard deviations, which loses 0.05 % of the variance.
    assert np.sqrt(profile @ centred**2) == pytest.approx(width, rel=2e-3)
    waves = np.cos(4 * grid.points[..., 0])
    inner = slice(40, 80)
    np.testing.assert_allclose(blur(waves)[inner], np.exp(-8 * width**2) * waves[inner], atol=2e-3)


# --- Adjoint Matching's distribution ---------------------------------------------------------------------


@tails
@pytest.mark.parametrize("weight", [0.5, 5.0, 50.0])
def test_the_expected_reward_tilt_raises_every_quantile(tail, weight):
    """First-order stochastic dominance over the pretrained distribution, as theory demands."""
    log_p, rewards = planar_distribution(tail)
    log_q = expected_reward_tilt(log_p, rewards, weight)
    order = np.argsort(rewards, axis=None)
    before, after = (np.cumsum(np.exp(distribution).ravel()[order]) for distribution in (log_p, log_q))
    last = np.append(
        np.diff(rewards.ravel()[order]) > 0, True
    )  # the distribution function at distinct rewards
    # Rounding of cumulative sums over 25,600 cells.
    assert np.all(after[last] <= before[last] + 1e-12)
    levels = np.linspace(0.005, 0.995, 199)
    quantiles = [
        [quantile(rewards, b, np.exp(distribution)) for b in levels] for distribution in (log_p, log_q)
    ]
    assert np.all(np.array(quantiles[1]) >= np.array(quantiles[0]))
    for tail in TAILS:
        assert TAIL_MEANS[tail](rewards, 0.01, np.exp(log_q)) >= TAIL_MEANS[tail](
            rewards, 0.01, np.exp(log_p)
        )


def test_the_expected_reward_tilt_maximises_the_regularised_mean():
    log_p, rewards = small_distribution(0)
    weight = 0.7

    def value(log_q):
        return float((np.exp(log_q) * rewards).sum()) - weight * kl_divergence(log_q, log_p)

    best_value = value(expected_reward_tilt(log_p, rewards, weight))
    # Donsker and Varadhan: the maximum is weight log E exp(r / weight).
    assert best_value == pytest.approx(weight * np.log(np.sum(np.exp(log_p + rewards / weight))), abs=1e-12)
    rng = np.random.default_rng(1)
    for scale in (1e-3, 0.1, 1.0):
        for _ in range(200):
            assert (
                value(normalise(log_p + rewards / weight + scale * rng.normal(size=log_p.shape))) < best_value
            )


# --- TFFT's distribution ---------------------------------------------------------------------------------


@tails
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("alpha", "mass"), [(0.3, 0.25), (1.0, 0.1), (3.0, 0.6)])
def test_the_tail_tilt_attains_the_optimum(tail, seed, alpha, mass):
    log_p, rewards = small_distribution(seed)
    log_q, at = tail_tilt(log_p, rewards, alpha, mass, tail)
    found = gain(log_q, log_p, rewards, alpha, mass, tail)
    p, r = np.exp(log_p).ravel(), rewards.ravel()
    # Against a convex solver (whose distribution falls short by up to 1.4e-8), the dual, and an independent
    # objective.
    assert -1e-12 <= found - best(p, r, alpha, mass, tail) <= 1e-7
    assert found == pytest.approx(dual_objective(at, r, alpha, mass, tail, p), abs=1e-12)
    assert found == pytest.approx(objective(np.exp(log_q).ravel(), p, r, alpha, mass, tail), abs=1e-12)


@tails
@pytest.mark.parametrize("seed", range(5))
def test_no_feasible_tilt_is_better_than_the_tail_tilt(tail, seed):
    """Random distributions far from it and near it, and a local search from each of the best."""
    alpha, mass, (log_p, rewards) = 0.8, 0.3, small_distribution(seed)
    log_q, _ = tail_tilt(log_p, rewards, alpha, mass, tail)
    found = gain(log_q, log_p, rewards, alpha, mass, tail)
    rng = np.random.default_rng(seed)

    def value(exponents):
        return gain(normalise(exponents.reshape(log_p.shape)), log_p, rewards, alpha, mass, tail)

    starts = [log_p + scale * rng.normal(size=log_p.shape) for scale in (0.1, 1.0, 3.0) for _ in range(200)]
    starts += [
        log_q + scale * rng.normal(size=log_p.shape) for scale in (1e-3, 0.03, 0.3) for _ in range(200)
    ]
    values = np.array([value(s) for s in starts])
    assert values.max() <= found + 1e-13
    for i in np.argsort(values)[-5:]:
        searched = minimize(
            lambda e: -value(e), starts[i].ravel(), method="Nelder-Mead", options={"maxfev": 600}
        )
        assert -searched.fun <= found + 1e-13


@tails
@pytest.mark.parametrize(("alpha", "mass"), [(5.0, 0.01), (50.0, 0.05)])
def test_the_tail_tilt_attains_its_dual_on_a_landscape(tail, alpha, mass):
    log_p, rewards = planar_distribution(tail)
    log_q, at = tail_tilt(log_p, rewards, alpha, mass, tail)
    found = gain(log_q, log_p, rewards, alpha, mass, tail)
    value = dual_objective(at, rewards, alpha, mass, tail, np.exp(log_p))
    assert found == pytest.approx(value, rel=1e-9)
    assert found > gain(log_p, log_p, rewards, alpha, mass, tail)
    plain = expected_reward_tilt(log_p, rewards, alpha)
    assert found > gain(plain, log_p, rewards, alpha, mass, tail)


def test_hinges_bend_at_the_threshold():
    rewards = np.array([-1.0, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(hinge(rewards, 0.5, 0.25, "upper"), [0, 0, 0, 6])
    np.testing.assert_allclose(hinge(rewards, 0.5, 0.25, "lower"), [-6, -2, 0, 0])


# --- FDC's distributions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4.0, 20.0])
@pytest.mark.parametrize(("alpha", "mass"), [(0.5, 0.3), (3.0, 0.05)])
def test_mirror_ascent_on_the_lower_tail_never_falls_with_a_valid_step(ratio, alpha, mass):
    """The lower tail mean is convex in the distribution: steps of weight at least alpha never lower it."""
    log_p, rewards = planar_distribution("lower", cells=80)
    rewards = rewards / 20
    distributions = [log_p, *mirror_ascent(log_p, rewards, alpha, ratio * alpha, mass, "lower", 12)]
    values = [gain(distribution, log_p, rewards, alpha, mass, "lower") for distribution in distributions]
    assert np.all(np.diff(values) >= -1e-12)
    assert values[1] > values[0]
    # And no iterate passes the optimum.
    best_distribution, _ = tail_tilt(log_p, rewards, alpha, mass, "lower")
    assert values[-1] <= gain(best_distribution, log_p, rewards, alpha, mass, "lower") + 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_mirror_ascent_on_the_lower_tail_never_falls_on_random_distributions(seed):
    log_p, rewards = small_distribution(seed, n=12)
    rng = np.random.default_rng(seed)
    alpha, mass = 10 ** rng.uniform(-1, 1), rng.uniform(0.02, 0.9)
    step_weight = alpha * 10 ** rng.uniform(0, 1)
    distributions = [log_p, *mirror_ascent(log_p, rewards, alpha, step_weight, mass, "lower", 20)]
    values = [gain(distribution, log_p, rewards, alpha, mass, "lower") for distribution in distributions]
    assert np.all(np.diff(values) >= -1e-12)


def test_mirror_ascent_on_the_upper_tail_rises_with_small_enough_steps_only():
    """The upper tail mean is concave, so its own curvature bounds the step: alpha is not enough."""
    grid = Grid(extent=5.0, cells=160)
    log_p = normalise(-0.5 * (grid.points**2).sum(-1))
    rewards = grid.points[..., 0] + 0.31 * grid.points[..., 1]
    alpha, mass = 0.5, 0.2
    values = {}
    for ratio in (1, 50):
        distributions = [log_p, *mirror_ascent(log_p, rewards, alpha, ratio * alpha, mass, "upper", 40)]
        values[ratio] = np.array(
            [gain(distribution, log_p, rewards, alpha, mass, "upper") for distribution in distributions]
        )
    assert np.all(np.diff(values[50]) > 0)
    assert np.diff(values[1]).min() < -1


def test_mirror_ascent_on_the_upper_tail_ends_at_the_optimum():
    alpha, mass = 3.0, 0.1
    log_p, rewards = planar_distribution("upper", cells=80)
    rewards = rewards / 10
    distributions = [log_p, *mirror_ascent(log_p, rewards, alpha, 100 * alpha, mass, "upper", 200)]
    values = np.array(
        [gain(distribution, log_p, rewards, alpha, mass, "upper") for distribution in distributions]
    )
    best_distribution, _ = tail_tilt(log_p, rewards, alpha, mass, "upper")
    optimum = gain(best_distribution, log_p, rewards, alpha, mass, "upper")
    assert values.max() <= optimum + 1e-12
    assert values[-1] == pytest.approx(optimum, rel=1e-3)
    # The quantile jumps between cells of one reward, so the ascent ends in a ripple around the optimum.
    assert np.diff(values).min() > -1e-3 * optimum
    assert values[0] < 0.5 * optimum


def test_a_step_is_the_tilt_by_the_first_variation():
    """Written out for two steps of weight 2 alpha: the pull to the pretrained one enters the second."""
    log_p, rewards = small_distribution(3)
    alpha, weight, mass = 0.4, 0.8, 0.3
    first, second = mirror_ascent(log_p, rewards, alpha, weight, mass, "upper", 2)
    at = quantile(rewards, 1 - mass, np.exp(log_p))
    expected = normalise(log_p + np.maximum(rewards - at, 0) / mass / weight)
    np.testing.assert_allclose(first, expected, atol=1e-13)
    at = quantile(rewards, 1 - mass, np.exp(first))
    variation = np.maximum(rewards - at, 0) / mass - alpha * (first - log_p)
    np.testing.assert_allclose(second, normalise(first + variation / weight), atol=1e-13)


def test_blurring_hides_thin_spikes_from_the_mean_reward_but_not_from_the_tail():
    """Why a network's Adjoint Matching misses what its tail methods find: the two exponents, blurred."""
    log_p, rewards = planar_distribution("upper")
    grid = Grid(extent=5.0, cells=160)
    blur = gaussian_blur(0.4, grid)
    spikes = rewards > 150
    alpha, mass = 5.0, 0.01
    plain = expected_reward_tilt(log_p, rewards, alpha)
    blurred = expected_reward_tilt(log_p, rewards, alpha, blur)
    tail, _ = tail_tilt(log_p, rewards, alpha, mass, "upper", blur)
    shares = [float(np.exp(distribution)[spikes].sum()) for distribution in (log_p, plain, blurred, tail)]
    assert shares[0] < 0.02
    assert shares[1] > 0.9
    assert shares[2] < 0.1
    assert shares[3] > shares[2]


@tails
def test_extreme_weights_stay_finite(tail):
    log_p, rewards = planar_distribution(tail, cells=40)
    for weight in (1e-6, 1e9):
        distributions = [
            expected_reward_tilt(log_p, rewards, weight),
            tail_tilt(log_p, rewards, weight, 1e-6, tail)[0],
            *mirror_ascent(log_p, rewards, weight, weight, 0.01, tail, 3),
        ]
        for distribution in distributions:
            # Exponents of up to 1e10 are rounded at 1e-6.
            assert np.exp(distribution).sum() == pytest.approx(1, abs=1e-5)
            assert np.isfinite(kl_divergence(distribution, log_p))


# --- Modes -------------------------------------------------------------------------------------


def test_a_distribution_of_cells_and_modes_has_equal_modes_each_with_its_own_density():
    grid, random = Grid(3.0, 16), np.random.default_rng(0)
    log_density = random.normal(size=(3, 16, 16))
    distribution = finite_distribution(grid, log_density)
    assert distribution.modes is not None
    for k in range(3):
        own = distribution.modes == k
        np.testing.assert_array_equal(distribution.points[own].numpy(), grid.flat_points.numpy())
        expected = np.exp(log_density[k]) / np.exp(log_density[k]).sum() / 3
        np.testing.assert_allclose(distribution.p[own], expected.ravel(), rtol=1e-12)
    single = finite_distribution(grid, log_density[1])
    assert single.modes is None
    np.testing.assert_allclose(single.p, 3 * distribution.p[distribution.modes == 1], rtol=1e-12)
    np.testing.assert_array_equal(single.log_reference, single.log_p)


def test_a_density_given_the_mode_is_read_at_each_point_by_its_own():
    axis = np.linspace(-2, 2, 9)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    density = GriddedDensity(axis, np.stack([x + y**2, 3 * x - y]))  # cubic splines are exact
    points, modes = np.random.default_rng(0).uniform(-1.9, 1.9, (20, 2)), np.arange(20) % 2
    expected = np.where(modes == 0, points[:, 0] + points[:, 1] ** 2, 3 * points[:, 0] - points[:, 1])
    np.testing.assert_allclose(density.at(points, modes), expected, atol=1e-12)
    fine = np.linspace(-1.5, 1.5, 4)
    u, v = np.meshgrid(fine, fine, indexing="ij")
    np.testing.assert_allclose(density.on(fine), np.stack([u + v**2, 3 * u - v]), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_by_brute_force(n):
    """Over all draws of n cells, with rewards that tie: of those the first drawn is kept."""
    log_p, rewards = small_distribution(3)
    rewards[0, 1], rewards[1, 2] = rewards[0, 0], rewards[1, 1]
    p, r = np.exp(log_p).ravel(), rewards.ravel()
    expected = np.zeros(len(p))
    for draw in itertools.product(range(len(p)), repeat=n):
        chosen = max(draw, key=lambda cell: r[cell])  # the first of those that tie
        expected[chosen] += np.prod(p[list(draw)])
    found = np.exp(best_of_tilt(log_p, rewards, n))
    assert found.shape == log_p.shape
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-12)


@pytest.mark.parametrize("n", [4, 64, 4096])
def test_the_best_of_n_on_a_grid_is_as_far_away_as_for_a_continuous_reward(n):
    log_p, rewards = planar_distribution("upper")
    level = Grid(extent=5.0, cells=160).points @ np.array([1.0, 0.37])  # hardly a tie
    for values in (level, -level):
        far = kl_divergence(best_of_tilt(log_p, values, n), log_p)
        assert far == pytest.approx(np.log(n) - (n - 1) / n, rel=0.02)
    assert np.isfinite(best_of_tilt(log_p, rewards, n)).all()
    assert kl_divergence(best_of_tilt(log_p, rewards, n), log_p) <= np.log(n) - (n - 1) / n
