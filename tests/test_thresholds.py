import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp

from closed_forms import Quadratic
from flowtilt.metrics.tails import lower_tail_mean, quantile, upper_tail_mean
from flowtilt.tfft import TailProblem
from flowtilt.thresholds import active_share, descend_threshold, dual_objective, threshold
from primal import best, objective

TAILS = ("lower", "upper")


def dual(t, rewards, log_weights, alpha, mass, tail):
    """The dual objective at many thresholds ``t`` (m,), written down as the papers have it."""
    excess = rewards - np.atleast_1d(t)[:, None]
    cut = np.minimum(excess, 0) if tail == "lower" else np.maximum(excess, 0)
    return np.atleast_1d(t) + alpha * logsumexp(cut / (alpha * mass) + log_weights, axis=1)


def uniform(rewards):
    return np.full(len(rewards), -np.log(len(rewards)))


def brute_force_lower(rewards, log_weights, alpha, mass):
    """The largest dual value over all rewards, one by one."""
    values, inverse = np.unique(rewards, return_inverse=True)
    weights = np.bincount(inverse, np.exp(log_weights))
    best = -np.inf
    for t in np.array_split(values, len(values) // 200 + 1):
        cut = np.minimum(values - t[:, None], 0)
        best = max(best, (t + alpha * np.log(np.exp(cut / (alpha * mass)) @ weights)).max())
    return best


def upper_slope(t, rewards, log_weights, alpha, mass):
    logs = np.maximum(rewards - t, 0) / (alpha * mass) + log_weights
    return 1 - np.exp(logs - logsumexp(logs))[rewards > t].sum() / mass


def bisected_upper(rewards, log_weights, alpha, mass):
    """The point where the slope of the convex dual changes its sign, by bisection to the last bit."""
    low, high = float(rewards.min()), float(rewards.max())
    if upper_slope(low, rewards, log_weights, alpha, mass) >= 0:
        return low
    for _ in range(200):
        middle = 0.5 * (low + high)
        if upper_slope(middle, rewards, log_weights, alpha, mass) < 0:
            low = middle
        else:
            high = middle
    return high


def random_rewards(count, tied, seed=0):
    rewards = np.random.default_rng(seed).normal(size=count) * 3 - 1
    return np.round(rewards) if tied else rewards


sizes = pytest.mark.parametrize("count", [1, 2, 3, 10, 100, 1000, 10_000])
ties = pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
problems = pytest.mark.parametrize(("alpha", "mass"), [(0.05, 0.2), (1.0, 0.01), (1.0, 0.5), (20.0, 0.9)])


@sizes
@ties
@problems
def test_the_lower_threshold_is_the_best_of_all_rewards(count, tied, alpha, mass):
    rewards = random_rewards(count, tied)
    logs = uniform(rewards)
    found = threshold(rewards, alpha, mass, "lower")
    assert found in rewards
    value = dual(found, rewards, logs, alpha, mass, "lower")[0]
    assert value == pytest.approx(brute_force_lower(rewards, logs, alpha, mass), abs=1e-8)
    if count <= 1000:  # and nothing between or outside the rewards is better
        anywhere = np.linspace(rewards.min() - 1, rewards.max() + 1, 500)
        assert dual(anywhere, rewards, logs, alpha, mass, "lower").max() <= value + 1e-10


@sizes
@ties
@problems
def test_the_upper_threshold_minimises_the_convex_dual(count, tied, alpha, mass):
    rewards = random_rewards(count, tied)
    logs = uniform(rewards)
    found = threshold(rewards, alpha, mass, "upper")
    assert found == pytest.approx(bisected_upper(rewards, logs, alpha, mass), abs=1e-8)
    value = dual(found, rewards, logs, alpha, mass, "upper")[0]
    anywhere = np.linspace(rewards.min() - 1, rewards.max() + 1, 200)
    assert value <= dual(anywhere, rewards, logs, alpha, mass, "upper").min() + 1e-10


@st.composite
def weighted_problems(draw):
    """Rewards on a coarse lattice (so that many tie), integer weights, and a tail problem."""
    count = draw(st.integers(1, 30))
    rewards = draw(st.lists(st.integers(-20, 20), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count).filter(any))
    alpha = 10 ** draw(st.floats(-2, 2))
    mass = draw(st.floats(0.01, 0.99))
    return np.array(rewards) / 4, np.array(weights, dtype=float), alpha, mass


@given(weighted_problems())
def test_weighted_thresholds_against_brute_force(problem):
    rewards, weights, alpha, mass = problem
    kept = weights > 0
    r, logs = rewards[kept], np.log(weights[kept] / weights.sum())
    lower = dual(threshold(rewards, alpha, mass, "lower", weights), r, logs, alpha, mass, "lower")[0]
    assert lower == pytest.approx(brute_force_lower(r, logs, alpha, mass), abs=1e-8)
    upper = threshold(rewards, alpha, mass, "upper", weights)
    reference = bisected_upper(r, logs, alpha, mass)
    values = dual([upper, reference], r, logs, alpha, mass, "upper")
    assert values[0] == pytest.approx(values[1], abs=1e-8)


@given(weighted_problems(), st.sampled_from(TAILS))
def test_integer_weights_are_repeated_rewards(problem, tail):
    rewards, weights, alpha, mass = problem
    repeated = np.repeat(rewards, weights.astype(int))
    logs = uniform(repeated)
    thresholds = [threshold(rewards, alpha, mass, tail, weights), threshold(repeated, alpha, mass, tail)]
    values = dual(thresholds, repeated, logs, alpha, mass, tail)
    assert values[0] == pytest.approx(values[1], abs=1e-10)


@given(weighted_problems(), st.sampled_from(TAILS), st.floats(-6, 6))
def test_the_dual_objective_is_the_formula(problem, tail, t):
    rewards, weights, alpha, mass = problem
    kept = weights > 0
    logs = np.log(weights[kept] / weights.sum())
    expected = dual(t, rewards[kept], logs, alpha, mass, tail)[0]
    assert dual_objective(t, rewards, alpha, mass, tail, weights) == pytest.approx(expected, abs=1e-10)


@given(weighted_problems(), st.sampled_from(TAILS), st.floats(-50, 50), st.floats(0.1, 10))
def test_thresholds_move_with_the_rewards(problem, tail, shift, factor):
    """Shifting rewards shifts the threshold; scaling rewards and alpha scales it."""
    rewards, weights, alpha, mass = problem
    at = threshold(rewards, alpha, mass, tail, weights)
    moved = threshold(factor * rewards + shift, factor * alpha, mass, tail, weights)
    values = [
        dual_objective(t, factor * rewards + shift, factor * alpha, mass, tail, weights)
        for t in (factor * at + shift, moved)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-9)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("alpha", "mass"), [(0.3, 0.25), (1.0, 0.1), (3.0, 0.6)])
