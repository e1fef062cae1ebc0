import numpy as np
import pytest
import torch

from closed_forms import (
    PATHS,
    AffineTable,
    CorrectedFlow,
    Mixture,
    MixtureFlow,
    Perceptron,
    Quadratic,
    chain_distribution,
    generator,
    relative_error,
)
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.control.base import Solution, TrainingDiverged
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, CVaR, Entropy, ExpectedReward

START = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
REWARD = Quadratic([1.0, 0.5])
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def exact_solver(base, variation, kl_weight, random, slot=None):
    """The exact tilt of a Gaussian flow by a variation whose gradient is affine, read off three points."""
    probes = torch.eye(3, dtype=torch.float64)[:, 1:]
    at_zero, *rest = variation.gradient(probes)
    curvature = -(torch.stack(rest, dim=1) - at_zero[:, None])
    tilted = base.distribution.tilted(Quadratic(at_zero, 0.5 * (curvature + curvature.T)), kl_weight)
    return Solution(MixtureFlow(base.path, tilted), [{"update": 0}])


def objective(start, alpha, time=1 - 1e-6):
    return Objective(ExpectedReward(REWARD), KL(start, time), alpha)


@paths
@pytest.mark.parametrize("reward", [REWARD, Quadratic([1.0, 0.5], [[0.5, 0.1], [0.1, 0.8]])])
def test_mirror_ascent_contracts_to_the_regularised_optimum_at_its_rate(path, reward):
    """With every step exact, ``log p_k = log p_0 + (1 - (1 - alpha / eta)^k) r / alpha``."""
    start, alpha, eta = MixtureFlow(path, START), 0.8, 2.0
    functional = Objective(ExpectedReward(reward), KL(start, 1 - 1e-6), alpha)
    settings = MirrorAscent(step_weight=eta, distribution_samples=10, distribution_steps=2)
    for k in range(1, 7):
        found = ascend(start, functional, range(k), settings, exact_solver, generator).model.distribution
        share = 1 - (1 - alpha / eta) ** k
        expected = START.tilted(reward, alpha / share)
        # Scores are taken 1e-6 before the data.
        torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=0, atol=1e-4)


@paths
@pytest.mark.parametrize(("step_weight", "powers"), [(3.0, [2 / 3] * 3), (2.0, [1 / 2, 3 / 4, 5 / 8])])
def test_entropy_is_at_its_optimum_after_one_step_of_one_plus_alpha(path, step_weight, powers):
    """Exact steps take ``p_0^c`` to ``p_0^(c - (c - alpha (1 - c)) / eta)``; shorter weights go beyond."""
    start, alpha, time = MixtureFlow(path, START), 2.0, 1 - 1e-6
    functional = Objective(Entropy(score_time=time), KL(start, time), alpha)
    for k, power in enumerate(powers, 1):
        settings = MirrorAscent(step_weight, distribution_samples=10, distribution_steps=2)
        found = ascend(start, functional, range(k), settings, exact_solver, generator).model.distribution
        torch.testing.assert_close(found.mean, START.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.covariance, START.covariance / power, rtol=0, atol=1e-4)


@paths
def test_steps_on_a_distribution_with_noise_raise_its_objective_to_the_optimum(path):
    """There the optimum is the distribution whose noisy one is ``p_t^(alpha / (1 + alpha))``."""
    alpha, time = 2.0, 0.8
    start, at = MixtureFlow(path, START), torch.tensor(time, dtype=torch.float64)
    signal, noise = path.alpha(at) ** 2, path.beta(at) ** 2 * torch.eye(2, dtype=torch.float64)
    pre = signal * START.covariance + noise
    functional = Objective(Entropy(score_time=time, pairs=1), KL(start, time, pairs=1), alpha)

    def value(covariance):
        own = signal * covariance + noise
        divergence = torch.trace(torch.linalg.solve(pre, own)) - torch.logdet(own) + torch.logdet(pre)
        return float(0.5 * torch.logdet(own) - alpha * 0.5 * divergence)

    settings = MirrorAscent(1 + alpha, distribution_samples=10, distribution_steps=2)
    values = []
    for k in (0, 1, 2, 4, 8, 40):
        found = ascend(start, functional, range(k), settings, exact_solver, generator).model.distribution
        values.append(value(found.covariance))
    assert values == sorted(values)
    optimum = ((1 + alpha) / alpha * pre - noise) / signal
    assert values[-1] == pytest.approx(value(optimum), abs=1e-3)


def test_without_a_divergence_tilts_add_up():
    start = MixtureFlow(PATHS["linear"], START)
    settings = MirrorAscent(step_weight=3.0, distribution_samples=10, distribution_steps=2)
    model = ascend(start, objective(start, 0.0), range(4), settings, exact_solver, generator).model
    torch.testing.assert_close(model.distribution.mean, START.tilted(REWARD, 3.0 / 4).mean)


