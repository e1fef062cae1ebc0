import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize, minimize_scalar

from flowtilt.control import penalties as penalties_module
from flowtilt.control.penalties import PENALTIES, Penalty, penalty_named, solve_weights

# Every penalty as a source would print it, written out apart from the power family under test:
# f, its derivative, f* and the weight at a slope.
PRINTED = {
    "kl": (
        lambda w: w * math.log(w) - w + 1,
        lambda w: math.log(w),
        lambda s: math.exp(s) - 1,
        lambda s: math.exp(s),
    ),
    "pearson": (
        lambda w: (w - 1) ** 2 / 2,
        lambda w: w - 1,
        lambda s: (max(1 + s, 0) ** 2 - 1) / 2,
        lambda s: max(1 + s, 0),
    ),
    "cressie_read_3": (
        lambda w: (w**3 - 3 * w + 2) / 6,
        lambda w: (w**2 - 1) / 2,
        lambda s: (max(1 + 2 * s, 0) ** 1.5 - 1) / 3,
        lambda s: math.sqrt(max(1 + 2 * s, 0)),
    ),
    "reverse_kl": (
        lambda w: w - 1 - math.log(w),
        lambda w: 1 - 1 / w,
        lambda s: -math.log(1 - s),
        lambda s: 1 / (1 - s),
    ),
    "squared_hellinger": (
        lambda w: (math.sqrt(w) - 1) ** 2,
        lambda w: 1 - 1 / math.sqrt(w),
        lambda s: s / (1 - s),
        lambda s: 1 / (1 - s) ** 2,
    ),
}
BOUNDED = {"reverse_kl", "squared_hellinger"}
penalties = pytest.mark.parametrize("name", PENALTIES)


def bank(seed, size, spread=1.0):
    """Values, and probabilities that differ by a factor of up to twenty."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.05, 1, size)
    return spread * rng.normal(size=size), p / p.sum()


def objective(name, q, g, p, alpha):
    """The problem's value at a distribution, by the printed f."""
    f = PRINTED[name][0]
    return float(g @ q) - alpha * sum(pi * f(qi / pi) for qi, pi in zip(q, p, strict=True))


def dual(name, nu, g, p, alpha):
    """The dual's value, by the printed conjugate."""
    conjugate = PRINTED[name][2]
    return nu + alpha * sum(pi * conjugate((gi - nu) / alpha) for gi, pi in zip(g, p, strict=True))


def conjugate_of(penalty, slopes):
    """``f*`` as the dual's value takes it: at the logarithm of the weight."""
    log_w = penalties_module._log_weights(penalty.order, 0.0, -np.asarray(slopes) / penalty.curvature)
    return penalty.curvature * penalties_module._conjugate(penalty.order, log_w)


# --- The functions -----------------------------------------------------------------------------


