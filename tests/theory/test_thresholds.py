"""The study of thresholds: slopes, descents, convexity, and bounds of shifts."""

from __future__ import annotations

import numpy as np
import pytest

from flowtilt.pipeline.theory.config import BatchConfig, ShiftConfig
from flowtilt.pipeline.theory.thresholds import (
    ShiftBounds,
    _shift_row,
    batch_errors,
    convexity,
    descend,
    descents,
    error_rows,
    error_slope,
    fit_row,
    rate_function,
    shifts,
    weighted_slope,
    worst_threshold,
)
from flowtilt.theory.reward_distributions import RewardDistribution, TailDual

GAUSSIAN = RewardDistribution((1.0,), (0.0,), (1.0,))
CLIPPED = RewardDistribution((1.0,), (0.0,), (1.0,), -4.0, 4.0)
TAILS = ("lower", "upper")


def duals(distribution, alpha=10.0, mass=0.1):
    return {tail: TailDual(distribution, alpha, mass, tail) for tail in TAILS}


# --------------------------------------------------------------------------- errors of batches


@pytest.fixture(scope="module")
def gaussian_errors():
    config = BatchConfig(sizes=[300, 1000, 3000, 10_000], rewards=10**6, fewest=100, most=150, fit_from=300)
    return config, batch_errors("gaussian", duals(GAUSSIAN), config)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.slow_after(1)
def test_errors_fall_as_the_square_root_of_the_batch(gaussian_errors, tail):
    config, errors = gaussian_errors
    dual = duals(GAUSSIAN)[tail]
    fit = fit_row("gaussian", dual, errors[tail], config.fit_from)
    # The log of a root mean square of n normal errors has the standard deviation 1 / sqrt(2 n).
    x = np.repeat(np.log(config.sizes), [config.replicates(size) for size in config.sizes])
    deviation = 1 / np.sqrt(2 * ((x - x.mean()) ** 2).sum())
    assert deviation < 0.03
    # Estimated from fourth powers, of which 500 are known to a fifth.
    assert fit["slope_error"] == pytest.approx(deviation, rel=0.3)
    assert fit["slope"] == pytest.approx(-0.5, abs=3 * deviation)
    assert fit["kind"] == "regular"
    # The mean of n squared normal errors is known to sqrt(2 / n), its root to half of that.
    assert fit["over_limit"] == pytest.approx(1.0, abs=3 / np.sqrt(2 * x.size))
    for row in error_rows("gaussian", dual, errors[tail]):
        assert row["error_10pct"] < row["error_median"] < row["error_90pct"]
        # The median of n half-normal errors is known to 1.17 / sqrt(n) of itself.
        assert row["error_median"] == pytest.approx(row["limit_median"], rel=3 * 1.17 / 10)


def test_a_kink_is_hit_exactly_and_has_no_slope():
    distribution = RewardDistribution((0.95, 0.05), (0.0, 1.0), (0.0, 0.0))
    config = BatchConfig(sizes=[100, 1000, 3000], rewards=10_000, fewest=10, most=50, fit_from=100)
    pair = duals(distribution)
    errors = batch_errors("two_level", pair, config)["lower"]
    fit = fit_row("two_level", pair["lower"], errors, config.fit_from)
    assert fit["kind"] == "kink"
    assert fit["slope"] is None
    assert fit["over_limit"] is None
    assert all((values < 1e-12).all() for values in errors.values())


def test_without_effective_samples_the_errors_do_not_fall_as_they_should():
    dual = TailDual(GAUSSIAN, 2.0, 0.1, "upper")
    config = BatchConfig(sizes=[300, 1000, 3000, 10_000], rewards=10**6, fewest=50, most=100, fit_from=300)
    fit = fit_row("small_alpha", dual, batch_errors("small_alpha", {"upper": dual}, config)["upper"], 300)
    assert fit["effective_samples"] < 1
    assert fit["over_limit"] < 0.1  # nor are they of the size that the delta method claims
    assert fit["slope"] > -0.35


def test_slopes_and_their_standard_errors():
    x = np.arange(6.0)
    assert weighted_slope(x, 2 - 0.5 * x, np.array([1.0, 2, 4, 4, 2, 1])) == pytest.approx(-0.5, abs=1e-14)
    rng = np.random.default_rng(0)
    sizes = {100: 320, 1000: 160, 10_000: 80}
    found = [
        error_slope({n: np.abs(rng.normal(size=count)) / np.sqrt(n) for n, count in sizes.items()})
        for _ in range(2000)
    ]
    slopes, errors = np.array(found).T
    # The mean slope is known to 0.0004; the fewest batches have a log root mean square that is low by
    # 1 / (2 x 80) on average, which tilts the line by 0.0014.
    assert slopes.mean() == pytest.approx(-0.5, abs=0.0026)
    # The slopes' deviation is known to 1.6 %, and the standard error is one of first order in 1 / 80.
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(slopes.std(), rel=0.05)


# --------------------------------------------------------------------------- descent, convexity


def test_descent_of_a_parabola():
    np.testing.assert_allclose(descend(lambda t: 2 * (t - 1), 0.0, 0.25, 4), 1 - 0.5 ** np.arange(5))


