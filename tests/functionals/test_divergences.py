import numpy as np
import pytest
import torch
from scipy.stats import energy_distance

from closed_forms import (
    PATHS,
    Mixture,
    MixtureFlow,
    chain_distribution,
    generator,
    halving_orders,
    pushforward,
    tensor,
)
from flowtilt.functionals import kernels
from flowtilt.functionals.base import Distribution, FiniteDistribution
from flowtilt.functionals.divergences import KL, MMD, ReferenceDraw, Renyi, ScoreDifference
from flowtilt.functionals.kernels import KERNELS, gaussian, kernel_matrix, kernel_means
from mode_flow import ModeFlow

P = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
Q = Mixture.gaussian([-0.2, 0.1], [[0.7, -0.1], [-0.1, 1.2]])
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def gaussian_score(distribution, path, t, x):
    """Score at time t of the path of a Gaussian, from its covariance alone."""
    alpha, beta = path.alpha(tensor(t)), path.beta(tensor(t))
    precision = torch.linalg.inv(alpha**2 * distribution.covariance + beta**2 * tensor(torch.eye(2)))
    return (alpha * distribution.mean - x) @ precision


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
        found = KL(MixtureFlow(path, Q), 1 - gap).linearise(Distribution(MixtureFlow(path, P), x)).gradient(x)
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
@pytest.mark.slow_after(1)
def test_the_value_of_kl_against_the_closed_form(path):
    p, q = MixtureFlow(path, P), MixtureFlow(path, Q)
    distributions = [pushforward(path, distribution, 0.0, 1.0) for distribution in (P, Q)]
    count = 4000
    x = distributions[0].sample(count, generator(0))
    ratios = distributions[0].log_density(x) - distributions[1].log_density(x)
    value = KL(q).value(Distribution(p, x))
    # On these samples: the log-likelihoods' error of less than 1e-3. Over samples: four standard errors.
    assert value == pytest.approx(float(ratios.mean()), abs=1e-3)
    noise = 4 * float(ratios.std()) / count**0.5
    assert value == pytest.approx(divergence_of_gaussians(*distributions), abs=noise + 1e-3)
    assert KL(p).value(Distribution(p, x[:10])) == 0


FLOWS = MixtureFlow(PATHS["linear"], P), MixtureFlow(PATHS["linear"], Q)
NEAR = 1 - 1e-4  # where the likelihood's ODE begins


def renyi_of_gaussians(p, q, order):
    """Closed form (Gil et al. 2013)."""
    mixed, shift = order * q.covariance + (1 - order) * p.covariance, q.mean - p.mean
    logs = torch.logdet(mixed) - (1 - order) * torch.logdet(p.covariance) - order * torch.logdet(q.covariance)
    return float(0.5 * order * shift @ torch.linalg.inv(mixed) @ shift - 0.5 / (order - 1) * logs)


@pytest.mark.parametrize("order", [0.5, 0.9, 1.1, 1.5])
def test_the_value_of_renyi_against_the_closed_form(order):
    count = 3000
    x = P.sample(count, generator(0))
    powers = torch.exp((order - 1) * (P.log_density(x) - Q.log_density(x)))
    value = Renyi(FLOWS[1], order, samples=count).value(Distribution(FLOWS[0], x))
    # On these samples: the error of a mean log ratio, below 1e-3. Over samples: four standard errors.
    assert value == pytest.approx(float(powers.mean().log()) / (order - 1), abs=1e-3)
    noise = 4 * float(powers.std() / powers.mean()) / count**0.5 / abs(order - 1)
    assert value == pytest.approx(renyi_of_gaussians(P, Q, order), abs=noise + 1e-3)


def test_renyi_meets_kl_at_order_one():
    x = P.sample(300, generator(1))
    kl = KL(FLOWS[1]).value(Distribution(FLOWS[0], x))
    values = [Renyi(FLOWS[1], order).value(Distribution(FLOWS[0], x)) for order in (1 - 1e-5, 1 + 1e-5)]
    # It deviates by half the variance of the log ratio times the distance from 1.
    assert values == pytest.approx([kl, kl], abs=1e-4)
    gradients = [
        functional.linearise(Distribution(FLOWS[0], x)).gradient(x)
        for functional in (Renyi(FLOWS[1], 1 + 1e-6), KL(FLOWS[1]))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [0.5, 2.0])