@penalties
def test_f_its_conjugate_and_the_weight_are_the_printed_ones(name):
    f, _, conjugate, weight = PRINTED[name]
    penalty = PENALTIES[name]
    w = np.array([1e-6, 0.01, 0.3, 0.9, 1.0, 1.1, 4.0, 300.0])
    np.testing.assert_allclose(penalty.divergence(w), [f(x) for x in w], rtol=1e-12, atol=1e-15)
    s = np.array([-40.0, -3.0, -1.0, -0.6, -0.2, -1e-3, 0.0, 0.1, 0.4, 0.7, 0.99])
    np.testing.assert_allclose(conjugate_of(penalty, s), [conjugate(x) for x in s], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(penalty.weight(s), [weight(x) for x in s], rtol=1e-12, atol=1e-15)


@penalties
def test_f_is_normalised_at_one(name):
    """``f(1) = f'(1) = 0``; ``f''(1)`` is the penalty's curvature, by central differences."""
    penalty, h = PENALTIES[name], 1e-4
    below, at, above = penalty.divergence([1 - h, 1, 1 + h])
    assert at == 0
    # Third and fourth derivatives at 1 are of size one: errors of order h^2.
    assert (above - below) / (2 * h) == pytest.approx(0, abs=1e-7)
    assert (above + below) / h**2 == pytest.approx(penalty.curvature, rel=1e-6)
    assert penalty.curvature == (0.5 if name == "squared_hellinger" else 1)


@penalties
@pytest.mark.parametrize("s", [-5.0, -0.9, -0.3, 0.0, 0.2, 0.8])
def test_the_conjugate_is_the_largest_of_w_s_minus_f(name, s):
    """Searched numerically, which leaves the square of the search's own error."""
    penalty = PENALTIES[name]
    found = minimize_scalar(
        lambda w: float(penalty.divergence(w)) - w * s,
        bounds=(0, 60),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert float(conjugate_of(penalty, s)) == pytest.approx(-found.fun, abs=1e-7)
    assert float(penalty.weight(s)) == pytest.approx(found.x, abs=1e-5)


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_outside_the_domain_weight_and_conjugate_are_infinite(name):
    assert np.isinf(PENALTIES[name].weight([1.0, 3.0])).all()
    assert np.isinf(conjugate_of(PENALTIES[name], [1.0, 3.0])).all()


@pytest.mark.parametrize(
    ("name", "at_zero"),
    [
        ("kl", 1),
        ("pearson", 1 / 2),
        ("cressie_read_3", 1 / 3),
        ("reverse_kl", np.inf),
        ("squared_hellinger", 1),
    ],
)
def test_a_weight_of_zero_has_its_limit(name, at_zero):
    assert float(PENALTIES[name].divergence(0.0)) == pytest.approx(at_zero)


# --- Solving for the weights -------------------------------------------------------------------


@penalties
@pytest.mark.parametrize("alpha", [1e-200, 1e-9, 1e-3, 0.05, 0.7, 20.0, 1e9, 1e200])
@pytest.mark.parametrize("size", [1, 2, 7, 3000])
def test_weights_are_normalised_and_leave_no_gap(name, alpha, size):
    g, p = bank(0, size)
    found = solve_weights(g, alpha, PENALTIES[name], p)
    assert (found.weights >= 0).all()
    # Rounding of a sum of this many terms.
    assert float(p @ found.weights) == pytest.approx(1, abs=1e-13)
    np.testing.assert_allclose(found.probabilities, p * found.weights, rtol=1e-14)
    assert -1e-14 < found.relative_gap < 1e-13
    assert found.gap == pytest.approx(found.relative_gap * np.ptp(g), abs=1e-300)
    assert 1 - 1e-12 <= found.effective_sample_size <= size * (1 + 1e-12)


@penalties
@pytest.mark.parametrize("alpha", [0.02, 0.3, 1.0, 8.0])
def test_primal_and_dual_are_those_of_the_printed_functions(name, alpha):
    g, p = bank(1, 40)
    found = solve_weights(g, alpha, PENALTIES[name], p)
    assert found.primal == pytest.approx(
        objective(name, np.maximum(found.probabilities, 1e-300), g, p, alpha)
    )
    # The dual is flat at nu, whose own rounding is felt by the slopes g / alpha.
    assert found.dual == pytest.approx(dual(name, found.nu, g, p, alpha), abs=1e-12)
    slopes = (g - found.nu) / alpha
    expected = [PRINTED[name][3](s) for s in slopes]
    np.testing.assert_allclose(found.weights, expected, rtol=1e-10, atol=1e-13)


@penalties
@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_general_convex_solver_does_not_do_better(name, alpha, seed):
    """Its result is normalised and the objective evaluated there: below the maximum by its error squared."""
    g, p = bank(seed, 6)
    f, slope = PRINTED[name][:2]

    def negative(q):
        return -float(g @ q) + alpha * sum(pi * f(qi / pi) for qi, pi in zip(q, p, strict=True))

    def gradient(q):
        return -g + alpha * np.array([slope(qi / pi) for qi, pi in zip(q, p, strict=True)])

    distribution, found = p, solve_weights(g, alpha, PENALTIES[name], p)
    for _ in range(10):  # started anew where it stopped: its model of the curvature can go stale on the way
        result = minimize(
            negative,
            distribution,
            jac=gradient,
            method="SLSQP",
            bounds=[(1e-9, 1)] * len(p),
            constraints=[{"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones_like(q)}],
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        distribution = np.maximum(result.x, 1e-9)
        distribution = distribution / distribution.sum()
    brute = objective(name, distribution, g, p, alpha)
    assert brute <= found.primal + 1e-12
    assert brute == pytest.approx(found.primal, abs=1e-7)


@given(
    values=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    alpha=st.floats(0.05, 1e3),
    name=st.sampled_from(sorted(PENALTIES)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_distribution_does_better_and_no_multiplier_bounds_tighter(values, alpha, name, seed):
    """Weak duality on both sides of the solution, at random distributions and random multipliers."""
    g, rng = np.array(values), np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(len(g))) + 1e-3
    p /= p.sum()
    found = solve_weights(g, alpha, PENALTIES[name], p)
    slack = 1e-12 * (1 + np.abs(g).max() + alpha)
    assert abs(found.gap) <= slack
    for mix in (1e-3, 0.1, 1.0):
        distribution = (1 - mix) * found.probabilities + mix * rng.dirichlet(np.ones(len(g)))
        assert objective(name, np.maximum(distribution, 1e-300), g, p, alpha) <= found.primal + slack
    for move in (-0.3, -1e-3, 1e-3, 0.3):
        nu = found.nu + move * alpha
        if name not in BOUNDED or g.max() - nu < alpha:
            assert dual(name, nu, g, p, alpha) >= found.dual - slack


@given(
    values=st.lists(st.floats(-3, 3), min_size=2, max_size=30),
    shift=st.floats(-1e3, 1e3),
    alpha=st.floats(0.05, 50),
    name=st.sampled_from(sorted(PENALTIES)),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_shift_and_a_change_of_units_of_the_values_change_no_weight(values, shift, alpha, name):
    g = np.array(values)
    found = solve_weights(g, alpha, PENALTIES[name])
    shifted = solve_weights(g + shift, alpha, PENALTIES[name])
    # Values that are shifted lose digits: 1e-13 of 1e3, felt over alpha and over the steepest weight.
    tolerance = 1e-9 * len(g)
    np.testing.assert_allclose(shifted.weights, found.weights, rtol=tolerance, atol=tolerance)
    assert shifted.nu - shift == pytest.approx(found.nu, abs=1e-8)
    assert shifted.primal - shift == pytest.approx(found.primal, abs=1e-10)
    scaled = solve_weights(8 * g, 8 * alpha, PENALTIES[name])
    np.testing.assert_allclose(scaled.weights, found.weights, rtol=1e-12, atol=1e-14)


def test_kl_weights_are_the_exponential_tilt():
    for alpha in (1e-3, 0.1, 1.0, 30.0):
        g, p = bank(3, 500, spread=5)
        found = solve_weights(g, alpha, PENALTIES["kl"], p)
        logs = g / alpha + np.log(p)
        top = logs.max()
        log_sum = top + math.log(np.exp(logs - top).sum())
        np.testing.assert_allclose(found.probabilities, np.exp(logs - log_sum), rtol=1e-10, atol=1e-300)
        assert found.nu == pytest.approx(alpha * log_sum, rel=1e-12)
        assert found.dual == pytest.approx(alpha * log_sum, rel=1e-12)
        assert found.effective_sample_size == pytest.approx(1 / np.sum(found.probabilities**2))


def test_pearson_weights_are_the_projection_found_by_sorting():
    """``(1 + s)_+``: an affine function of the values on the best m samples, by trying every m."""
    g, p = bank(4, 60)
    order = np.argsort(-g)
    for alpha in (0.01, 0.2, 1.0, 5.0):
        weights = np.zeros_like(g)
        for m in range(1, len(g) + 1):
            best = order[:m]
            nu = (p[best] @ g[best] - alpha * (1 - p[best].sum())) / p[best].sum()
            tried = 1 + (g - nu) / alpha
            if (tried[best] > 0).all() and (tried[order[m:]] <= 0).all():
                weights[best] = tried[best]
        found = solve_weights(g, alpha, PENALTIES["pearson"], p)
        np.testing.assert_allclose(found.weights, weights, rtol=1e-11, atol=1e-12)


@penalties
def test_an_independent_root_search_finds_the_same_multiplier(name):
    g, p = bank(5, 300)
    weight, alpha = PRINTED[name][3], 0.8

    def surplus(nu):
        return sum(pi * weight((gi - nu) / alpha) for gi, pi in zip(g, p, strict=True)) - 1

    low = g.max() - alpha + 1e-9 if name in BOUNDED else g.min() - alpha
    nu = brentq(surplus, low, g.max(), xtol=1e-14, rtol=1e-14)
    assert solve_weights(g, alpha, PENALTIES[name], p).nu == pytest.approx(nu, abs=1e-12)


@penalties
def test_under_a_large_penalty_weights_move_linearly_from_one(name):
    """``w - 1 = (g - E g) / (alpha f''(1))`` to first order; the rest falls with the square of alpha."""
    g, p = bank(6, 50)
    linear = (g - p @ g) / PENALTIES[name].curvature
    errors = []
    for alpha in (1e2, 1e3, 1e4):
        found = solve_weights(g, alpha, PENALTIES[name], p)
        errors.append(np.abs(found.weights - 1 - linear / alpha).max())
    if name == "pearson":  # linear throughout
        assert max(errors) < 1e-14
    else:
        assert np.log10(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
        assert np.log10(errors[1] / errors[2]) == pytest.approx(2, abs=0.1)
    far = solve_weights(g, 1e15, PENALTIES[name], p)
    np.testing.assert_allclose(far.weights, 1, atol=1e-13)
    assert far.primal == pytest.approx(p @ g, abs=1e-13)
    assert far.effective_sample_size == pytest.approx(1 / np.sum(p**2))


@penalties
def test_under_a_vanishing_penalty_all_weight_goes_to_the_best(name):
    g, p = bank(7, 30)
    g[[4, 9]] = g.max() + 0.1
    found = solve_weights(g, 1e-13, PENALTIES[name], p)
    expected = np.zeros(30)
    expected[[4, 9]] = p[[4, 9]] / p[[4, 9]].sum()
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-11)
    assert found.primal == pytest.approx(g.max(), abs=1e-9)


@penalties
def test_equal_values_are_not_weighted(name):
    found = solve_weights(np.full(9, -3.25), 0.7, PENALTIES[name])
    assert found.weights == pytest.approx(1, abs=1e-15)
    assert (found.nu, found.primal, found.dual, found.gap) == (-3.25, -3.25, -3.25, 0)
    assert found.effective_sample_size == pytest.approx(9)


@penalties
def test_samples_without_probability_do_not_count(name):
    g, p = bank(8, 20)
    padded = solve_weights(np.append(g, g.max() + 100), 0.5, PENALTIES[name], np.append(p, 0))
    plain = solve_weights(g, 0.5, PENALTIES[name], p)
    assert padded.weights[-1] == 0
    np.testing.assert_array_equal(padded.weights[:-1], plain.weights)
    # Twice a sample is a sample of twice the probability.
    twice = solve_weights(np.concatenate([g, g]), 0.5, PENALTIES[name], np.concatenate([p, p]))
    np.testing.assert_allclose(twice.weights[:20], plain.weights, rtol=1e-12)


@penalties
def test_the_curvature_is_a_factor_of_alpha(name):
    g, p = bank(9, 40)
    order = PENALTIES[name].order
    halved = solve_weights(g, 2.0, Penalty(order, curvature=0.25), p)
    np.testing.assert_allclose(halved.weights, solve_weights(g, 0.5, Penalty(order), p).weights, rtol=1e-13)


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "alpha", "p", "message"),
    [
        ([], 1.0, None, "at least one sample"),
        ([0.0, np.nan, np.inf], 1.0, None, "2 of 3 are not"),
        ([0.0, 1.0], 0.0, None, "positive and finite, got 0.0"),
        ([0.0, 1.0], np.nan, None, "positive and finite, got nan"),
        ([0.0, 1.0], np.inf, None, "positive and finite, got inf"),
        ([0.0, 1.0], 1.0, [1.0], "2 values and 1 probabilities"),
        ([0.0, 1.0], 1.0, [1.0, -1.0], "must not be negative"),
        ([0.0, 1.0], 1.0, [0.0, 0.0], "must be positive"),
        ([-1e308, 1e308], 1.0, None, "too far apart"),
    ],
)
def test_what_cannot_be_solved_is_refused(values, alpha, p, message):
    with pytest.raises(ValueError, match=message):
        solve_weights(values, alpha, PENALTIES["kl"], p)


def test_an_unknown_penalty_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown penalty 'chi2'; there are kl, pearson, cressie_read_3"):
        penalty_named("chi2")
