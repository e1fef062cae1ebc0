import pytest
import torch

from closed_forms import PATHS, generator
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.interpolants import convert
from flowtilt.sampling import log_likelihood, sample_sde

COMBINATIONS = [
    ("linear", "velocity"),
    ("linear", "endpoint"),
    ("vp", "velocity"),
    ("vp", "score"),
    ("vp", "noise"),
]


def network(path, prediction, seed=0, activation="silu"):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PlanarFlow(PATHS[path], (16, 16), activation, prediction)


@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_the_output_is_read_as_what_it_stands_for(path, prediction):
    model = network(path, prediction)
    x, t = torch.randn(9, 2, generator=generator(0)), torch.linspace(0.1, 0.9, 9)
    velocity = model.velocity(x, t)
    back = convert(velocity, x, t, PATHS[path], "velocity", prediction)
    # Single precision, and conversions that divide by coefficients of 0.03 and more.
    torch.testing.assert_close(back, model.predict(x, t), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.velocity(x[3:4], t[3]), velocity[3:4])


@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_samples_and_likelihoods_are_finite_from_end_to_end(path, prediction):
    model = network(path, prediction)
    trajectories = sample_sde(model, 64, 20, generator(0))
    assert trajectories.shape == (21, 64, 2)
    assert bool(torch.isfinite(trajectories).all())
    assert bool(torch.isfinite(log_likelihood(model, trajectories[-1])).all())


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_a_noise_regression_has_the_velocity_regression_as_a_reweighting(prediction):
    """``v - v' = (eta / beta) (n' - n)``: the same errors, weighed without the divergence near the data."""
    model = network("vp", prediction)
    path, rng = PATHS["vp"], generator(0)
    x1, x0 = (torch.randn(11, 2, generator=rng) for _ in range(2))
    t = torch.linspace(0.05, 0.95, 11)
    weight = (path.eta(t) / path.beta(t)) ** 2
    native = super(PlanarFlow, model).matching_residual(x1, x0, t).square().mean(1)
    torch.testing.assert_close(native, weight * model.matching_loss(x1, x0, t), rtol=1e-3, atol=1e-5)


def test_layers_and_activations_are_those_asked_for():
    model = PlanarFlow(PATHS["vp"])
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(512, 3), (512,), (512, 512), (512,), (256, 512), (256,), (2, 256), (2,)]
    assert sum(isinstance(m, torch.nn.ReLU) for m in model.modules()) == 3
    with pytest.raises(KeyError):
        PlanarFlow(PATHS["vp"], activation="tanh")
