"""Baselines that train nothing, against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from closed_forms import PATHS, GaussianFlow, Mixture, MixtureFlow, Quadratic, generator, relative_error
from flowtilt.rewards import Reward
from flowtilt.sampling import OdeSettings, sample_ode
from flowtilt.tilts import Groups
from flowtilt.untrained import SteeringSettings, best_of, resample, steer, systematic
from mode_flow import Modes

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
MEANS = ([-1.0, 0.0], [0.0, 0.5], [1.5, 0.0])


class LabelledModes(Modes):
    def context_labels(self, context):
        return context


def mode_flow():
    distributions = [Mixture.gaussian(mean, [[1.0, 0.3], [0.3, 0.8]]) for mean in MEANS]
    return LabelledModes([MixtureFlow(PATHS["linear"], distribution) for distribution in distributions])


def draw(model, count, random, context):
    return sample_ode(model, count, random, context, OdeSettings(16))


class Height(Reward):
    may_fail = True

    def __init__(self, failing=math.inf):
        self.failing = failing

    def value(self, x, context=None):
        return x[:, 0].masked_fill(x[:, 0].abs() > self.failing, math.nan)


# --- Best of N -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_best_of_n_has_the_distribution_function_to_the_nth(n):
    kept = best_of(GaussianFlow(PATHS["linear"], GAUSSIAN), Height(), n, 3000, draw, 64, generator(0))
    assert (kept.drawn, kept.network_passes, kept.reward_calls) == (n, 64 * n, n)
    # The density of the rank u is n u^(n-1): its divergence from the uniform one, by quadrature.
    u = (np.arange(100_000) + 0.5) / 100_000
    density = n * u ** (n - 1)
    assert kept.kl == pytest.approx(np.mean(density * np.log(density)), abs=1e-6)
    assert kstest(kept.rewards.numpy(), lambda r: norm.cdf(r, 0.5) ** n).pvalue > 0.01
    torch.testing.assert_close(kept.rewards, kept.samples[:, 0])
    # What the reward does not see follows it by the covariance alone: y given x is as before.
    slope = np.polyfit(kept.samples[:, 0], kept.samples[:, 1], 1)
    np.testing.assert_allclose(slope, [0.4, -0.5], atol=0.08)


def test_the_best_of_n_keeps_the_contexts_and_chooses_within_each():
    contexts = torch.arange(3).repeat_interleave(1500)
    kept = best_of(mode_flow(), Height(), 4, 4500, draw, 64, generator(1), contexts)
    assert torch.equal(kept.context, contexts)
    for mode, mean in enumerate(MEANS):
        own = kept.rewards[contexts == mode].numpy()
        assert kstest(own, lambda r, at=mean[0]: norm.cdf(r, at) ** 4).pvalue > 0.01


class Counted(Reward):
    """Counts samples, and the largest batch."""

    def __init__(self):
        self.calls, self.largest = 0, 0

    def value(self, x, context=None):
        self.calls, self.largest = self.calls + len(x), max(self.largest, len(x))
        return x[:, 0]


class CountedFlow(GaussianFlow):
    passes = 0
    largest = 0

    def velocity(self, x, t, context=None):
        self.passes, self.largest = self.passes + len(x), max(self.largest, len(x))
        return super().velocity(x, t, context)


@pytest.mark.parametrize("kind", ["best_of", "steered"])
def test_costs_are_what_is_counted_and_batches_no_larger_than_asked(kind):
    flow, reward = CountedFlow(PATHS["linear"], GAUSSIAN), Counted()
    if kind == "best_of":
        kept = best_of(flow, reward, 4, 50, draw, 64, generator(9), chunk=20)
    else:
        kept = steer(flow, reward, 0.5, 50, SteeringSettings(4, 10, every=3), generator(9), chunk=20)
    assert flow.passes == 50 * kept.network_passes
    assert reward.calls == 50 * kept.reward_calls
    assert flow.largest == reward.largest == 20
    assert len(kept.samples) == len(kept.rewards) == 50


def test_what_fails_is_kept_only_where_all_of_the_n_fail():
    flow = GaussianFlow(PATHS["linear"], Mixture.gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))
    kept = best_of(flow, Height(failing=0.5), 4, 4000, draw, 64, generator(2))
    share = 2 * norm.sf(0.5)
    assert float(kept.rewards.isnan().double().mean()) == pytest.approx(share**4, abs=0.03)
    # Of the largest of those that do not fail: F = share that fails + mass below, to the fourth.
    below = share + norm.cdf(0.0) - norm.cdf(-0.5)
    assert float((kept.rewards <= 0).double().mean()) == pytest.approx(below**4 - share**4, abs=0.03)


# --- Resampling ----------------------------------------------------------------------------------


def test_systematic_resampling_rounds_each_number_down_or_up():
    p = np.random.default_rng(0).dirichlet(np.ones(50))
    for offset in (0.0, 0.37, 0.999):
        counts = np.bincount(systematic(p, 200, offset), minlength=50)
        assert counts.sum() == 200
        assert (np.abs(counts - 200 * p) < 1).all()
    # Over the offset, the number of copies of each has the mean 200 p.
    offsets = (np.arange(400) + 0.5) / 400
    mean = np.mean([np.bincount(systematic(p, 200, u), minlength=50) for u in offsets], axis=0)
    np.testing.assert_allclose(mean, 200 * p, atol=0.01)


def test_a_resampled_bank_has_the_tilted_moments_within_each_context():
    """``N(m, 1)`` under ``x / alpha`` is ``N(m + 1 / alpha, 1)``; contexts keep their shares."""
    random = np.random.default_rng(1)
    contexts = np.repeat([0, 1, 2], [20_000, 10_000, 10_000])
    x = random.normal(np.array([-1.0, 0.0, 2.0])[contexts])
    groups = Groups.of(contexts, np.arange(len(x)))
    found = resample(x / 1.25, groups, 8000, generator(3))
    index = found.index
    assert len(index) == 8000
    assert found.kl == pytest.approx(0.8**2 / 2, rel=0.05)
    assert found.effective_share == pytest.approx(math.exp(-(0.8**2)), rel=0.05)
    assert found.distinct_share == len(np.unique(index)) / 8000 < 1
    np.testing.assert_array_equal(np.bincount(contexts[index]), [4000, 2000, 2000])
    for context, mean in enumerate([-1.0, 0.0, 2.0]):
        own = x[index][contexts[index] == context]
        assert own.mean() == pytest.approx(mean + 0.8, abs=0.06)
        assert own.std() == pytest.approx(1, abs=0.06)


def test_numbers_that_are_whole_are_kept_in_each_context_whatever_the_offset():
    """Of twenty contexts that are equally likely, ten each, in random order."""
    contexts = np.tile(np.arange(20), 3)
    for seed in range(50):
        groups = Groups.of(contexts, np.arange(60))
        index = resample(np.sin(np.arange(60.0)), groups, 200, generator(seed)).index
        np.testing.assert_array_equal(np.bincount(contexts[index]), np.full(20, 10))
        assert not (np.diff(contexts[index]) >= 0).all()


def test_other_numbers_are_rounded_and_right_on_the_mean():
    groups = Groups.of(np.repeat([0, 1, 2], [70, 23, 7]), np.arange(100))
    found = [
        np.bincount(groups.labels[resample(np.zeros(100), groups, 15, generator(seed)).index], minlength=3)
        for seed in range(400)
    ]
    assert (np.abs(np.array(found) - [10.5, 3.45, 1.05]) < 1).all()
    np.testing.assert_allclose(np.mean(found, axis=0), [10.5, 3.45, 1.05], atol=0.1)


# --- Sequential Monte Carlo ----------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("curvature", [None, [[0.6, 0.2], [0.2, 1.0]]], ids=["linear", "quadratic"])
def test_steering_reaches_the_tilt_of_a_gaussian_and_its_normaliser(path, curvature):
    """Mean and covariance within 5 % of the move's scale, and ``log Z`` within 0.03 nats."""
    reward, weight = Quadratic([1.0, 0.5], curvature), 0.8
    exact = GAUSSIAN.tilted(reward, weight)
    kept = steer(
        GaussianFlow(PATHS[path], GAUSSIAN), reward, weight, 4000, SteeringSettings(5, 100), generator(4)
    )
    assert kept.network_passes == 500
    assert kept.reward_calls == 500
    found = kept.samples
    assert float((found.mean(0) - exact.mean).norm() / (exact.mean - GAUSSIAN.mean).norm()) < 0.06
    assert relative_error(torch.cov(found.T), exact.covariance) < 0.1
    # log Z = log E exp(r / w) by Bayes' rule at any point.
    at = torch.zeros(1, 2, dtype=torch.float64)
    log_z = float(GAUSSIAN.log_density(at) - exact.log_density(at) + reward(at) / weight)
    assert kept.log_normalisers[0] == pytest.approx(log_z, abs=0.05)
    # The divergence of one Gaussian from another.
    precision = torch.linalg.inv(GAUSSIAN.covariance)
    shift = exact.mean - GAUSSIAN.mean
    within = precision @ exact.covariance
    nats = 0.5 * (within.trace() - 2 - within.logdet() + shift @ precision @ shift)
    assert kept.kl == pytest.approx(float(nats), rel=0.06)


