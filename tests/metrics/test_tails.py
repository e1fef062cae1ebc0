from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from flowtilt.metrics.tails import lower_tail_mean, quantile, upper_tail_mean

TAIL_MEANS = {"lower": lower_tail_mean, "upper": upper_tail_mean}
tails = pytest.mark.parametrize("tail", TAIL_MEANS)


def fill_tail(values, weights, mass, tail):
    """Exact tail mean in rational arithmetic: sort, take weights from one end, the last one in part."""
    total = sum(weights)
    pairs = sorted(zip(values, weights, strict=True), reverse=tail == "upper")
    left, sum_ = Fraction(mass), Fraction(0)
    for value, weight in pairs:
        taken = min(left, Fraction(weight, total))
        sum_ += taken * Fraction(value)
        left -= taken
    return float(sum_ / Fraction(mass))


@st.composite
def samples(draw):
    """Values (with ties), integer weights, and a mass that often falls on a boundary between samples."""
    count = draw(st.integers(1, 40))
    value = st.one_of(st.integers(-5, 5).map(float), st.floats(-1e3, 1e3))
    values = draw(st.lists(value, min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count).filter(any))
    on_boundary = st.integers(1, sum(weights)).map(lambda k: k / sum(weights))
    mass = draw(st.one_of(st.floats(1e-6, 1.0), on_boundary))
    return values, weights, mass


@tails
@given(sample=samples())
def test_tail_means_against_exact_rational_sums(tail, sample):
    values, weights, mass = sample
    found = TAIL_MEANS[tail](values, mass, weights)
    # Cumulative weights are rounded at 1e-16; at the boundary that moves 1e-16 / mass of the tail.
    scale = max(1.0, np.ptp(values))
    assert found == pytest.approx(fill_tail(values, weights, mass, tail), abs=1e-14 * scale / mass, rel=1e-12)


@tails
@given(sample=samples())
def test_equal_weights_are_the_default_and_integer_weights_are_repetitions(tail, sample):
    values, weights, mass = sample
    repeated = np.repeat(values, weights)
    tolerance = 1e-14 * max(1.0, np.ptp(values)) / mass
    weighted = TAIL_MEANS[tail](values, mass, weights)
    assert TAIL_MEANS[tail](repeated, mass) == pytest.approx(weighted, abs=tolerance, rel=1e-12)


@given(sample=samples())
def test_the_lower_tail_mean_is_its_dual(sample):
    """``max_t t - E (t - r)_+ / mass``, attained at one of the values."""
    values, weights, mass = np.array(sample[0]), np.array(sample[1]), sample[2]
    p = weights / weights.sum()
    dual = max(t - p @ np.maximum(t - values, 0) / mass for t in values)
    tolerance = 1e-14 * max(1.0, np.ptp(values)) / mass
    assert lower_tail_mean(values, mass, weights) == pytest.approx(dual, abs=tolerance, rel=1e-12)


@given(sample=samples())
def test_the_two_tails_share_the_mean(sample):
    values, weights, mass = sample
    if mass == 1:
        parts = lower_tail_mean(values, 1, weights)
        assert parts == pytest.approx(upper_tail_mean(values, 1, weights), rel=1e-12, abs=1e-10)
    else:
        parts = mass * lower_tail_mean(values, mass, weights)
        parts += (1 - mass) * upper_tail_mean(values, 1 - mass, weights)
    assert parts == pytest.approx(np.average(values, weights=weights), rel=1e-12, abs=1e-10)


@given(sample=samples())
def test_the_quantile_is_the_smallest_value_that_reaches_the_level(sample):
    values, weights, level = sample
    p = np.array([Fraction(w, sum(weights)) for w in weights])
    values = np.array(values)
    # Levels and cumulative weights are floats: a level counts as reached within 1e-12 of it.
    reached = [v for v in values if sum(p[values <= v]) >= Fraction(level) * Fraction(1 - 1e-12)]
    assert quantile(values, level, weights) == min(reached)


def test_a_boundary_sample_counts_with_the_part_that_fits():
    assert lower_tail_mean([1.0, 2.0, 4.0, 8.0], 0.375) == pytest.approx((0.25 * 1 + 0.125 * 2) / 0.375)
    assert upper_tail_mean([1.0, 2.0, 4.0, 8.0], 0.375) == pytest.approx((0.25 * 8 + 0.125 * 4) / 0.375)
    assert lower_tail_mean([3.0, -1.0], 1e-300) == -1.0
    assert upper_tail_mean([3e-150, -1.0], 1e-300) == 3e-150


def test_quantiles_on_a_boundary_are_the_lower_value():
    values = [4.0, 1.0, 3.0, 2.0]
    assert [quantile(values, level) for level in (0.1, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0)] == [
        1.0,
        1.0,
        2.0,
        2.0,
        3.0,
        4.0,
        4.0,
    ]
    # 0.1 + 0.2 > 0.3 in floating point: the level must still be reached by the third tenth.
    assert quantile(np.arange(10.0), 0.1 + 0.2) == 2.0
    assert quantile([5.0, 7.0], 1e-12, [0.0, 1.0]) == 7.0


@tails
@pytest.mark.parametrize("mass", [0.01, 0.3, 0.9])
def test_tail_means_of_a_gridded_normal_density(tail, mass):
    """``E[Z | Z < q] = -phi(q) / mass``, on a grid as the exact rows use it."""
    x = np.linspace(-9, 9, 20_001)
    found = TAIL_MEANS[tail](x, mass, norm.pdf(x))
    exact = norm.pdf(norm.ppf(mass)) / mass
    # The trapezoidal rule is exact here; the boundary cell is off by part of a spacing of 9e-4, times its
    # own share of the tail.
    assert (found if tail == "upper" else -found) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("function", [*TAIL_MEANS.values(), quantile])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0.0), r"must lie in \(0, 1\]"),
        (([1.0], 1.5), r"must lie in \(0, 1\]"),
        (([1.0], float("nan")), r"must lie in \(0, 1\]"),
        (([], 0.5), "at least one value"),
        (([1.0, float("nan")], 0.5), "1 are not"),
        (([1.0, 2.0], 0.5, [1.0]), "2 values and 1 weights"),
        (([1.0, 2.0], 0.5, [1.0, -1.0]), "not be negative"),
        (([1.0, 2.0], 0.5, [0.0, 0.0]), "sum must be positive"),
        (([1.0, 2.0], 0.5, [1.0, float("inf")]), "sum must be positive"),
    ],
)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
