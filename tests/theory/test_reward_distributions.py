"""Known distributions of rewards: closed forms against quadrature, sampling, and the exact thresholds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ndtri
from scipy.stats import norm

from flowtilt.theory.reward_distributions import RewardDistribution, TailDual
from flowtilt.thresholds import threshold

GAUSSIAN = RewardDistribution((1.0,), (0.0,), (1.0,))
SKEWED = RewardDistribution((0.7, 0.2, 0.1), (0.0, 1.0, 2.5), (0.5, 0.8, 1.2))
TWO_LEVEL = RewardDistribution((0.95, 0.05), (0.0, 1.0), (0.0, 0.0))
CLIPPED = RewardDistribution((0.6, 0.4), (0.0, 1.0), (1.0, 0.7), -1.5, 2.0)
TAILS = ("lower", "upper")


def integral(distribution, function, low, high):
    """``E[function(r); low < r < high]`` of the part with a density, by adaptive quadrature."""
    total = sum(distribution.weights)

    def density(r):
        parts = zip(distribution.weights, distribution.means, distribution.deviations, strict=True)
        return sum(w / total * norm.pdf(r, m, d) for w, m, d in parts)

    return quad(lambda r: density(r) * function(r), low, high, epsabs=1e-13, limit=200)[0]


@pytest.mark.parametrize("t", [-1.2, 0.3, 1.7])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_tilted_and_flat_mass_against_quadrature(t, scale):
    for distribution in (GAUSSIAN, SKEWED):
        up = integral(distribution, lambda r: np.exp((r - t) / scale), t, 30)
        assert distribution.active(t, scale, "upper") == pytest.approx(up, rel=1e-10)
        down = integral(distribution, lambda r: np.exp((r - t) / scale), -30, t)
        assert distribution.active(t, scale, "lower") == pytest.approx(down, rel=1e-10)
        assert distribution.idle(t, "upper") == pytest.approx(
            integral(distribution, lambda r: 1.0, -30, t), abs=1e-11
        )
        assert distribution.idle(t, "lower") == pytest.approx(
            integral(distribution, lambda r: 1.0, t, 30), abs=1e-11
        )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("t", [-2.0, -1.2, 0.3, 1.7, 2.5])
def test_clipped_distributions_have_atoms_at_their_ends(tail, t):
    """Against the clipped rewards' own expectation; thresholds beyond the ends included."""

    def weight(r):
        r = np.clip(r, CLIPPED.low, CLIPPED.high)
        beyond = r > t if tail == "upper" else r < t
        return np.exp((r - t) / 0.8) if beyond else 0.0

    pieces = sorted({-12.0, -1.5, min(max(t, -12.0), 13.0), 2.0, 13.0})
    expected = sum(integral(CLIPPED, weight, a, b) for a, b in pairwise(pieces))
    assert CLIPPED.active(t, 0.8, tail) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("distribution", [GAUSSIAN, SKEWED, CLIPPED, TWO_LEVEL])
@pytest.mark.parametrize("tail", TAILS)
def test_quadrature_gives_the_closed_forms(distribution, tail):
    dual = TailDual(distribution, alpha=6.0, mass=0.15, tail=tail)
    for t in (-0.7, 0.4, 1.3):
        phi, weights = dual.influence(t)
        active, idle = dual.parts(t)
        assert weights.sum() == pytest.approx(1.0, abs=1e-11)
        assert weights @ phi == pytest.approx(0.85 * active - 0.15 * idle, abs=1e-11)


@pytest.mark.parametrize("distribution", [GAUSSIAN, SKEWED, CLIPPED])
@pytest.mark.parametrize("tail", TAILS)
def test_slope_and_curvature_are_derivatives_of_the_dual(distribution, tail):
    dual = TailDual(distribution, alpha=3.0, mass=0.2, tail=tail)
    for t in (-0.8, 0.2, 1.1):
        h = 1e-5
        slope = (dual.value(t + h) - dual.value(t - h)) / (2 * h)
        assert dual.slope(t) == pytest.approx(slope, abs=1e-8)
        curvature = (dual.slope(t + h) - dual.slope(t - h)) / (2 * h)
        assert dual.curvature(t) == pytest.approx(curvature, abs=1e-7)
        assert dual.tail == "lower" or 0 <= dual.curvature(t) <= dual.largest_curvature()


@pytest.mark.parametrize("tail", TAILS)
def test_exact_threshold_is_that_of_the_quantiles(tail):
    """The package's threshold of 200,000 equally likely Gaussian quantiles."""
    rewards = ndtri((np.arange(200_000) + 0.5) / 200_000)
    dual = TailDual(GAUSSIAN, 10.0, 0.1, tail)
    # Neighbouring quantiles around the threshold are 3e-5 apart; the outermost are cut off at 4.6
    # standard deviations, which takes 1e-5 of the tilted mass on the right.
    assert threshold(rewards, 10.0, 0.1, tail) == pytest.approx(dual.optimum, abs=5e-5)
    assert abs(dual.slope(dual.optimum)) < 1e-12
    assert dual.regular


def test_two_level_thresholds_in_closed_form():
    upper = TailDual(TWO_LEVEL, 10.0, 0.1, "upper")
    assert upper.optimum == pytest.approx(1 - np.log(0.1 / 0.9 * 0.95 / 0.05), abs=1e-12)
    assert upper.regular
    lower = TailDual(TWO_LEVEL, 10.0, 0.1, "lower")
    assert lower.optimum == pytest.approx(threshold([0, 1], 10.0, 0.1, "lower", [0.95, 0.05]), abs=1e-12)
    assert not lower.regular
    assert lower.deviation() == 0.0


@pytest.mark.parametrize("tail", TAILS)
def test_limit_of_the_estimates_deviation(tail):
    dual = TailDual(GAUSSIAN, 10.0, 0.1, tail)
    rng = np.random.default_rng(5)
    batches = [rng.normal(size=4000) for _ in range(300)]
    errors = [threshold(batch, 10.0, 0.1, tail) - dual.optimum for batch in batches]
    # A standard deviation from 300 batches is known to 1 / sqrt(600) = 4 %; three of these.
    assert np.std(errors) * np.sqrt(4000) == pytest.approx(dual.deviation(), rel=0.12)


def test_samples_have_the_distributions_moments_and_atoms_come_as_counts():
    rng = np.random.default_rng(0)
    values, counts = SKEWED.sample(100_000, rng)
    assert values.size == 100_000
    assert (counts == 1).all()
    # The distribution's standard deviation is 1.02, so that a mean of 100,000 is known to 0.0032.
    assert values.mean() == pytest.approx(SKEWED.mean, abs=4 * 0.0033)
    values, counts = TWO_LEVEL.sample(10_000, rng)
    assert sorted(values) == [0.0, 1.0]
    assert counts.sum() == 10_000