def test_steering_moves_a_mixture_where_plain_weights_lose_their_samples():
    """Two modes, one of them rare and of a high reward: its share, at five nats between them."""
    mixture = Mixture.of([0.9, 0.1], [[-2.0, 0.0], [2.0, 0.0]], (0.25 * torch.eye(2)).expand(2, 2, 2))
    reward = Quadratic([1.0, 0.0])
    exact = mixture.tilted(reward, 0.8)
    kept = steer(
        MixtureFlow(PATHS["linear"], mixture), reward, 0.8, 4000, SteeringSettings(4, 60), generator(5)
    )
    share = float((kept.samples[:, 0] > 0).double().mean())
    assert share == pytest.approx(float(exact.weights[1]), abs=0.03)
    assert kept.distinct_share < 1


def test_steering_tilts_each_context_by_itself():
    reward, weight, contexts = Quadratic([1.0, 0.5]), 0.8, torch.arange(3).repeat(1500)
    flow = mode_flow()
    kept = steer(flow, reward, weight, 4500, SteeringSettings(4, 60), generator(6), contexts)
    assert torch.equal(kept.context, contexts)
    for mode, before in enumerate(flow.flows):
        exact, own = before.distribution.tilted(reward, weight), kept.samples[kept.context == mode]
        move = float((exact.mean - before.distribution.mean).norm())
        assert float((own.mean(0) - exact.mean).norm()) < 0.08 * move