def test_the_first_variation_of_renyi_against_exact_densities(order):
    x = P.sample(200, generator(0))
    at = P.sample(30, generator(1)).requires_grad_(True)
    log_ratio = P.log_density(at) - Q.log_density(at)
    powers = torch.exp((order - 1) * (P.log_density(x) - Q.log_density(x)))
    expected = order / (order - 1) * torch.exp((order - 1) * log_ratio) / powers.mean()
    (slope,) = torch.autograd.grad(expected.sum(), at)
    variation = Renyi(FLOWS[1], order, NEAR).linearise(Distribution(FLOWS[0], x))
    # Log densities to 1e-3, scores to 1e-3 of their size.
    torch.testing.assert_close(variation.value(at.detach()), expected.detach(), rtol=3e-3, atol=0)
    scale = float(slope.abs().max())
    torch.testing.assert_close(variation.gradient(at.detach()), slope, rtol=3e-3, atol=1e-3 * scale)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("order", [0.3, 0.9, 2.0, None])
def test_points_without_mass_are_the_limit_of_little_mass(order):
    """Points 1 and 3 have no mass under p, 3 none under the reference either; 0 has none there alone."""
    p, q = np.array([0.2, 0.0, 0.8, 0.0]), np.array([0.1, 0.3, 0.6, 0.0])
    functional = KL(None) if order is None else Renyi(None, order)

    def distribution(p, q):
        with np.errstate(divide="ignore"):
            return FiniteDistribution(torch.zeros(4, 1), np.log(p), np.log(q))

    empty = distribution(p, q)
    little = distribution((p + 1e-15) / (p + 1e-15).sum(), (q + 1e-15) / (q + 1e-15).sum())
    assert functional.finite_value(empty) == pytest.approx(functional.finite_value(little), abs=1e-4)
    found, limit = (functional.finite_variation(some) for some in (empty, little))
    np.testing.assert_allclose(found[[0, 2, 3]], limit[[0, 2, 3]], rtol=1e-3, atol=1e-3)
    if order is None or order < 1:  # infinite there, as the limit is, logarithmically for the KL
        assert np.isneginf(found[1])
        assert limit[1] < (-1e3 if order == 0.3 else -20)
    else:
        assert found[1] == pytest.approx(limit[1], abs=1e-9)


def test_renyi_takes_the_first_samples_only():
    x = P.sample(50, generator(0))
    few = Renyi(FLOWS[1], 2.0, samples=20)
    assert few.value(Distribution(FLOWS[0], x)) == few.value(Distribution(FLOWS[0], x[:20]))
    assert few.value(Distribution(FLOWS[0], x)) != few.value(Distribution(FLOWS[0], x[:19]))


@pytest.mark.parametrize("order", [1.0, 0.0, -2.0, float("nan"), float("inf")])
def test_orders_without_a_renyi_divergence_are_refused(order):
    with pytest.raises(ValueError, match=f"positive and not 1, got {order}; its limit at 1 is the KL"):
        Renyi(FLOWS[1], order)


STANDARD = MixtureFlow(PATHS["vp"], Mixture.gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))


def mean_kernel(p, q, bandwidth):
    """``E exp(-|x - y|^2 / (2 h^2))`` of two Gaussians, given as (mean, covariance)."""
    spread = torch.eye(2).double() + (p[1] + q[1]) / bandwidth**2
    shift = (p[0] - q[0]) / bandwidth
    return float(torch.exp(-0.5 * shift @ torch.linalg.inv(spread) @ shift) / torch.linalg.det(spread).sqrt())