def test_a_continued_ascent_is_the_uninterrupted_one_and_rows_carry_their_iteration():
    path = PATHS["linear"]
    flow = CorrectedFlow(MixtureFlow(path, START), AffineTable(path, 5))
    choice = AdjointMatchingSettings(updates=2, batch=8, pool=8, steps=5, learning_rate=0.1)
    settings = MirrorAscent(step_weight=2.0, distribution_samples=50, distribution_steps=5)

    def solver(base, variation, kl_weight, random, slot=None):
        assert kl_weight == 2.0
        return solve(base, variation, kl_weight, choice, random)

    functional = objective(flow, 0.5, 0.9)
    whole = ascend(flow, functional, range(3), settings, solver, generator)
    half = ascend(flow, functional, range(1), settings, solver, generator)
    rest = ascend(half.model, functional, range(1, 3), settings, solver, generator)
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["iteration"] for row in whole.history] == [1, 1, 2, 2, 3, 3]
    assert [row["iteration"] for row in half.history + rest.history] == [1, 1, 2, 2, 3, 3]
    assert not any(p.detach().abs().sum() for p in flow.parameters())


def test_no_iterations_leave_the_start():
    start = MixtureFlow(PATHS["linear"], START)
    settings = MirrorAscent(step_weight=2.0, distribution_samples=10, distribution_steps=2)
    result = ascend(start, objective(start, 0.5), range(0), settings, exact_solver, generator)
    assert result.model is start
    assert result.history == []


@pytest.mark.slow
def test_two_trained_steps_reach_the_distribution_of_two_exact_ones():
    """FDC with Adjoint Matching as its solver: each step tilts by half of what is left."""
    path, steps, alpha, eta = PATHS["vp"], 40, 1.0, 2.0
    flow = CorrectedFlow(MixtureFlow(path, START), AffineTable(path, steps))
    choice = AdjointMatchingSettings(
        updates=120, batch=128, pool=128, steps=steps, learning_rate=0.1, ramp=0.0, gradient_clip=10.0
    )
    result = ascend(
        flow,
        objective(flow, alpha, 0.975),
        range(2),
        MirrorAscent(step_weight=eta, distribution_samples=100, distribution_steps=steps),
        lambda base, tilt, weight, random, slot: solve(base, tilt, weight, choice, random),
        generator,
    )
    mean, covariance = chain_distribution(result.model, steps)
    expected = START.tilted(REWARD, alpha / (1 - (1 - alpha / eta) ** 2))
    # As for one solve by Adjoint Matching: mostly the discretisation, here of two half as strong.
    assert relative_error(mean, expected.mean) < 0.03
    assert relative_error(covariance, expected.covariance) < 0.03


# --- Ascents that go down -----------------------------------------------------------------------


def shifted(by):
    """A solver that moves the distribution's mean along the first axis, whatever it is asked for."""

    def solver(base, variation, kl_weight, random, slot=None):
        distribution = Mixture(
            base.distribution.weights,
            base.distribution.means + torch.tensor([by, 0.0]).double(),
            base.distribution.covariances,
        )
        return Solution(MixtureFlow(base.path, distribution), [{"update": 0}])

    return solver


@pytest.mark.parametrize("utility", [ExpectedReward(REWARD), CVaR(REWARD, 0.1), SQ(REWARD, 0.1)])
@pytest.mark.parametrize("count", [1, 3])
def test_an_ascent_whose_utility_falls_below_its_start_is_stopped(utility, count):
    start = MixtureFlow(PATHS["linear"], START)
    functional = Objective(utility, KL(start, 0.9), 0.5)
    settings = MirrorAscent(step_weight=2.0, distribution_samples=400, distribution_steps=5)
    message = rf"after iteration 1 of {count} the utility is .* at the start .*raise the KL weight of a step"
    with pytest.raises(TrainingDiverged, match=message):
        ascend(start, functional, range(count), settings, shifted(-3.0), generator)
    # Up, or down by less than the error of the samples, it goes on.
    for by in (3.0, -1e-3):
        ascend(start, functional, range(count), settings, shifted(by), generator)


def test_an_ascent_that_goes_on_may_give_way_by_what_a_nat_is_worth():
    start = MixtureFlow(PATHS["linear"], START)
    settings = MirrorAscent(step_weight=2.0, distribution_samples=400, distribution_steps=5)
    ascend(start, objective(start, 0.5), range(3, 4), settings, shifted(-1.0), generator)
    with pytest.raises(TrainingDiverged, match="after iteration 4 of 4"):
        ascend(start, objective(start, 0.5), range(3, 4), settings, shifted(-5.0), generator)


def test_a_solve_that_spends_a_hundred_nats_is_stopped_with_its_iteration():
    """The largest step, a network, and a learning rate at which it runs away instead of rising."""
    path = PATHS["linear"]
    flow = CorrectedFlow(MixtureFlow(path, START), Perceptron(path))
    choice = AdjointMatchingSettings(updates=60, batch=32, pool=64, steps=10, learning_rate=1.0, ramp=0.0)
    functional = Objective(CVaR(REWARD, 0.1), KL(flow, 0.9), 0.1)
    seen = []

    def solver(base, variation, kl_weight, random, slot):
        return solve(base, variation, kl_weight, choice, random, seen.append)

    message = r"Flow Density Control, iteration \d of 3: Adjoint Matching: the model has moved .* nats .*"
    with pytest.raises(
        TrainingDiverged, match=message + r"more than 100, at update \d+ of 60; lower learning"
    ):
        ascend(flow, functional, range(3), MirrorAscent(0.1, 200, 10), solver, generator)
    assert np.mean([row["path_kl"] for row in seen[-5:]]) <= 100