def test_gradient_descent_reaches_the_exact_threshold_at_its_rate():
    paths, rates = descents("gaussian", duals(GAUSSIAN)["upper"], 2000, 200)
    found = {row["descent"]: row for row in rates}
    distribution, batch, normalised = (
        found[kind] for kind in ("fixed step, distribution", "fixed step, batch", "normalised, batch")
    )
    assert distribution["final_error"] < 1e-13
    assert distribution["rate"] == pytest.approx(distribution["expected_rate"], abs=1e-3)
    assert batch["minimum"] == "smooth"
    assert batch["final_error"] < 1e-13
    assert batch["rate"] == pytest.approx(batch["expected_rate"], abs=1e-3)
    assert normalised["final_error"] < 1e-8
    errors = [
        row["error"] for row in paths if row["descent"] == "fixed step, distribution" and row["error"] > 1e-13
    ]
    assert (np.diff(errors) < 0).all()  # with a step below one over the curvature


@pytest.mark.parametrize("tail", TAILS)
def test_convex_on_the_right_and_between_rewards_on_the_left(tail):
    distribution, batch = convexity("gaussian", duals(GAUSSIAN)[tail], 1000)
    if tail == "upper":
        assert distribution["convex_share"] == batch["convex_share"] == 1.0
        assert distribution["largest"] > 1  # and not only by being flat
    else:
        assert batch["where"] == "batch, between rewards"
        assert batch["smallest"] > batch["rounding"]
        assert batch["concave_share"] == 0.0
        assert distribution["smallest"] < -1  # although the distribution's own dual is concave at its maximum


# --------------------------------------------------------------------------- shifts


@pytest.fixture(scope="module")
def shift_rows():
    return shifts(ShiftConfig(clip=4.0, alpha=10.0, mass=0.1, deltas=[0.003, 0.03, 0.3]))


def test_every_shift_is_within_its_bounds(shift_rows):
    assert len(shift_rows) == 3 * (2 + 4)
    for row in shift_rows:
        assert row["verdict"] == "holds", row
        assert abs(row["shift"]) <= row["sharp_bound"] * (1 + 1e-6)
        assert row["sharp_bound"] <= row["pinsker_bound"]
        linear = row["strong_convexity_bound"]
        assert linear is None or row["pinsker_bound"] <= linear * (1 + 1e-9)
        if row["batch"].startswith("mean") and row["delta"] < 0.1:
            # Clipping at 4 aside, the threshold moves with the rewards.
            assert abs(row["shift"]) == pytest.approx(row["delta"], rel=2e-3)


def test_the_sharp_bound_is_attained(shift_rows):
    worst = [row for row in shift_rows if row["batch"].startswith("worst")]
    assert len(worst) == 6
    for row in worst:
        assert abs(row["shift"]) == pytest.approx(row["sharp_bound"], rel=1e-6)
        assert row["kl"] == pytest.approx(0.5 * row["delta"] ** 2, rel=1e-6)


def test_small_shifts_have_the_bound_of_the_delta_method():
    """For small KL the sharp bound is sqrt(2 KL) times the estimates' limiting deviation."""
    for tail in TAILS:
        dual = TailDual(CLIPPED, 10.0, 0.1, tail)
        low, high = ShiftBounds(dual, 1e-10).sharp()
        expected = np.sqrt(2e-10) * dual.deviation()
        assert high - dual.optimum == pytest.approx(expected, rel=1e-3)
        assert dual.optimum - low == pytest.approx(expected, rel=1e-3)


def test_rate_function_of_two_atoms_is_a_binary_divergence():
    """Two atoms leave one distribution with a stationary point at t."""
    distribution = RewardDistribution((0.8, 0.2), (0.0, 1.0), (0.0, 0.0), -5.0, 5.0)
    dual = TailDual(distribution, 10.0, 0.1, "upper")
    for t in (0.2, 0.5, 0.9):
        beyond = 0.9 * np.exp(1 - t)
        share = 0.1 / (0.1 + beyond)
        kl = share * np.log(share / 0.2) + (1 - share) * np.log((1 - share) / 0.8)
        assert rate_function(dual, t)[0] == pytest.approx(kl, rel=1e-10)


def test_worst_distribution_has_its_threshold_where_it_should():
    dual = TailDual(CLIPPED, 10.0, 0.1, "upper")
    for at in (dual.optimum - 0.3, dual.optimum + 0.3):
        found, kl = worst_threshold(dual, at)
        assert found == pytest.approx(at, abs=1e-9)
        assert kl == pytest.approx(rate_function(dual, at)[0], rel=1e-9)


def test_unbounded_rewards_have_no_bound():
    with pytest.raises(ValueError, match="clip them"):
        ShiftBounds(TailDual(GAUSSIAN, 10.0, 0.1, "upper"), 0.01)


def test_a_shift_beyond_a_bound_is_reported():
    bounds = ShiftBounds(TailDual(CLIPPED, 10.0, 0.1, "upper"), 1e-4)
    ends = (bounds.dual.optimum - 0.1, bounds.dual.optimum + 0.1)
    far = bounds.dual.optimum + 0.11
    row = _shift_row(bounds, "mean moved up", 0.01, 1e-4, far, ends, ends, None)
    assert row["verdict"] == "violated"
    near = bounds.dual.optimum + 0.09
    assert _shift_row(bounds, "mean moved up", 0.01, 1e-4, near, ends, ends, None)["verdict"] == "holds"
    assert _shift_row(bounds, "mean moved up", 0.01, 1e-4, near, ends, ends, 0.05)["verdict"] == "violated"