def test_the_dual_value_is_the_primal_optimum(tail, seed, alpha, mass):
    """The optimum over all distributions on seven points, found by a convex solver that knows no dual."""
    rng = np.random.default_rng(seed)
    rewards, p = rng.normal(size=7) * 2, rng.dirichlet(np.ones(7))
    at = threshold(rewards, alpha, mass, tail, p)
    value = dual_objective(at, rewards, alpha, mass, tail, p)
    # The solver's distribution falls short of the optimum by 1e-8 or so, and cannot exceed it.
    assert -1e-12 <= value - best(p, rewards, alpha, mass, tail) <= 1e-7
    hinge = TailProblem(tail, mass, alpha).pseudo_reward(Quadratic([1.0]), at)
    tilted = p * np.exp(hinge.of_rewards(rewards) / alpha)
    assert objective(tilted / tilted.sum(), p, rewards, alpha, mass, tail) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("alpha", "mass"), [(0.5, 0.3), (0.2, 0.05), (2.0, 0.7)])
def test_the_tilted_distribution_has_the_tail_mass_above_an_interior_upper_threshold(alpha, mass):
    rewards = random_rewards(500, tied=False)
    at = threshold(rewards, alpha, mass, "upper")
    tilted = np.exp(np.maximum(rewards - at, 0) / (alpha * mass))
    assert at not in rewards
    assert tilted[rewards > at].sum() / tilted.sum() == pytest.approx(mass, abs=1e-10)


def test_continuous_upper_threshold():
    """Uniform rewards on [0, 1]: the tilted mass above t is found from one integral."""
    alpha, mass, n = 0.2, 0.3, 400_000
    scale = alpha * mass

    def surplus(t):
        above = scale * np.expm1((1 - t) / scale)
        return above / (above + t) - mass

    rewards = (np.arange(n) + 0.5) / n
    # The midpoint rule is exact to 1 / n^2 but at the kink, where it is off by 1 / n.
    assert threshold(rewards, alpha, mass, "upper") == pytest.approx(brentq(surplus, 1e-3, 1), abs=2 / n)


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
@pytest.mark.parametrize(("alpha", "mass"), [(0.05, 0.2), (1.0, 0.01), (1.0, 0.5), (20.0, 0.9), (0.1, 0.002)])
@ties
def test_gradient_descent_reaches_the_exact_upper_threshold(count, tied, alpha, mass):
    rewards = random_rewards(count, tied)
    found, updates = descend_threshold(rewards, alpha, mass)
    assert found == pytest.approx(threshold(rewards, alpha, mass, "upper"), abs=1e-8)
    assert updates <= 200


