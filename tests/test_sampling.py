import math

import pytest
import torch

from closed_forms import (
    PATHS,
    AffineTable,
    ColumnwiseFlow,
    CorrectedFlow,
    Mixture,
    MixtureFlow,
    Stacked,
    chain_distribution,
    flow_map,
    generator,
    halving_orders,
    memoryless_limit,
    pushforward,
    relative_error,
    tensor,
)
from flowtilt.interpolants import Columnwise, Cosine, Linear, time_grid
from flowtilt.sampling import (
    OdeSettings,
    log_likelihood,
    sample_ode,
    sample_sde,
    sample_with_log_density,
)

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
MIXTURE = Mixture.of(
    [0.6, 0.4], [[-0.9, 0.0], [0.9, 0.3]], [[[0.25, 0.0], [0.0, 0.35]], [[0.2, 0.05], [0.05, 0.25]]]
)
MARGIN = OdeSettings().margin
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def test_the_time_grid_is_even_and_ends_exactly():
    assert time_grid(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert time_grid(7)[-1] == 1.0
    assert time_grid(4, 2) == [0.0, 1 - 0.75**2, 0.75, 1 - 0.25**2, 1.0]
    with pytest.raises(ValueError, match="at least one step"):
        time_grid(0)


@paths
@pytest.mark.parametrize("data_variance", [0.5, 1.0])
def test_the_memoryless_sampler_has_weak_order_one(path, data_variance):
    """Its distribution is Gaussian for Gaussian data and known from a recursion: no sampling error."""
    _, limit = memoryless_limit(path, GAUSSIAN)
    errors = []
    for steps in (40, 80, 160, 320):
        _, covariance = chain_distribution(MixtureFlow(path, GAUSSIAN, data_variance), steps)
        errors.append(float(torch.linalg.norm(covariance - limit)))
    # The observed order is off by a term of the size of one step; 0.05 is twice the coarsest.
    assert halving_orders(errors) == pytest.approx([1, 1, 1], abs=0.05)


@paths
@pytest.mark.slow
def test_the_narrowest_memoryless_sampler_reaches_order_one_more_slowly(path):
    """DDIM's noise misses variance of order h log(1/h) relative to the wider steps' h."""
    _, limit = memoryless_limit(path, GAUSSIAN)
    errors = []
    for steps in (160, 320, 640, 1280):
        _, covariance = chain_distribution(MixtureFlow(path, GAUSSIAN, 0.0), steps)
        errors.append(float(torch.linalg.norm(covariance - limit)))
    orders = halving_orders(errors)
    assert orders == sorted(orders)
    assert 0.93 < orders[0] < orders[-1] < 1


@paths
@pytest.mark.parametrize("data_variance", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_the_memoryless_sampler_has_the_exact_mean_with_any_number_of_steps(path, data_variance, steps):
    """Every step is linear in the exact posterior mean, and the means of the path are consistent."""
    limit, _ = memoryless_limit(path, GAUSSIAN)
    mean, _ = chain_distribution(MixtureFlow(path, GAUSSIAN, data_variance), steps)
    torch.testing.assert_close(mean, limit, rtol=0, atol=1e-12)


@paths
def test_sde_samples_have_the_distribution_of_the_recursion(path):
    flow, count = MixtureFlow(path, GAUSSIAN), 40_000
    trajectories = sample_sde(flow, count, 10, generator(0))
    assert trajectories.shape == (11, count, 2)
    mean, covariance = chain_distribution(flow, 10)
    samples = trajectories[-1]
    # Five standard errors of a mean and of a variance.
    deviation = covariance.diagonal().max().sqrt()
    assert float((samples.mean(0) - mean).abs().max()) < 5 * deviation / math.sqrt(count)
    assert float((samples.T.cov() - covariance).abs().max()) < 5 * deviation**2 * math.sqrt(2 / count)


@paths
def test_sde_samples_of_a_mixture_have_its_weights_mean_and_covariance(path):
    count = 20_000
    x = sample_sde(MixtureFlow(path, MIXTURE), count, 80, generator(0))[-1]
    share = float((x[:, 0] > 0).double().mean())
    reference = MIXTURE.sample(400_000, generator(1))
    # Five standard errors (0.018), and 0.01 for the order-one error of 80 steps.
    assert share == pytest.approx(float((reference[:, 0] > 0).double().mean()), abs=0.028)
    assert float(torch.linalg.norm(x.mean(0) - MIXTURE.mean)) < 0.045
    assert relative_error(x.T.cov(), MIXTURE.covariance) < 0.03


APART = Columnwise(((Linear(), 1), (Cosine(2.0), 1)))
"""Two columns on paths of their own, as a molecule's coordinates and types have them in FlowMol."""


def test_a_sampler_begins_at_the_start_of_the_path():
    flow = ColumnwiseFlow(APART, GAUSSIAN)
    times = flow.time_grid(4)
    assert times[0] == APART.start == Cosine(2.0).start
    assert times[-1] == 1
    assert times[1] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("data_variance", [0.5, 1.0])
def test_the_memoryless_sampler_has_weak_order_one_with_columns_apart(data_variance):
    errors = []
    for steps in (40, 80, 160, 320):
        _, covariance = chain_distribution(ColumnwiseFlow(APART, GAUSSIAN, data_variance), steps)
        errors.append(float(torch.linalg.norm(covariance - GAUSSIAN.covariance)))
    # Half powers of the time that is left are in the path of the second column.
    orders = halving_orders(errors)
    assert orders == pytest.approx([1, 1, 1], abs=0.3)
    assert orders[-1] == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.02


def test_samples_with_columns_apart_have_the_distribution_of_the_recursion():
    flow, count = ColumnwiseFlow(APART, GAUSSIAN), 40_000
    samples = sample_sde(flow, count, 10, generator(0))[-1]
    mean, covariance = chain_distribution(flow, 10)
    deviation = covariance.diagonal().max().sqrt()
    assert float((samples.mean(0) - mean).abs().max()) < 5 * deviation / math.sqrt(count)
    assert float((samples.T.cov() - covariance).abs().max()) < 5 * deviation**2 * math.sqrt(2 / count)
    # Every step keeps the exact mean, but for what the start is off the noise.
    torch.testing.assert_close(mean, GAUSSIAN.mean, rtol=0, atol=1e-5)


def test_the_score_with_columns_apart_follows_from_the_velocity():
    flow, x = ColumnwiseFlow(APART, GAUSSIAN), tensor([[0.3, -1.0], [1.2, 0.4], [-2.0, 0.1]])
    for t in (tensor(0.3), tensor([0.1, 0.5, 0.9])):
        torch.testing.assert_close(flow.score(x, t), flow.exact_score(x, t), rtol=1e-9, atol=1e-9)


def test_the_ode_carries_noise_to_data_with_columns_apart():
    """The end of the ODE is a Gaussian whose mean and covariance an affine map of the noise gives."""
    flow = ColumnwiseFlow(APART, GAUSSIAN)
    flow.time_power = 2.0
    probes = torch.eye(3, dtype=torch.float64)[:, 1:]
    flow.prior = lambda count, generator, context=None: probes
    origin, *images = sample_ode(flow, 3, generator(0), settings=OdeSettings(steps=50))
    jacobian = torch.stack(images, dim=1) - origin[:, None]
    # What the margins leave out, of 1e-4 of the way each.
    torch.testing.assert_close(origin, GAUSSIAN.mean, rtol=0, atol=4 * MARGIN)
    torch.testing.assert_close(jacobian @ jacobian.T, GAUSSIAN.covariance, rtol=0, atol=8 * MARGIN)


@paths
def test_the_ode_solver_has_order_four(path):
    flow = MixtureFlow(path, GAUSSIAN)
    exact = flow_map(path, GAUSSIAN, flow.prior(100, generator(0)), MARGIN, 1 - MARGIN)
    errors = []
    for steps in (10, 20, 40, 80):
        x = sample_ode(flow, 100, generator(0), settings=OdeSettings(steps))
        errors.append(float((x - exact).abs().max()))
    # The first and last steps are shorter by the margin, and the coarsest pair feels the fifth order.
    assert halving_orders(errors)[1:] == pytest.approx([4, 4], abs=0.15)
    assert errors[-1] < 1e-7


@paths
def test_the_log_likelihood_has_order_four(path):
    flow = MixtureFlow(path, GAUSSIAN)
    exact = pushforward(path, GAUSSIAN, MARGIN, 1 - MARGIN)
    x = exact.sample(100, generator(0))
    errors = []
    for steps in (20, 40, 80):
        found = log_likelihood(flow, x, settings=OdeSettings(steps))
        errors.append(float((found - exact.log_density(x)).abs().max()))
    assert halving_orders(errors) == pytest.approx([4, 4], abs=0.3)


@paths
def test_the_log_likelihood_of_a_gaussian_flow(path):
    """The flow carries N(0, I) to a Gaussian: the data's on the linear path, one close to it on the other."""
    flow = MixtureFlow(path, GAUSSIAN)
    x = GAUSSIAN.sample(500, generator(0))
    exact = pushforward(path, GAUSSIAN, 0.0, 1.0)
    # The solver stops a margin of 1e-4 short of both ends, where log-densities move at rates of a few.
    assert float((log_likelihood(flow, x) - exact.log_density(x)).abs().max()) < 1e-3
    if isinstance(path, Linear):
        torch.testing.assert_close(exact.covariance, GAUSSIAN.covariance)
        torch.testing.assert_close(exact.mean, GAUSSIAN.mean)


def test_the_log_likelihood_of_a_mixture_on_the_linear_path():
    x = MIXTURE.sample(500, generator(0))
    found = log_likelihood(MixtureFlow(PATHS["linear"], MIXTURE), x)
    assert float((found - MIXTURE.log_density(x)).abs().max()) < 1e-3


@paths
@pytest.mark.parametrize("distribution", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_samples_come_with_the_log_density_that_the_likelihood_finds(path, distribution):
    flow = MixtureFlow(path, distribution)
    x, log_density = sample_with_log_density(flow, 300, generator(0))
    torch.testing.assert_close(x, sample_ode(flow, 300, generator(0)))
    # Both solve the same ODE, one in each direction, with a fourth-order error below 2e-6 at 50 steps.
    torch.testing.assert_close(log_density, log_likelihood(flow, x), rtol=0, atol=4e-6)


def test_a_velocity_that_does_not_depend_on_the_state_has_no_divergence():
    """A pure shift: the density of a shifted standard normal."""

    class Drift(MixtureFlow):
        def velocity(self, x, t, context=None):
            return torch.ones_like(x) * tensor([2.0, -1.0])

    flow = Drift(PATHS["linear"], GAUSSIAN)
    x = torch.randn(10, 2, generator=generator(0), dtype=torch.float64)
    shifted = Mixture.gaussian(tensor([2.0, -1.0]) * (1 - 2 * MARGIN), [[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(log_likelihood(flow, x), shifted.log_density(x))


def test_the_shape_of_the_state_does_not_matter():
    flat = CorrectedFlow(MixtureFlow(PATHS["vp"], MIXTURE), AffineTable(PATHS["vp"], 4))
    stacked = Stacked(flat)
    settings = OdeSettings(steps=4)
    a, b = sample_sde(flat, 5, 4, generator(0)), sample_sde(stacked, 5, 4, generator(0))
    assert b.shape == (5, 5, 2, 1)
    # The noise is drawn in the shape of the state, which orders it the same way here.
    torch.testing.assert_close(b[..., 0], a)
    x, log_density = sample_with_log_density(flat, 5, generator(0), settings=settings)
    y, same = sample_with_log_density(stacked, 5, generator(0), settings=settings)
    torch.testing.assert_close(y[..., 0], x)
    torch.testing.assert_close(same, log_density)
    torch.testing.assert_close(
        log_likelihood(stacked, y, settings=settings), log_likelihood(flat, x, settings=settings)
    )


class Carried(MixtureFlow):
    """A flow whose velocity is its context: one vector a sample, constant in state and time."""

    def velocity(self, x, t, context=None):
        return context

    def select_context(self, context, index):
        return context[index]


def test_every_sample_keeps_its_own_context():
    """Long batches are cut into chunks; each chunk must see its own part of the context."""
    flow, count = Carried(PATHS["linear"], GAUSSIAN), 2500
    context = torch.arange(2.0 * count, dtype=torch.float64).reshape(count, 2)
    ends = sample_ode(flow, count, generator(0), context)
    # Priors are at most 6 away from 0; neighbouring contexts differ by 2.
    assert float((ends - (1 - 2 * MARGIN) * context).abs().max()) < 6
    trajectories = sample_sde(flow, count, 1, generator(0), context)
    # One step of the linear path from t = 0 is x_1 = x_0 + v: the predicted endpoint.
    torch.testing.assert_close(trajectories[1] - trajectories[0], context)
