import pytest
import torch
from torch import nn

from closed_forms import PATHS, CorrectedFlow, Mixture, MixtureFlow, generator, tensor

DISTRIBUTION = Mixture.of(
    [0.6, 0.4], [[-0.9, 0.0], [0.9, 0.3]], [[[0.25, 0.0], [0.0, 0.35]], [[0.2, 0.05], [0.05, 0.25]]]
)
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@paths
@pytest.mark.parametrize("t", [0.01, 0.5, 0.99])
def test_the_score_of_a_mixture_follows_from_its_velocity(path, t):
    flow = MixtureFlow(path, DISTRIBUTION)
    x = torch.randn(200, 2, generator=generator(0), dtype=torch.float64)
    # (v - kappa x) / eta loses at most the factor 1 / eta = 1e2 of the linear path at 0.99.
    torch.testing.assert_close(
        flow.score(x, tensor(t)), flow.exact_score(x, tensor(t)), rtol=1e-11, atol=1e-11
    )


@paths
def test_the_closed_form_score_is_the_gradient_of_the_path_density(path):
    """The oracle itself, against automatic differentiation of the mixture's density at a time."""
    t = tensor(0.6)
    alpha, beta = path.alpha(t), path.beta(t)
    covariances = alpha**2 * DISTRIBUTION.covariances + beta**2 * tensor(torch.eye(2))
    marginal = Mixture(DISTRIBUTION.weights, alpha * DISTRIBUTION.means, covariances)
    x = torch.randn(50, 2, generator=generator(0), dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(marginal.log_density(x).sum(), x)
    torch.testing.assert_close(MixtureFlow(path, DISTRIBUTION).exact_score(x.detach(), t), score)


class Shift(nn.Module):
    def forward(self, x, t):
        return torch.stack([x[:, 0] + x[:, 1] ** 2, torch.sin(x[:, 0]) + x[:, 1]], dim=1)


@paths
def test_the_matching_loss_is_least_at_the_exact_velocity(path):
    """Any other velocity adds its mean squared distance, since the exact one is a conditional mean."""
    rng, n = generator(0), 200_000
    x1, x0 = DISTRIBUTION.sample(n, rng), torch.randn(n, 2, generator=rng, dtype=torch.float64)
    t = tensor(0.1 + 0.8 * torch.arange(8).repeat_interleave(n // 8) / 7)
    exact = MixtureFlow(path, DISTRIBUTION)
    with torch.no_grad():
        excess = CorrectedFlow(exact, Shift()).matching_loss(x1, x0, t) - exact.matching_loss(x1, x0, t)
        at = t[:, None]
        distance = Shift()(path.alpha(at) * x1 + path.beta(at) * x0, t).square().mean(1)
    difference = excess - distance
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / n**0.5


def test_the_matching_loss_has_one_value_a_sample_whatever_the_shape_of_the_state():
    flow = CorrectedFlow(MixtureFlow(PATHS["linear"], DISTRIBUTION), Shift())
    rng = generator(0)
    x1, x0 = (torch.randn(7, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    t = torch.rand(7, generator=rng, dtype=torch.float64)
    losses = flow.matching_loss(x1, x0, t)
    assert losses.shape == (7,)
    single = flow.matching_loss(x1[2:3], x0[2:3], t[2:3])
    torch.testing.assert_close(losses[2:3], single)
