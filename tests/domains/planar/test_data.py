import numpy as np
import torch

from closed_forms import Mixture, generator
from flowtilt.domains.planar.data import GaussianMixture, ModeMixtures

DATA = GaussianMixture(
    weights=np.array([3.0, 1.0]),
    means=np.array([[0.0, 1.0], [2.0, -1.0]]),
    deviations=np.array([[1.0, 0.6], [0.5, 0.3]]),
)
REFERENCE = Mixture.of([0.75, 0.25], DATA.means, np.array([np.diag(d**2) for d in DATA.deviations]))


def test_the_log_density_is_that_of_the_mixture():
    points = torch.randn(50, 3, 2, generator=generator(0), dtype=torch.float64)
    found = DATA.log_density(points.numpy())
    assert found.shape == (50, 3)
    np.testing.assert_allclose(found, REFERENCE.log_density(points).numpy(), rtol=1e-12)


def test_samples_have_its_mean_and_covariance():
    count = 100_000
    x = DATA.sample(count, generator(0)).double()
    # Five standard errors; coordinates have variances of up to 1.5 and fourth moments below 8.
    assert float((x.mean(0) - REFERENCE.mean).abs().max()) < 5 * (1.5 / count) ** 0.5
    assert float((x.T.cov() - REFERENCE.covariance).abs().max()) < 5 * (8 / count) ** 0.5


def test_modes_are_equally_likely_and_each_has_its_own_mixture():
    other = GaussianMixture(np.ones(1), np.array([[4.0, 4.0]]), np.array([[0.5, 2.0]]))
    data, count = ModeMixtures((DATA, other)), 100_000
    x, modes = data.sample(count, generator(0))
    # Five standard errors, as above: of a share of a half, and of half as many draws.
    assert float(modes.double().mean()) == np.clip(
        float(modes.double().mean()), *(0.5 + 2.5 / count**0.5 * s for s in (-1, 1))
    )
    for k, mean in enumerate((REFERENCE.mean.numpy(), [4.0, 4.0])):
        np.testing.assert_allclose(x[modes == k].double().mean(0), mean, atol=5 * (4 / (count / 2)) ** 0.5)
    points = np.random.default_rng(0).normal(size=(7, 3, 2))
    found = data.log_density(points)
    assert found.shape == (2, 7, 3)
    np.testing.assert_array_equal(found[0], DATA.log_density(points))
    np.testing.assert_array_equal(found[1], other.log_density(points))
