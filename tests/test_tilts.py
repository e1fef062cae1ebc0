"""Tilts within contexts: against brute force, closed forms, and what weights over all contexts promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import norm

from closed_forms import PATHS, Mixture, MixtureFlow, Quadratic, generator
from flowtilt.control.penalties import PENALTIES, solve_weights, solve_weights_within
from flowtilt.control.weighted_fitting import WeightedFittingSettings, draw_bank
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.thresholds import dual_objective, threshold
from flowtilt.tilts import Groups, strongest, tilted
from mode_flow import Modes

RANDOM = np.random.default_rng(0)


def groups_of(labels, least=1):
    return Groups.of(labels, np.arange(len(labels)), least)


# --- Groups ------------------------------------------------------------------------------------


def test_contexts_with_few_samples_are_pooled_with_their_neighbours_and_counted():
    contexts = np.repeat([3, 5, 6, 8, 9, 20], [4, 1, 2, 3, 10, 1])
    groups = groups_of(contexts, least=3)
    # 3 alone; 5 with 6; 8 alone; 9 alone and then 20, which has too few, with it.
    assert groups.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 11
    np.testing.assert_allclose(groups.shares, np.array([4, 3, 3, 11]) / 21)
    assert (groups.contexts, groups.pooled) == (6, 14)


def test_a_context_with_one_sample_is_pooled_and_by_itself_it_is_not_tilted():
    contexts, exponents = np.array([0, 0, 0, 1]), np.array([0.0, 1.0, 2.0, 50.0])
    alone = tilted(exponents, groups_of(contexts))
    assert alone.probabilities[3] == 0.25
    pooled = groups_of(contexts, least=2)
    assert (len(pooled), pooled.pooled) == (1, 4)
    assert tilted(exponents, pooled).probabilities[3] == pytest.approx(1)


@pytest.mark.parametrize("least", [1, 2, 5, 100])
def test_every_group_has_as_many_samples_as_were_asked_for_or_there_is_one(least):
    contexts = np.random.default_rng(1).geometric(0.2, 300)
    groups = groups_of(contexts, least)
    sizes = np.bincount(groups.labels)
    assert sizes.min() >= least or len(groups) == 1
    # Contexts stay whole and in order: a group is a run of numbers.
    order = np.argsort(contexts, kind="stable")
    assert (np.diff(groups.labels[order]) >= 0).all()
    for context in np.unique(contexts):
        assert len(set(groups.labels[contexts == context])) == 1


def test_what_fails_of_a_context_does_not_make_it_rarer():
    contexts, kept = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 4, 5])
    groups = Groups.of(contexts, kept)
    np.testing.assert_allclose(groups.shares, [4 / 6, 2 / 6])  # nothing is left of context 2
    np.testing.assert_allclose(groups.probabilities, [4 / 6, 1 / 6, 1 / 6])


@pytest.mark.parametrize(
    ("contexts", "message"),
    [(np.array([0.5, 1.0]), "one whole number a sample, got float64"), (np.zeros((2, 2), int), r"\(2, 2\)")],
)
def test_contexts_without_a_number_are_refused(contexts, message):
    with pytest.raises(ValueError, match=message):
        Groups.of(contexts, np.arange(2))
    with pytest.raises(ValueError, match="at least one sample"):
        Groups.of(np.array([1]), np.array([], dtype=int))


# --- Weights -----------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), contexts=st.integers(1, 5), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_weights_are_the_tilt_of_each_context_by_itself(seed, contexts, scale):
    rng = np.random.default_rng(seed)
    labels, exponents = rng.integers(contexts, size=60), scale * rng.normal(size=60)
    groups = groups_of(labels)
    found = tilted(exponents, groups)
    kl, squares = 0.0, 0.0
    for context in np.unique(labels):
        own = labels == context
        w = np.exp(exponents[own] - logsumexp(exponents[own]))
        share = own.mean()
        np.testing.assert_allclose(found.probabilities[own], share * w, rtol=1e-9, atol=1e-300)
        held = w > 0
        kl += share * w[held] @ np.log(w[held] * own.sum())
        squares += share**2 * (w**2).sum()
    assert found.kl == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert 60 * found.effective_share == pytest.approx(1 / squares, rel=1e-9)
    # The same by the dual of the penalised problem, whose weights weighted fitting takes.
    solved = solve_weights_within(exponents, 1.0, PENALTIES["kl"], groups)
    np.testing.assert_allclose(solved.probabilities, found.probabilities, rtol=1e-7, atol=1e-300)
    assert solved.kl == pytest.approx(found.kl, rel=1e-7, abs=1e-10)
    assert solved.effective_sample_size == pytest.approx(60 * found.effective_share, rel=1e-7)
    np.testing.assert_allclose(solved.effective_shares, found.effective_shares, rtol=1e-7)
    assert solved.dual == pytest.approx(solved.primal, abs=1e-7 * np.ptp(exponents))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty_is_solved_in_each_context_by_itself(penalty):
    labels, values = RANDOM.integers(3, size=200), RANDOM.normal(size=200)
    values = values + labels  # contexts differ
    solved = solve_weights_within(values, 2.5, PENALTIES[penalty], groups_of(labels))
    primal = 0.0
    for context in range(3):
        own = labels == context
        alone = solve_weights(values[own], 2.5, PENALTIES[penalty])
        np.testing.assert_array_equal(solved.weights[own], alone.weights)
        np.testing.assert_allclose(solved.probabilities[own], own.mean() * alone.probabilities)
        primal += own.mean() * alone.primal
    assert solved.primal == pytest.approx(primal)
    assert solved.relative_gap < 1e-9


def test_probabilities_before_are_kept_in_each_context():
    labels, p, exponents = RANDOM.integers(3, size=50), RANDOM.dirichlet(np.ones(50)), RANDOM.normal(size=50)
    found = tilted(exponents, groups_of(labels), np.log(p))
    np.testing.assert_allclose(np.bincount(labels, found.probabilities), np.bincount(labels, p))
    np.testing.assert_allclose(found.probabilities, p * np.exp(found.log_weights))
    q = found.probabilities
    assert found.kl == pytest.approx(q @ np.log(q / p))
    assert found.effective_share == pytest.approx(1 / (q @ (q / p)))
    np.testing.assert_allclose(
        tilted(exponents, Groups.single(50)).probabilities, np.exp(exponents) / np.exp(exponents).sum()
    )


def test_exponents_that_are_not_finite_are_refused():
    with pytest.raises(
        ValueError, match=r"one finite exponent for each of 3 samples, got shape \(3,\) with 1"
    ):
        tilted([0.0, math.inf, 1.0], Groups.single(3))


@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_the_strongest_tilt_keeps_just_the_share(share, scale):
    labels, exponents = RANDOM.integers(4, size=3000), scale * RANDOM.normal(size=3000)
    groups = groups_of(labels)
    strength = strongest(exponents, groups, share, most=1e9)
    assert tilted(strength * exponents, groups).effective_share == pytest.approx(share, rel=1e-6)
    # For a normal exponent of variance v the share is exp(-v) in the limit of many samples.
    if share == 0.9:
        assert (strength * scale) ** 2 == pytest.approx(-math.log(share), rel=0.1)
    assert strongest(exponents, groups, share, most=strength / 2) == strength / 2


# --- Thresholds --------------------------------------------------------------------------------


def common_dual(t, rewards, weights, labels, alpha, mass, tail):
    """As section 8 of the derivation has it, one context after the other."""
    cut = np.minimum(rewards - t, 0) if tail == "lower" else np.maximum(rewards - t, 0)
    value = t
    for context in np.unique(labels):
        own = labels == context
        pi = weights[own].sum() / weights.sum()
        value += alpha * pi * logsumexp(cut[own] / (alpha * mass), b=weights[own] / weights[own].sum())
    return value


@pytest.mark.parametrize("tail", ["lower", "upper"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("alpha", "mass"), [(0.05, 0.2), (1.0, 0.01), (1.0, 0.5), (20.0, 0.9)])
@pytest.mark.parametrize("count", [1, 4, 30, 400])
def test_one_threshold_for_all_contexts_against_brute_force(tail, weighted, tied, alpha, mass, count):
    rng = np.random.default_rng(count)
    labels = rng.integers(4, size=count)
    rewards = 3 * rng.normal(size=count) + 2 * labels
    rewards = np.round(rewards) if tied else rewards
    weights = rng.exponential(size=count) if weighted else np.ones(count)
    given_weights = weights if weighted else None
    at = threshold(rewards, alpha, mass, tail, given_weights, labels)

    def value(t):
        return common_dual(t, rewards, weights, labels, alpha, mass, tail)

    assert dual_objective(at, rewards, alpha, mass, tail, given_weights, labels) == pytest.approx(value(at))
    if tail == "lower":
        assert value(at) == pytest.approx(max(value(t) for t in rewards), rel=1e-12, abs=1e-12)
    else:
        best = min(
            minimize_scalar(value, bounds=pair, method="bounded", options={"xatol": 1e-12}).fun
            for pair in [(rewards.min(), max(rewards.max(), rewards.min() + 1e-9))]
        )
        assert value(at) <= min(best, min(value(t) for t in rewards)) + 1e-9


def test_a_single_context_is_none():
    rewards = RANDOM.normal(size=500)
    for tail in ("lower", "upper"):
        one = threshold(rewards, 1.0, 0.1, tail)
        assert threshold(rewards, 1.0, 0.1, tail, contexts=np.full(500, 7)) == one
        # Twice the same rewards in two contexts have the same dual.
        twice, of = np.tile(rewards, 2), np.repeat([0, 1], 500)
        assert threshold(twice, 1.0, 0.1, tail, contexts=of) == pytest.approx(one, abs=1e-12)


def test_failed_rewards_leave_their_context_as_likely_as_it_was():
    rewards, labels = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0, 0, 0, 1, 1])
    failed = np.append(rewards, [math.nan] * 2)
    of = np.append(labels, [1, 1])
    weights = np.array([1, 1, 1, 2, 2.0])  # four of seven samples are of context 1
    for tail in ("lower", "upper"):
        expected = threshold(rewards, 1.0, 0.3, tail, weights, labels)
        assert threshold(failed, 1.0, 0.3, tail, contexts=of) == expected
    with pytest.raises(ValueError, match="7 rewards and 5 contexts"):
        threshold(failed, 1.0, 0.3, "upper", contexts=labels)


# --- A distribution whose contexts differ, in closed form --------------------------------------

MEANS = (-1.0, 0.0, 1.5)
RATE, ALPHA = 1.0, 1.0
"""N(m_c, 1) in context c with reward x: the tilt of each is N(m_c + 1 / alpha, 1)."""


def mode_flow(path="linear"):
    distributions = [Mixture.gaussian([m, 0.0], [[1.0, 0.0], [0.0, 1.0]]) for m in MEANS]
    return LabelledModes(
        [MixtureFlow(PATHS[path], distribution, trainable=True) for distribution in distributions]
    )


class LabelledModes(Modes):
    def context_labels(self, context):
        return context


REWARD = Quadratic([RATE, 0.0])


def test_weights_over_all_contexts_promise_what_no_model_can_reach():
    """The tilt's mean is ``E m + 1 / alpha`` within contexts; over all it is that of a mixture's tilt."""
    choice = WeightedFittingSettings(bank=60_000, steps=8)
    bank = draw_bank(mode_flow(), RewardVariation(REWARD), ALPHA, choice, generator(0))
    values, labels = bank.values, bank.groups.labels
    shares = np.bincount(labels) / len(labels)
    within = shares @ (np.array(MEANS) + RATE / ALPHA)
    error = 5 * math.sqrt(math.e / choice.bank)  # E w^2 = e, for each context
    promised = bank.solution.probabilities @ values
    assert promised == pytest.approx(within, abs=error)
    np.testing.assert_allclose(np.bincount(labels, bank.solution.probabilities), shares)
    for context, mean in enumerate(MEANS):
        own = labels == context
        found = bank.solution.probabilities[own] @ values[own] / shares[context]
        assert found == pytest.approx(mean + 1, abs=error * math.sqrt(3))
    # A mixture's tilt has weights exp(m_c): it moves mass to the context of the highest rewards.
    moved = np.exp(MEANS) * shares / (np.exp(MEANS) @ shares)
    pooled = tilted(values / ALPHA, Groups.single(len(values)))
    assert pooled.mean(values) == pytest.approx(moved @ (np.array(MEANS) + 1), abs=0.1)
    assert pooled.mean(values) - promised > 0.6
    np.testing.assert_allclose(np.bincount(labels, pooled.probabilities), moved, atol=0.02)


@pytest.mark.parametrize("tail", ["lower", "upper"])
def test_the_threshold_within_contexts_is_that_of_the_closed_form(tail):
    """``E exp(+-(r - t)_+ / s)`` of a normal reward is known; the dual is then a function of one number."""
    mass, alpha = 0.2, 2.0
    s = alpha * mass

    def log_mean(t, mean):
        u = t - mean
        flat, moved = (u, 1 / s - u) if tail == "upper" else (-u, u - 1 / s)
        return np.logaddexp(norm.logcdf(flat), norm.logcdf(moved) - u / s + 0.5 / s**2)

    def dual(t, sign=1.0):
        return sign * (t + alpha * np.mean([log_mean(t, m) for m in MEANS]))

    labels = np.repeat(np.arange(3), 20_000)
    rewards = norm.ppf((np.arange(labels.size) % 20_000 + 0.5) / 20_000) + np.array(MEANS)[labels]
    at = threshold(rewards, alpha, mass, tail, contexts=labels)
    sign = -1.0 if tail == "lower" else 1.0
    exact = minimize_scalar(dual, bounds=(-6, 8), args=(sign,), method="bounded", options={"xatol": 1e-10})
    assert dual(at) == pytest.approx(dual(exact.x), abs=2e-3)
    assert dual_objective(at, rewards, alpha, mass, tail, contexts=labels) == pytest.approx(
        dual(exact.x), abs=0.02
    )
    # Over all contexts together the dual promises more, and its threshold is another one.
    pooled = threshold(rewards, alpha, mass, tail)
    assert abs(pooled - at) > 0.1
    assert dual_objective(pooled, rewards, alpha, mass, tail) > dual(exact.x) + 0.05
