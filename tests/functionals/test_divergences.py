import pytest
import torch

from closed_forms import PATHS, Mixture, MixtureFlow, generator, halving_orders, pushforward, tensor
from flowtilt.functionals.base import Law
from flowtilt.functionals.divergences import KL, ScoreDifference

P = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
Q = Mixture.gaussian([-0.2, 0.1], [[0.7, -0.1], [-0.1, 1.2]])
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def gaussian_score(law, path, t, x):
    """Score at time t of the path of a Gaussian, from its covariance alone."""
    alpha, beta = path.alpha(tensor(t)), path.beta(tensor(t))
    precision = torch.linalg.inv(alpha**2 * law.covariance + beta**2 * tensor(torch.eye(2)))
    return (alpha * law.mean - x) @ precision


@paths
@pytest.mark.parametrize("time", [0.5, 0.99, 0.9999])
def test_the_gradient_of_kl_is_the_difference_of_the_scores(path, time):
    flows = MixtureFlow(path, P), MixtureFlow(path, Q)
    x = P.sample(100, generator(0))
    expected = gaussian_score(P, path, time, x) - gaussian_score(Q, path, time, x)
    # Divided by eta, which is 1e-4 at the last time of the linear path.
    torch.testing.assert_close(ScoreDifference(*flows, time).gradient(x), expected, rtol=1e-10, atol=1e-10)


@paths
def test_the_default_time_stands_for_the_data_to_first_order(path):
    """``grad log p - grad log q`` of the data itself; the distance falls with 1 - t."""
    x = P.sample(100, generator(0))
    exact = gaussian_score(P, path, 1.0, x) - gaussian_score(Q, path, 1.0, x)
    errors = []
    for gap in (0.01, 0.002, 0.001, 0.0005):  # the later ones small enough to see the order
        found = KL(MixtureFlow(path, Q), 1 - gap).linearise(Law(MixtureFlow(path, P), x)).gradient(x)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert KL(MixtureFlow(path, Q)).score_time == 0.99
    assert errors[0] < 0.03
    assert halving_orders(errors[1:]) == pytest.approx([1, 1], abs=0.15)


def divergence_of_gaussians(p, q):
    """``KL(p || q)`` in closed form."""
    precision, shift = torch.linalg.inv(q.covariance), q.mean - p.mean
    logs = torch.logdet(q.covariance) - torch.logdet(p.covariance)
    return float(0.5 * ((precision @ p.covariance).trace() + shift @ precision @ shift - 2 + logs))


@paths
def test_the_value_of_kl_against_the_closed_form(path):
    p, q = MixtureFlow(path, P), MixtureFlow(path, Q)
    laws = [pushforward(path, law, 0.0, 1.0) for law in (P, Q)]
    count = 4000
    x = laws[0].sample(count, generator(0))
    ratios = laws[0].log_density(x) - laws[1].log_density(x)
    value = KL(q).value(Law(p, x))
    # On these samples: the log-likelihoods' error of less than 1e-3. Over samples: four standard errors.
    assert value == pytest.approx(float(ratios.mean()), abs=1e-3)
    noise = 4 * float(ratios.std()) / count**0.5
    assert value == pytest.approx(divergence_of_gaussians(*laws), abs=noise + 1e-3)
    assert KL(p).value(Law(p, x[:10])) == 0
