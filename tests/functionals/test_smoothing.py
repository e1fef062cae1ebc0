"""Functionals of distributions with noise: gradients by scores against closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from closed_forms import PATHS, Mixture, MixtureFlow, tensor
from flowtilt.functionals.base import Distribution
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.smoothing import smoothed
from flowtilt.functionals.utilities import Entropy

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
OTHER = Mixture.gaussian([-0.2, 0.1], [[0.5, 0.0], [0.0, 0.8]])
MIXTURE = Mixture.of(
    [0.7, 0.3], [[-1.0, 0.0], [1.2, 0.4]], [[[0.05, 0.0], [0.0, 0.05]], [[0.05, 0.0], [0.0, 0.05]]]
)
POINTS = tensor([[0.2, 0.1], [-1.5, 0.7], [2.0, -1.0]])
TIME = 0.6

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def noisy_precision(distribution, path):
    """Inverse covariance of a Gaussian's ``p_t``, and the path's coefficients."""
    t = torch.tensor(TIME, dtype=torch.float64)
    alpha, beta = path.alpha(t), path.beta(t)
    (covariance,) = distribution.covariances
    return torch.linalg.inv(alpha**2 * covariance + beta**2 * torch.eye(2, dtype=torch.float64)), alpha


@paths
def test_entropy_of_a_gaussian_with_noise_is_exact_with_one_pair(path):
    """``-log p_t`` is quadratic: pairs of noise cancel, and ``alpha^2 S_t^-1 (x - m)`` is left."""
    flow = MixtureFlow(path, GAUSSIAN)
    found = Entropy(score_time=TIME, pairs=1).linearise(Distribution(flow, POINTS)).gradient(POINTS)
    precision, alpha = noisy_precision(GAUSSIAN, path)
    (mean,) = GAUSSIAN.means
    torch.testing.assert_close(found, alpha**2 * (POINTS - mean) @ precision, rtol=1e-9, atol=1e-9)


@paths
def test_divergence_of_gaussians_with_noise_is_exact_with_one_pair(path):
    flow, reference = MixtureFlow(path, GAUSSIAN), MixtureFlow(path, OTHER)
    found = KL(reference, score_time=TIME, pairs=1).linearise(Distribution(flow, POINTS)).gradient(POINTS)
    own, alpha = noisy_precision(GAUSSIAN, path)
    other, _ = noisy_precision(OTHER, path)
    expected = alpha**2 * ((POINTS - OTHER.means[0]) @ other - (POINTS - GAUSSIAN.means[0]) @ own)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@paths
def test_entropy_of_a_mixture_with_noise_against_a_grid(path):
    """The first variation ``-E_n log p_t(alpha x + beta n)`` by quadrature, differentiated by differences."""
    flow = MixtureFlow(path, MIXTURE)
    t = torch.tensor(TIME, dtype=torch.float64)
    alpha, beta = float(path.alpha(t)), float(path.beta(t))
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    noise = torch.cartesian_prod(nodes, nodes)
    mass = torch.cartesian_prod(weights, weights).prod(1) / (2 * math.pi)
    covariances = [alpha**2 * c + beta**2 * torch.eye(2, dtype=torch.float64) for c in MIXTURE.covariances]
    components = [
        torch.distributions.MultivariateNormal(alpha * mean, covariance)
        for mean, covariance in zip(MIXTURE.means, covariances, strict=True)
    ]

    def variation(x):
        states = alpha * x + beta * noise
        logs = torch.stack([c.log_prob(states) for c in components]) + MIXTURE.weights.log()[:, None]
        return -float(mass @ torch.logsumexp(logs, 0))

    pairs = 4000
    found = Entropy(score_time=TIME, pairs=pairs).linearise(Distribution(flow, POINTS)).gradient(POINTS)
    step = 1e-4
    for x, gradient in zip(POINTS, found, strict=True):
        expected = tensor(
            [(variation(x + step * e) - variation(x - step * e)) / (2 * step) for e in torch.eye(2).double()]
        )
        # The scores of p_t have a standard deviation of about 1 / beta.
        assert float((gradient - expected).norm()) < 4 * alpha / beta * math.sqrt(2 / pairs)


def test_a_sample_has_the_same_noise_in_any_batch():
    flow = MixtureFlow(PATHS["vp"], MIXTURE)
    variation = Entropy(score_time=TIME, pairs=2).linearise(Distribution(flow, POINTS))
    whole = variation.gradient(POINTS)
    for i in (2, 0, 1):
        torch.testing.assert_close(variation.gradient(POINTS[i : i + 1])[0], whole[i], rtol=1e-12, atol=1e-12)
    assert bool((variation.gradient(POINTS + 1e-9) != whole).any())


def test_the_states_asked_for_have_the_distribution_of_the_path():
    """Mean ``alpha x`` exactly, and the variance of the noise."""
    path, seen = PATHS["vp"], []
    flow = MixtureFlow(path, MIXTURE)
    t = torch.tensor(TIME, dtype=torch.float64)
    smoothed(lambda x, t, c: seen.append(x) or torch.zeros_like(x), flow, POINTS, t, None, 2000)
    (asked,) = seen
    states = asked.view(len(POINTS), 4000, 2) - path.alpha(t) * POINTS[:, None]
    assert float(states.mean(1).abs().max()) < 1e-12
    variance = float(states.square().mean())
    assert variance == pytest.approx(float(path.beta(t)) ** 2, rel=4 * math.sqrt(2 / (2000 * POINTS.numel())))


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_divergence_from_itself_has_no_gradient_and_takes_no_pass(pairs):
    class Counted(MixtureFlow):
        calls = 0

        def velocity(self, *given):
            Counted.calls += 1
            return super().velocity(*given)

    flow = Counted(PATHS["vp"], MIXTURE)
    found = KL(flow, score_time=TIME, pairs=pairs).linearise(Distribution(flow, POINTS)).gradient(POINTS)
    assert bool((found == 0).all())
    assert Counted.calls == 0


def test_there_is_no_value():
    flow = MixtureFlow(PATHS["vp"], MIXTURE)
    for functional in (Entropy(pairs=1), KL(flow, pairs=1)):
        with pytest.raises(NotImplementedError, match="gradients alone"):
            functional.value(Distribution(flow, POINTS))
