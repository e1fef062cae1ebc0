import numpy as np
import pytest
import torch

from closed_forms import generator, tensor
from flowtilt.functionals.base import Distribution, FiniteDistribution
from flowtilt.functionals.design import (
    OptimalDesign,
    PolynomialFeatures,
    RandomFourierFeatures,
    SingularDesign,
)

SAMPLES = torch.randn(200, 2, generator=generator(0), dtype=torch.float64) * tensor([1.0, 0.5]) + 0.3
DISTRIBUTION = Distribution(None, SAMPLES)
FEATURES = [PolynomialFeatures(1), PolynomialFeatures(2), RandomFourierFeatures(count=7, seed=3)]
features = pytest.mark.parametrize("features", FEATURES, ids=["linear", "quadratic", "fourier"])
criteria = pytest.mark.parametrize("criterion", ["log_det", "trace", "eigenvalue"])


def information(phi, ridge=1e-3):
    return phi.T @ phi / len(phi) + ridge * torch.eye(phi.shape[1], dtype=torch.float64)


def formula(criterion, matrix, phi):
    """Value, and the first variation as the paper's table has it, by inverses."""
    inverse = torch.linalg.inv(matrix)
    if criterion == "log_det":
        return torch.logdet(matrix), ((phi @ inverse) * phi).sum(1)
    if criterion == "trace":
        return -inverse.trace(), ((phi @ inverse @ inverse) * phi).sum(1)
    values, vectors = torch.linalg.eigh(inverse)
    return -values[-1], (phi @ inverse @ vectors[:, -1]) ** 2


@features
@criteria
def test_values_variations_and_gradients_against_the_formulas(criterion, features):
    design = OptimalDesign(criterion, features)
    x = SAMPLES[:30].clone().requires_grad_(True)
    value, variation = formula(criterion, information(features(SAMPLES)), features(x))
    (gradient,) = torch.autograd.grad(variation.sum(), x)
    found = design.linearise(DISTRIBUTION)
    # Both invert a matrix of condition number below 1e6.
    assert design.value(DISTRIBUTION) == pytest.approx(float(value), rel=1e-9)
    torch.testing.assert_close(found.value(x.detach()), variation.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.gradient(x.detach()), gradient, rtol=1e-9, atol=1e-8)


@criteria
def test_the_finite_distribution_of_the_samples_gives_the_same(criterion):
    design, n = OptimalDesign(criterion), len(SAMPLES)
    uniform = np.full(n, -np.log(n))
    distribution = FiniteDistribution(SAMPLES, uniform, uniform)
    assert design.finite_value(distribution) == pytest.approx(design.value(DISTRIBUTION), rel=1e-10)
    found = design.linearise(DISTRIBUTION).value(SAMPLES).numpy()
    np.testing.assert_allclose(design.finite_variation(distribution), found, rtol=1e-9)


def test_polynomial_features():
    x = tensor([[2.0, 3.0]])
    assert PolynomialFeatures(2)(x).tolist() == [[1, 2, 3, 4, 6, 9]]
    assert PolynomialFeatures(1)(x[..., None]).tolist() == [[1, 2, 3]]
    with pytest.raises(ValueError, match="degree of polynomial features must be 1 or 2, got 3"):
        PolynomialFeatures(3)


def test_random_fourier_features_stand_for_a_gaussian_kernel():
    """Each product is at most 2 / count and its variance at most (2 / count)^2: five standard errors."""
    count, bandwidth = 20_000, 1.5
    phi = RandomFourierFeatures(count, bandwidth=bandwidth)(SAMPLES[:20])
    exact = torch.exp(-0.5 * torch.cdist(SAMPLES[:20], SAMPLES[:20]) ** 2 / bandwidth**2)
    torch.testing.assert_close(phi @ phi.T, exact, rtol=0, atol=5 * 2 / count**0.5)
    again = RandomFourierFeatures(5, seed=1)
    assert torch.equal(again(SAMPLES), RandomFourierFeatures(5, seed=1)(SAMPLES))
    assert not torch.equal(again(SAMPLES), RandomFourierFeatures(5, seed=2)(SAMPLES))
    assert again(SAMPLES.float()).dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"count": 0}, {"dimension": 0}, {"bandwidth": 0.0}])
def test_bad_random_features_are_refused(arguments):
    with pytest.raises(ValueError, match="random features"):
        RandomFourierFeatures(**arguments)


@criteria
def test_a_singular_information_matrix_is_refused_with_its_condition(criterion):
    few = Distribution(None, SAMPLES[:3])
    with pytest.raises(SingularDesign, match=r"6 features is singular \(condition number .* at ridge 0\)"):
        OptimalDesign(criterion, ridge=0.0).value(few)
    with pytest.raises(SingularDesign, match="raise the ridge"):
        OptimalDesign(criterion, ridge=0.0).linearise(few)
    assert np.isfinite(OptimalDesign(criterion, ridge=1e-3).value(few))


def test_samples_in_single_precision_are_taken_in_double():
    single = Distribution(None, SAMPLES.float())
    design = OptimalDesign("trace")
    assert design.value(single) == pytest.approx(design.value(DISTRIBUTION), rel=1e-5)
    variation = design.linearise(single)
    assert variation.value(single.samples).dtype == torch.float32
    assert variation.gradient(single.samples).dtype == torch.float32