def test_the_normaliser_is_without_bias_whatever_the_weightings():
    """The mean of ``Z`` over repeats is that of the process, with few particles and few weightings."""
    reward, weight, flow = Quadratic([1.0, 0.0]), 1.0, GaussianFlow(PATHS["linear"], GAUSSIAN)
    plain = steer(flow, reward, weight, 40_000, SteeringSettings(1, 10, every=10), generator(7))
    expected = float(plain.log_normalisers[0])
    for every in (1, 3):
        choice = SteeringSettings(4, 10, every, share=0.9)
        found = [
            math.exp(
                float(steer(flow, reward, weight, 8, choice, generator(seed)).log_normalisers[0]) - expected
            )
            for seed in range(100)
        ]
        assert np.mean(found) == pytest.approx(1, abs=3 * np.std(found) / 10 + 0.02)


def test_effective_samples_bound_what_the_normaliser_is_worth():
    """By one weighting ``log Z`` has the variance ``1 / effective - 1 / N`` over repeats, to within a
    fifth; by several it has more, since copies have their past in common."""
    reward, flow = Quadratic([1.5, 0.5]), GaussianFlow(PATHS["linear"], GAUSSIAN)
    ratios = {}
    for every in (12, 4):
        settings = SteeringSettings(4, 12, every)
        found = [steer(flow, reward, 0.8, 200, settings, generator(seed)) for seed in range(60)]
        noise = np.var([float(kept.log_normalisers[0]) for kept in found])
        ratios[every] = noise / np.mean([(1 / kept.effective_share - 1) / 800 for kept in found])
    assert ratios[12] == pytest.approx(1, abs=0.5)
    assert ratios[4] > 0.7


def test_one_particle_each_is_a_plain_draw_and_costs_what_it_says():
    kept = steer(
        GaussianFlow(PATHS["linear"], GAUSSIAN),
        Height(),
        1.0,
        5,
        SteeringSettings(1, 7, every=3),
        generator(8),
    )
    assert (kept.drawn, kept.network_passes, kept.reward_calls) == (1, 7, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SteeringSettings(particles=0), "steering's particles must be a whole number of at least 1"),
        (lambda: SteeringSettings(share=0), r"steering's share must be a number in \(0, 1\]"),
        (
            lambda: best_of(None, None, 0, 5, draw, 1, generator(0)),
            "n, of the best of n, must be a whole number of at least 1",
        ),
        (
            lambda: steer(mode_flow(), Height(), 0.0, 5, SteeringSettings(), generator(0)),
            "kl_weight must be positive and finite",
        ),
        (
            lambda: resample(np.array([0.0, np.nan]), Groups.single(2), 5, generator(0)),
            "1 that are not finite",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
