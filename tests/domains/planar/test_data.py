import numpy as np
import torch

from closed_forms import Mixture, generator
from flowtilt.domains.planar.data import GaussianMixture

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
