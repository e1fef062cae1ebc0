import numpy as np
import pytest
import torch

from closed_forms import PATHS, generator
from flowtilt.domains.planar.data import GaussianMixture, ModeMixtures
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.interpolants import convert
from flowtilt.pretraining import PretrainingSettings, fit_flow
from flowtilt.sampling import OdeSettings, log_likelihood, sample_ode, sample_sde

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
    with pytest.raises(ValueError, match="the activation must be relu or silu, got 'tanh'"):
        PlanarFlow(PATHS["vp"], activation="tanh")


# --- Modes -------------------------------------------------------------------------------------

CENTRES = torch.tensor([[-1.0, 0.5], [2.0, 0.0], [0.0, -1.5]])


def gaussian_log_density(x, centres):
    return -0.5 * (x - centres).square().sum(1) - np.log(2 * np.pi)


def shifts():
    """A flow by weights: on the linear path, the velocity that moves the noise to ``CENTRES[z]``.

    The only path from the inputs leads through the mode's own unit, which is 1 or 0.
    """
    model = PlanarFlow(PATHS["linear"], (3,), "relu", "velocity", modes=3)
    first, last = model.network[0], model.network[2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first.weight[:, 3:] = torch.eye(3)
        last.weight[:] = CENTRES.T
    return model


def test_likelihoods_given_a_mode_are_those_of_its_own_gaussian():
    model = shifts()
    x, modes = torch.randn(64, 2, generator=generator(0)), model.draw_context(64, generator(1))
    settings = OdeSettings(steps=4, margin=1e-6)  # the velocity is constant: no step errs
    torch.testing.assert_close(
        log_likelihood(model, x, modes, settings),
        gaussian_log_density(x, CENTRES[modes]).float(),
        rtol=1e-5,
        atol=1e-4,
    )


def test_samples_come_from_their_own_mode_in_all_chunks():
    model, count = shifts(), 5000
    modes = model.draw_context(count, generator(0))
    assert modes.dtype == torch.long
    # Five standard errors of a share of a third.
    assert (torch.bincount(modes) / count).numpy() == pytest.approx(
        [1 / 3] * 3, abs=5 * (2 / 9 / count) ** 0.5
    )
    for x in (
        sample_ode(model, count, generator(1), modes),
        sample_sde(model, count, 10, generator(1), modes)[-1],
    ):
        for k, centre in enumerate(CENTRES):
            # Five standard errors of a mean of some 1,600 points, of variance about 1.
            assert float((x[modes == k].mean(0) - centre).abs().max()) < 0.15
    index = torch.tensor([4, 0, 4])
    assert torch.equal(model.select_context(modes, index), modes[index])


def test_times_of_one_and_of_all_samples_see_the_same_modes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PlanarFlow(PATHS["vp"], (16, 16), "silu", "score", modes=2)
    x, modes = torch.randn(9, 2, generator=generator(0)), torch.arange(9) % 2
    one = model.predict(x, torch.tensor(0.3), modes)
    torch.testing.assert_close(one, model.predict(x, torch.full((9,), 0.3), modes))
    # The first layer is linear in a one-hot input.
    with torch.no_grad():
        inputs = torch.cat([x, torch.full((9, 1), 0.3), torch.nn.functional.one_hot(modes, 2)], dim=1)
        torch.testing.assert_close(one, model.network(inputs))


@pytest.mark.parametrize("context", [None, torch.zeros(3, dtype=torch.long), 1])
def test_a_flow_with_modes_asks_for_the_mode_of_each_sample(context):
    model = PlanarFlow(PATHS["vp"], (8,), modes=2)
    with pytest.raises(ValueError, match=r"2 modes needs the mode of each of the 4 samples.*draw_context"):
        model.velocity(torch.zeros(4, 2), torch.tensor(0.5), context)


def test_a_flow_without_modes_draws_nothing():
    model, random = network("vp", "score"), generator(0)
    before = random.get_state()
    assert model.draw_context(5, random) is None
    assert torch.equal(random.get_state(), before)
    assert model.network[0].weight.shape == (16, 3)


def test_pretraining_gives_each_mode_its_own_distribution():
    """Two unit Gaussians, one standard deviation apart; a flow that ignored modes would err by 0.13 nats."""
    ones = np.ones((1, 2))
    data = ModeMixtures(tuple(GaussianMixture(np.ones(1), np.array([[m, 0.0]]), ones) for m in (-0.5, 0.5)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PlanarFlow(PATHS["vp"], (32, 32), "silu", "score", modes=2)
    fit_flow(model, data.sample, PretrainingSettings(400, 512, 4e-3), generator(0))
    for k, own in enumerate(data.each):
        x = own.sample(1000, generator(2))
        found = log_likelihood(model, x, torch.full((1000,), k), OdeSettings(steps=10)).double().numpy()
        assert float((own.log_density(x.numpy()) - found).mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_the_chain_rule_by_hand_is_that_of_autograd(path, prediction, activation):
    rng = generator(0)
    states, times = torch.randn(3, 7, 2, generator=rng).double(), torch.tensor([0.1, 0.5, 0.9]).double()
    model = network(path, prediction, activation=activation).double()
    by_hand, by_autograd = model.linearised(states, times), super(PlanarFlow, model).linearised(states, times)
    for k in range(3):
        (v, pull), (expected, reference) = by_hand(k), by_autograd(k)
        torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12)
        for _ in range(2):  # and again from the same pass
            a = torch.randn(7, 2, generator=rng).double()
            torch.testing.assert_close(pull(a), reference(a), rtol=1e-12, atol=1e-12)


def test_the_chain_rule_by_hand_knows_modes():
    model = PlanarFlow(PATHS["vp"], (16, 16), "silu", "score", modes=3).double()
    states, times, rng = torch.randn(1, 9, 2).double(), torch.tensor([0.5]).double(), generator(0)
    context, a = model.draw_context(9, rng), torch.randn(9, 2, generator=rng).double()
    (v, pull), (expected, reference) = (
        linearised(states, times, context)(0)
        for linearised in (model.linearised, super(PlanarFlow, model).linearised)
    )
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pull(a), reference(a), rtol=1e-12, atol=1e-12)
