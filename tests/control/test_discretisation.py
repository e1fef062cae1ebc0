"""What the time steps of Adjoint Matching leave of a tilt: by quadrature, and by training."""

import numpy as np
import pytest
import torch

from closed_forms import (
    PATHS,
    Mixture,
    MixtureFlow,
    Quadratic,
    generator,
    halving_orders,
    matched_distribution,
    tensor,
)
from flowtilt.control import discretisation
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, _targets, loss_scale, solve
from flowtilt.control.discretisation import discretisation_bias
from flowtilt.control.endpoints import Terminal
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.interpolants import Columnwise, Cosine, Linear, time_grid
from flowtilt.sampling import memoryless_steps

MODES = Mixture.of([0.5, 0.5], [[-1.0], [1.0]], [[[0.1]], [[0.1]]])
REWARD = Quadratic([discretisation.SLOPE])

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def errors(path, counts, data_variance=1.0, **changes):
    """Reached weights less the exact one, by numbers of equal steps, all steps counting alike in the loss."""
    found = []
    for steps in counts:
        settings = AdjointMatchingSettings(steps=steps, rest_share=1.0, **changes)
        weight = discretisation_bias(path, tuple(time_grid(steps)), data_variance, settings)
        found.append(weight.reached - weight.exact)
    return found


def test_the_exact_weight_is_the_closed_form_s():
    weight = discretisation_bias(PATHS["vp"], tuple(time_grid(5)))
    assert weight.exact == pytest.approx(float(MODES.tilted(REWARD, 1.0).weights[1]), rel=1e-12)
    assert weight.exact == pytest.approx(0.828, abs=5e-4)


@paths
def test_ten_steps_have_a_smaller_bias_than_forty_of_the_steps_own_moves(path):
    """And at equal cost, 20 steps, less than a third of theirs."""
    before = errors(path, (20, 40), target="step")
    now = errors(path, (10, 20))
    assert before[0] < before[1] < -0.015
    assert abs(now[0]) < 0.6 * abs(before[1])
    assert abs(now[1]) < abs(before[0]) / 3


@paths
@pytest.mark.parametrize("adjoint", ["lean", "posterior_mean"])
def test_the_weights_at_the_shipped_steps(path, adjoint):
    """Within 0.01 of 0.828 at any number of steps, where the step's move leaves up to 0.15."""
    for data_variance in (0.0, 1.0) if path == PATHS["linear"] else (1.0,):
        found = errors(path, (10, 20), data_variance, adjoint=adjoint)
        former = errors(path, (10, 20), data_variance, adjoint=adjoint, target="step")
        assert max(map(abs, found)) < 0.01
        assert former[0] < former[1] < -0.015


@pytest.mark.parametrize("count", [2, 7, 20])
@paths
def test_gaussian_data_and_a_linear_tilt_have_the_exact_velocity_at_any_number_of_steps(path, count):
    """``v* - v = eta alpha c / (alpha^2 S + beta^2)``, which the step's move misses by an order of one."""
    distribution = Mixture.gaussian([0.5], [[0.4]])
    reward = Quadratic([0.8])
    base, tilted = (MixtureFlow(path, m) for m in (distribution, distribution.tilted(reward, 1.0)))
    steps, chosen = memoryless_steps(base, count), torch.arange(1, count)
    trajectories = torch.randn(count + 1, 5, 1, generator=generator(0), dtype=torch.float64)
    terminal = Terminal(-reward.gradient(trajectories[-1]))
    misses = {}
    for target in ("state", "step"):
        adjoints, velocities = _targets(base, trajectories, terminal, steps, chosen, None, "lean", target)
        scale = loss_scale(base, steps, target)
        asked = velocities - (scale.noise / scale.mean)[chosen, None, None] * adjoints
        times = tensor(time_grid(count))[chosen]
        exact = torch.stack([tilted.velocity(x, t) for x, t in zip(trajectories[chosen], times, strict=True)])
        misses[target] = float((asked - exact).abs().max())
    assert misses["state"] < 1e-12
    assert misses["step"] > 0.01


def test_the_mean_that_a_linear_tilt_reaches_is_nearer_at_every_number_of_steps():
    distribution, reward = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]]), Quadratic([1.0, 0.5])
    flow, exact = MixtureFlow(PATHS["linear"], distribution), distribution.tilted(reward, 1.0).mean
    for steps in (10, 20, 40):
        found = {
            t: float((matched_distribution(flow, reward, 1.0, steps, t)[0] - exact).norm())
            for t in ("state", "step")
        }
        assert found["state"] < found["step"]


class TwoModes(MixtureFlow):
    """Weights and means are its parameters: every tilt by a linear reward is in the family."""

    def __init__(self, path):
        super().__init__(path, MODES, trainable=True)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("target", ["state", "step"])
def test_a_trained_model_that_holds_the_optimum_ends_where_the_quadrature_says(target):
    path, steps = PATHS["linear"], 10
    settings = AdjointMatchingSettings(
        steps=steps,
        updates=150,
        batch=512,
        pool=512,
        learning_rate=0.05,
        ramp=0.0,
        gradient_clip=10.0,
        target=target,
    )
    solution = solve(TwoModes(path), RewardVariation(REWARD), 1.0, settings, generator(0))
    trained = float(torch.softmax(solution.model.logits, 0)[1])
    expected = discretisation_bias(path, tuple(time_grid(steps)), 1.0, settings)
    # Seeds differ by 0.003; the two targets by ten times that.
    assert trained == pytest.approx(expected.reached, abs=0.01)


def test_the_quadrature_is_converged(monkeypatch):
    coarse = errors(PATHS["vp"], (10,))[0], errors(PATHS["vp"], (10,), target="step")[0]
    nodes, shares = np.polynomial.hermite_e.hermegauss(31)
    monkeypatch.setattr(discretisation, "_POINTS", 501)
    monkeypatch.setattr(discretisation, "_NODES", nodes)
    monkeypatch.setattr(discretisation, "_SHARES", shares / shares.sum())
    discretisation._reached.cache_clear()
    fine = errors(PATHS["vp"], (10,))[0], errors(PATHS["vp"], (10,), target="step")[0]
    discretisation._reached.cache_clear()
    assert coarse == pytest.approx(fine, abs=5e-4)


def test_paths_by_columns_are_taken_at_their_first_and_what_is_known_is_kept():
    times = tuple(time_grid(6, 2.0))
    one = discretisation_bias(Linear(), times)
    assert discretisation_bias(Columnwise(((Linear(), 3), (Cosine(2.0), 4))), times) is one


@pytest.mark.slow_after(1)
@paths
def test_where_modes_overlap_the_bias_has_order_one_and_a_tenth_of_the_size(path, monkeypatch):
    """Where the velocity is smooth on the scale of the noise, halving the steps halves what is left."""
    monkeypatch.setattr(discretisation, "VARIANCE", 0.5)
    discretisation._reached.cache_clear()
    found = {target: errors(path, (10, 20, 40), target=target) for target in ("state", "step")}
    discretisation._reached.cache_clear()
    for biases in found.values():
        assert halving_orders(biases) == pytest.approx([1, 1], abs=0.1)
    for now, former in zip(found["state"], found["step"], strict=True):
        assert abs(now) < 0.11 * abs(former)