extremes = pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-12, 1.0, 1e12, 1e300])
masses = pytest.mark.parametrize("mass", [1e-300, 1e-12, 0.1, 1 - 1e-12])


@extremes
@masses
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.filterwarnings("error")
def test_extreme_problems_stay_within_the_rewards(alpha, mass, tail, scale):
    rewards = scale * random_rewards(50, tied=False)
    at = threshold(rewards, alpha, mass, tail)
    assert rewards.min() <= at <= rewards.max()
    value = dual_objective(at, rewards, alpha, mass, tail)
    # A tilted tail mean less a divergence: between the pretrained tail mean and the largest reward.
    plain = (lower_tail_mean if tail == "lower" else upper_tail_mean)(rewards, mass)
    assert plain - 1e-9 * scale <= value <= rewards.max() + 1e-9 * scale


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("mass", [0.013, 0.1037, 0.5, 0.9])
def test_no_regularisation_finds_the_best_reward_and_much_of_it_the_quantile(tail, mass):
    rewards = random_rewards(1000, tied=False)
    assert threshold(rewards, 1e-9, mass, tail) == pytest.approx(rewards.max(), abs=1e-5)
    level = mass if tail == "lower" else 1 - mass
    stiff = threshold(rewards, 1e9, mass, tail)
    neighbours = np.sort(rewards)[
        np.searchsorted(np.sort(rewards), quantile(rewards, level)) + np.array([-1, 0, 1])
    ]
    assert stiff in neighbours if tail == "lower" else neighbours[0] <= stiff <= neighbours[2]
    tail_mean = lower_tail_mean if tail == "lower" else upper_tail_mean
    value = dual_objective(stiff, rewards, 1e9, mass, tail)
    assert value == pytest.approx(tail_mean(rewards, mass), abs=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_constant_rewards(tail):
    assert threshold([2.5] * 7, 1.0, 0.3, tail) == 2.5
    assert threshold([2.5], 1e-300, 1e-300, tail) == 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "at least one reward"),
        ({"rewards": [1.0, float("nan"), float("inf")]}, "1 of 3 are not"),
        ({"rewards": [float("nan")] * 2}, "at least one reward that has a value"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"alpha": float("inf")}, "alpha must be positive"),
        ({"mass": 0.0}, "mass of the tail"),
        ({"mass": 1.0}, "mass of the tail"),
        ({"mass": float("nan")}, "mass of the tail"),
        ({"weights": [1.0]}, "2 rewards and 1 weights"),
        ({"weights": [1.0, -1.0]}, "not be negative"),
        ({"weights": [0.0, 0.0]}, "sum must be positive"),
        ({"weights": [1.0, float("nan")]}, "not be negative"),
    ],
)
@pytest.mark.parametrize("tail", TAILS)
def test_bad_input_is_named(changes, message, tail):
    arguments = {"rewards": [0.0, 1.0], "alpha": 1.0, "mass": 0.5, "tail": tail} | changes
    with pytest.raises(ValueError, match=message):
        threshold(**arguments)


def test_the_active_share_counts_samples_strictly_inside_the_hinge():
    rewards = [0.0, 1.0, 1.0, 2.0, 3.0]
    assert active_share(rewards, 1.0, "lower") == 0.2
    assert active_share(rewards, 1.0, "upper") == 0.4
    reward = Quadratic([1.0])
    x = torch.tensor(rewards, dtype=torch.float64)[:, None]
    for tail, share in (("lower", 0.2), ("upper", 0.4)):
        hinge = TailProblem(tail, 0.5, 1.0).pseudo_reward(reward, 1.0)
        assert float(hinge.active(x).double().mean()) == share


def test_the_trap_of_a_threshold_above_almost_every_reward_is_visible():
    """With a small alpha times mass the best sample rules the dual, and the share of active ones is tiny."""
    rewards = random_rewards(1000, tied=False)
    problem = TailProblem("upper", mass=0.01, alpha=0.01)
    assert active_share(rewards, problem.threshold(rewards), "upper") <= 0.001
    assert active_share(rewards, TailProblem("upper", 0.01, 1000.0).threshold(rewards), "upper") > 0.005
