import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import wasserstein_distance

from exact_transport import wasserstein1
from flowtilt.metrics import transport
from flowtilt.metrics.transport import (
    TransportError,
    check_metric,
    ground_distances,
    kantorovich,
    sliced_wasserstein,
)

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal([1.0, 0.5], size=(60, 2)), RANDOM.normal(size=(60, 2))
METRICS = [(1.0, 1.0), (1.0, 9.0), (4.0, 0.25)]
metrics = pytest.mark.parametrize("weights", METRICS, ids=str)


def distance(x, y, weights):
    return np.sqrt(sum(w * (a - b) ** 2 for w, a, b in zip(weights, x, y, strict=True)))


@metrics
def test_ground_distances_are_the_metric(weights):
    found = ground_distances(X, Y[:7], weights)
    expected = [[distance(x, y, weights) for y in Y[:7]] for x in X]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@metrics
def test_the_distance_of_equally_many_samples_is_an_assignment(weights):
    cost = ground_distances(X, Y, weights)
    rows, columns = linear_sum_assignment(cost)
    assert wasserstein1(X, Y, weights) == pytest.approx(cost[rows, columns].mean(), rel=1e-12)


@metrics
def test_a_shift_costs_its_length(weights):
    shift = np.array([0.7, -1.1])
    assert wasserstein1(X + shift, X, weights) == pytest.approx(distance(shift, (0, 0), weights), rel=1e-12)
    assert wasserstein1(X, X, weights) == pytest.approx(0, abs=1e-14)


def test_on_a_line_it_is_the_area_between_distribution_functions():
    x, y = X[:, :1], Y[:40, :1]
    assert wasserstein1(x, y) == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-12)
    assert wasserstein1(x, y, (4.0,)) == pytest.approx(2 * wasserstein1(x, y), rel=1e-12)


def test_any_shape_of_samples_is_flattened():
    assert wasserstein1(X[..., None], Y[..., None], (1, 9)) == wasserstein1(X, Y, (1, 9))


@metrics
def test_the_potential_is_optimal_in_the_dual(weights):
    points = X[:12]
    p, q = (RANDOM.dirichlet(np.ones(12)) for _ in range(2))
    p[3] = q[7] = 0
    p, q = p / p.sum(), q / q.sum()
    cost = ground_distances(points, points, weights)
    found = kantorovich(cost, p, q)
    # The dual by a general solver: max <f, p - q> with f_i - f_j <= d_ij.
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    constraints = np.array([np.eye(12)[i] - np.eye(12)[j] for i, j in pairs])
    limits = [cost[i, j] for i, j in pairs]
    dual = linprog(-(p - q), A_ub=constraints, b_ub=limits, bounds=[(0, 100)] * 12)
    assert found.value == pytest.approx(-dual.fun, rel=1e-9)
    assert found.potential @ (p - q) == pytest.approx(found.value, rel=1e-12)
    assert (found.potential[:, None] - found.potential - cost).max() <= 1e-12


def test_tiny_probabilities_are_dropped():
    p, q = np.array([0.5, 0.5, 1e-300]), np.array([1e-200, 0.5, 0.5])
    cost = ground_distances([[0.0], [1.0], [2.0]], [[0.0], [1.0], [2.0]])
    assert kantorovich(cost, p, q).value == pytest.approx(1.0, rel=1e-12)


def test_bad_input_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="2 weights and the samples have 3 coordinates"):
        wasserstein1(np.zeros((4, 3)), np.zeros((4, 3)), (1, 1))
    for weights in ((1.0, 0.0), (1.0, -2.0), (1.0, float("inf")), (float("nan"), 1.0), ()):
        with pytest.raises(ValueError, match="positive and finite"):
            check_metric(weights)
    with pytest.raises(TransportError, match="finite samples"):
        wasserstein1([[np.nan]], [[0.0]])
    with pytest.raises(TransportError, match="at least one sample"):
        wasserstein1(np.zeros((0, 2)), X)
    monkeypatch.setattr(transport, "LARGEST_PROBLEM", 3599)
    with pytest.raises(TransportError, match="60 to 60 samples has 3,600 pairs, more than 3,599"):
        wasserstein1(X, Y)


def test_an_unfinished_solution_is_an_error(monkeypatch):
    monkeypatch.setattr(transport, "LARGEST_COUNT_OF_PIVOTS", 3)
    with pytest.warns(UserWarning, match="numItermax"), pytest.raises(TransportError, match="did not finish"):
        wasserstein1(X, Y)


@pytest.mark.slow
def test_it_stays_clear_of_torch():
    code = (
        "import sys, os, numpy; from flowtilt.metrics.transport import kantorovich; "
        "assert kantorovich(numpy.array([[2.0]]), numpy.ones(1), numpy.ones(1)).value == 2.0; "
        "assert 'POT_BACKEND_DISABLE_PYTORCH' not in os.environ; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------- slices


def test_the_sliced_distance_is_pot_s_on_the_same_directions():
    import ot

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(37, 2)), rng.normal(1.0, 2.0, size=(53, 2))
    p, q = rng.dirichlet(np.ones(37)), rng.dirichlet(np.ones(53))
    angles = np.pi * (np.arange(24) + 0.5) / 24
    projections = np.stack([np.cos(angles), np.sin(angles)])
    for weights in ((None, None), (p, q)):
        theirs = ot.sliced_wasserstein_distance(x, y, *weights, projections=projections)
        assert sliced_wasserstein(x, y, *weights, directions=24) == pytest.approx(theirs, rel=1e-9)


def test_the_sliced_distance_of_a_shifted_and_scaled_cloud_is_in_closed_form():
    """Of ``s x + m`` on a circle each slice has ``(theta m)^2 + (s - 1)^2 / 2``."""
    angles = 2 * np.pi * np.arange(720) / 720
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # E (theta x)^2 = 1/2
    for scale, shift in ((1.0, [0.3, -0.4]), (1.7, [0.0, 0.0]), (1.7, [0.3, -0.4])):
        expected = 0.5 * (np.sum(np.square(shift)) + (scale - 1) ** 2)
        assert sliced_wasserstein(x, scale * x + shift) ** 2 == pytest.approx(expected, rel=1e-4)
    assert sliced_wasserstein(x, np.repeat(x, 2, axis=0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("points", "weights", "words"),
    [
        (np.zeros((0, 2)), None, "at least one"),
        (np.zeros((3, 3)), None, "finite points"),
        (np.full((3, 2), np.nan), None, "finite points"),
        (np.zeros((3, 2)), [0.5, 0.5], "one probability a point"),
        (np.zeros((2, 2)), [0.5, 0.6], "of sum 1"),
    ],
)
def test_no_sliced_distance_of_what_is_no_distribution(points, weights, words):
    with pytest.raises(TransportError, match=words):
        sliced_wasserstein(points, np.zeros((1, 2)), weights)