@pytest.mark.parametrize("bandwidth", [0.5, 2.0])
def test_the_value_of_mmd_between_gaussians(bandwidth):
    """Squared, the V-statistic has the mean ``MMD^2 + sum (1 - E k) / N``, one term for each distribution."""
    count, steps = 2000, 20
    functional = MMD(STANDARD, "gaussian", bandwidth, ReferenceDraw(count, steps))
    far = Mixture.gaussian([1.5, -1.0], P.covariance)
    x = far.sample(count, generator(0))
    found = functional.value(Distribution(None, x))
    p, q = (far.mean, far.covariance), chain_distribution(STANDARD, steps)
    own, cross, other = (mean_kernel(a, b, bandwidth) for a, b in ((p, p), (p, q), (q, q)))
    bias = (2 - own - other) / count
    witness = functional.linearise(Distribution(None, x))
    spreads = [float(witness.value(v).var()) * found**2 for v in (x, functional.draw.of(STANDARD))]
    # Four standard errors of the squared discrepancy, to first order in the witness.
    noise = 4 * 2 * (sum(spreads) / count) ** 0.5
    assert found**2 == pytest.approx(own - 2 * cross + other + bias, abs=noise)
    assert noise < 0.15 * found**2


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_of_samples_is_that_of_their_finite_distribution(kernel):
    functional = MMD(STANDARD, kernel, 0.7, ReferenceDraw(30, 5))
    x, y = P.sample(40, generator(0)), functional.draw.of(STANDARD)
    with np.errstate(divide="ignore"):
        own, other = (np.log(np.repeat(mass, (40, 30))) for mass in ([1 / 40, 0], [0, 1 / 30]))
    finite = FiniteDistribution(torch.cat([x, y]), own, other)
    distribution = Distribution(None, x)
    assert functional.value(distribution) == pytest.approx(functional.finite_value(finite), rel=1e-10)
    values = functional.linearise(distribution).value(finite.points).numpy()
    np.testing.assert_allclose(values, functional.finite_variation(finite), atol=1e-10)


def test_the_gradient_of_the_witness_against_its_formula():
    bandwidth = 0.7
    functional = MMD(STANDARD, "gaussian", bandwidth, ReferenceDraw(50, 5))
    x, y = P.sample(60, generator(0)), functional.draw.of(STANDARD)
    at = P.sample(20, generator(1))
    witness = functional.linearise(Distribution(None, x))

    def slope(of):
        difference = (at[:, None] - of[None]) / bandwidth
        kernel = torch.exp(-0.5 * difference.square().sum(-1, keepdim=True))
        return -(kernel * difference / bandwidth).mean(1)

    expected = (slope(x) - slope(y)) / witness.size
    torch.testing.assert_close(witness.gradient(at), expected, rtol=1e-10, atol=1e-12)
    assert witness.gradient(at.float()).dtype == torch.float32


def test_the_energy_distance_against_scipy():
    random = np.random.default_rng(0)
    x, y = random.normal(size=40) + 1, random.normal(size=30)
    with np.errstate(divide="ignore"):
        own, other = (np.log(np.repeat(mass, (40, 30))) for mass in ([1 / 40, 0], [0, 1 / 30]))
    distribution = FiniteDistribution(tensor(np.concatenate([x, y]))[:, None], own, other)
    found = MMD(STANDARD, "energy").finite_value(distribution)
    assert found == pytest.approx(energy_distance(x, y), rel=1e-10)
    assert MMD(STANDARD, "energy", 4.0).finite_value(distribution) == pytest.approx(found / 2, rel=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_where_the_distributions_agree_the_witness_is_zero(kernel):
    functional = MMD(STANDARD, kernel, draw=ReferenceDraw(50, 5))
    x = functional.draw.of(STANDARD)
    assert functional.value(Distribution(None, x)) == 0
    variation = functional.linearise(Distribution(None, x))
    assert not variation.value(x).any()
    assert not variation.gradient(x).any()


def test_the_kernels():
    r = tensor([0.0, 1.0, 3.0])
    found = {name: kernel(r).tolist() for name, kernel in KERNELS.items()}
    assert found["gaussian"] == pytest.approx([1, np.exp(-0.5), np.exp(-4.5)])
    assert found["inverse_multiquadric"] == pytest.approx([1, 0.5**0.5, 0.1**0.5])
    assert found["energy"] == [0, -1, -3]


def test_kernel_means_by_blocks_are_the_means(monkeypatch):
    x, y = P.sample(23, generator(0)), P.sample(31, generator(1))
    whole = kernel_matrix(gaussian, x, y, 0.5).mean(1)
    monkeypatch.setattr(kernels, "BLOCK", 7)
    torch.testing.assert_close(kernel_means(gaussian, x, y, 0.5), whole, rtol=1e-13, atol=0)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="unknown kernel 'cauchy'; known kernels: gaussian, inverse_multi"):
        MMD(STANDARD, "cauchy")


def test_a_reference_draw_follows_its_seed_and_passes_contexts_on():
    draw = ReferenceDraw(20, 5)
    assert torch.equal(draw.of(STANDARD), draw.of(STANDARD))
    assert not torch.equal(draw.of(STANDARD), ReferenceDraw(20, 5, seed=1).of(STANDARD))
    assert draw.of(ModeFlow(PATHS["linear"], [P, Q])).shape == (20, 2)
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1, got 0"):
        ReferenceDraw(0, 5)
