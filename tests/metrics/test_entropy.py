import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from flowtilt.metrics.entropy import histogram_entropy, likelihood_entropy


def test_likelihood_entropy_of_a_gaussian_is_its_closed_form():
    """The log-density of N(0, s^2 I) in the plane has the standard deviation 1: five standard errors."""
    n, deviation = 20_000, 1.7
    x = deviation * np.random.default_rng(0).normal(size=(n, 2))
    log_density = -0.5 * (x**2).sum(1) / deviation**2 - math.log(2 * math.pi * deviation**2)
    exact = math.log(2 * math.pi * math.e * deviation**2)
    assert likelihood_entropy(log_density) == pytest.approx(exact, abs=5 / math.sqrt(n))


def test_histogram_entropy_counts_cells():
    """Equal counts in k cells give log k exactly, whatever the cells' size."""
    centres = np.stack(np.meshgrid([-1.5, -0.5, 0.5, 1.5], [-1.5, 1.5]), axis=-1).reshape(-1, 2)
    assert histogram_entropy(np.repeat(centres, 3, axis=0), extent=2.0, bins=4) == pytest.approx(math.log(8))


def test_histogram_entropy_of_a_gaussian_is_that_of_the_distribution_and_of_the_cells():
    """Less the Miller bias of (occupied cells - 1) / 2n; five standard errors of 1 / sqrt(n)."""
    n, extent, bins = 400_000, 5.0, 40
    x = np.random.default_rng(1).normal(size=(n, 2))
    found = histogram_entropy(x, extent, bins)
    edges = np.linspace(-extent, extent, bins + 1)
    occupied = np.count_nonzero(np.histogram2d(x[:, 0], x[:, 1], bins=[edges, edges])[0])
    cells = 2 * math.log(bins / (2 * extent))
    bias = (occupied - 1) / (2 * n)
    # Cells of h = 0.25 add the curvature term h^2 / 24 * 2 = 0.005 to the entropy of the cells' distribution.
    curvature = 2 * (2 * extent / bins) ** 2 / 24
    assert found == pytest.approx(
        math.log(2 * math.pi * math.e) + cells - bias + curvature, abs=5 / math.sqrt(n)
    )


def test_histogram_entropy_never_exceeds_the_log_of_the_samples():
    x = np.random.default_rng(2).uniform(-6, 6, size=(500, 2))
    assert 0.95 * math.log(500) < histogram_entropy(x, 6.0, 200) <= math.log(500)


def test_samples_off_the_square_are_left_out():
    inside = np.random.default_rng(3).uniform(-1, 1, size=(50, 2))
    both = np.concatenate([inside, [[7.0, 0.0], [0.0, -9.0]]])
    assert histogram_entropy(both, 1.0, 10) == histogram_entropy(inside, 1.0, 10)


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="none of 1 samples lies on the square of half side 1"):
        histogram_entropy([[2.0, 2.0]], 1.0, 4)
    with pytest.raises(ValueError, match="at least one log-density"):
        likelihood_entropy([])
    with pytest.raises(ValueError, match="finite log-densities; 1 are not"):
        likelihood_entropy([0.0, math.nan])


def test_histogram_entropy_of_the_official_example_by_its_estimator():
    """Ten parts of N(0, I) and one of N((3, 3), 0.09 I): 3,000 points in 200 x 200 cells give 7.56.

    The expectation is a sum over cells, whose counts are binomial.
    """
    generator, n = np.random.default_rng(3), 3000
    edges = np.linspace(-6, 6, 201)
    one = np.diff(norm.cdf(edges))
    two = np.diff(norm.cdf((edges - 3) / 0.3))
    cells = (10 * np.outer(one, one) + np.outer(two, two)) / 11
    counts = np.arange(1, 40)
    term = -(counts / n) * np.log(counts / n)
    expected = sum(float(binom.pmf(c, n, cells).sum()) * t for c, t in zip(counts, term, strict=True))
    found = []
    for _ in range(20):
        small = generator.random(n) < 1 / 11
        x = generator.normal(size=(n, 2))
        x[small] = 3 + 0.3 * x[small]
        found.append(histogram_entropy(x, 6.0, 200))
    assert np.mean(found) == pytest.approx(expected, abs=5 * np.std(found) / math.sqrt(20))
    assert expected == pytest.approx(7.56, abs=0.01)
