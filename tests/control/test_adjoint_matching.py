import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.stats import norm

from closed_forms import (
    PATHS,
    AffineFlow,
    AffineTable,
    ColumnwiseFlow,
    CorrectedFlow,
    Mixture,
    MixtureFlow,
    Perceptron,
    Quadratic,
    Stacked,
    chain_distribution,
    generator,
    halving_orders,
    matched_distribution,
    memoryless_limit,
    relative_error,
    tensor,
)
from flowtilt.control.adjoint_matching import (
    AdjointMatchingSettings,
    _clipped,
    _targets,
    lean_adjoint,
    loss_scale,
    posterior_mean_adjoint,
    solve,
    stratified_draw,
)
from flowtilt.control.base import TrainingDiverged
from flowtilt.control.endpoints import Ends, Terminal, likelihood_ratio_gradient
from flowtilt.functionals.base import FirstVariation, WeightedVariation
from flowtilt.functionals.utilities import Hinge, RewardVariation
from flowtilt.interpolants import Columnwise, Cosine, Linear, time_grid
from flowtilt.model import FlowModel
from flowtilt.rewards import Reward
from flowtilt.sampling import memoryless_steps, sample_sde

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
MIXTURE = Mixture.of(
    [0.6, 0.4], [[-0.9, 0.0], [0.9, 0.3]], [[[0.25, 0.0], [0.0, 0.35]], [[0.2, 0.05], [0.05, 0.25]]]
)
LINEAR = Quadratic([1.0, 0.5])
QUADRATIC = Quadratic([1.0, -0.5], [[1.5, 0.3], [0.3, 0.8]])
KL_WEIGHT = 1.3

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
rewards = pytest.mark.parametrize("reward", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])


def nonlinear_flow(path, seed=0):
    """A mixture's flow with a correction that is not zero, so that nothing is special about it."""
    correction = Perceptron(path, width=16, seed=seed)
    with torch.no_grad():
        for parameter in correction.parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)
            parameter.copy_(0.4 * noise)
    return CorrectedFlow(MixtureFlow(path, MIXTURE), correction).requires_grad_(False)


# --- Thinning a pool ---------------------------------------------------------------------------


@pytest.mark.parametrize("active_count", [0, 1, 3, 30, 250, 399, 400])
@pytest.mark.parametrize("batch", [2, 64, 399, 400])
def test_a_draw_is_a_batch_without_repetition_that_keeps_the_active_share_exactly(active_count, batch):
    active = torch.arange(400) < active_count
    draw = stratified_draw(active[torch.randperm(400, generator=generator(1))], batch, generator(0))
    active = active[torch.randperm(400, generator=generator(1))]
    assert len(draw.index) == len(draw.weights) == batch
    assert len(draw.index.unique()) == batch
    assert float(draw.weights.sum()) == pytest.approx(batch, rel=1e-6)
    assert float(draw.weights[active[draw.index]].sum()) / batch == pytest.approx(
        active_count / 400, rel=1e-6
    )
    # The few that carry a gradient are kept: all of them, up to half of the batch or more.
    assert int(active[draw.index].sum()) >= min(active_count, batch // 2)


@pytest.mark.parametrize("active_count", [0, 3, 150, 300])
def test_weighted_batch_means_are_unbiased_for_pool_means(active_count):
    pool, batch, draws = 300, 20, 4000
    rng = generator(0)
    active = torch.arange(pool) < active_count
    values = torch.randn(pool, generator=rng, dtype=torch.float64) + 5 * active
    means, seen = [], torch.zeros(pool)
    for _ in range(draws):
        draw = stratified_draw(active, batch, rng)
        means.append(float((values[draw.index] * draw.weights).mean()))
        seen[draw.index] += 1
    error = float(values.mean()) - np.mean(means)
    assert abs(error) < 4 * np.std(means) / math.sqrt(draws)
    # Within a stratum all samples are equally likely: counts are binomial, five deviations apart at most.
    for stratum in (active, ~active):
        if stratum.any():
            share = float(seen[stratum].mean()) / draws
            spread = (seen[stratum] / draws - share).abs().max()
            assert float(spread) < 5 * math.sqrt(share * (1 - share) / draws) + 1e-9


def test_thinning_keeps_rare_gradients_at_a_lower_variance_than_a_plain_subset():
    rng, pool, batch = generator(0), 1000, 50
    active = torch.arange(pool) < 10
    values = torch.where(active, 100.0, 0.0)
    drawn, plain = [], []
    for _ in range(500):
        draw = stratified_draw(active, batch, rng)
        drawn.append(float((values[draw.index] * draw.weights).mean()))
        plain.append(float(values[torch.randperm(pool, generator=rng)[:batch]].mean()))
    assert np.std(drawn) < 1e-5 < 0.5 < np.std(plain)


# --- The lean adjoint --------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("power", [1, 2])
def test_the_lean_adjoint_is_the_gradient_through_the_whole_chain_of_means(path, power):
    """With the noise held fixed, ``a_k`` is the derivative of ``-f(x_N)`` by ``x_k``."""
    flow, count = nonlinear_flow(path), 12
    flow.time_power = power
    steps = memoryless_steps(flow, count)
    rng = generator(2)
    states = [torch.randn(7, 2, generator=rng, dtype=torch.float64, requires_grad=True)]
    for t, step in zip(flow.time_grid(count)[:-1], steps, strict=True):
        x = states[-1]
        noise = step.noise * torch.randn(x.shape, generator=rng, dtype=x.dtype)
        states.append(step.state * x + step.velocity * flow.velocity(x, tensor(t)) + noise)
    gradients = torch.autograd.grad(-QUADRATIC.value(states[-1]).sum(), states)

    trajectories = torch.stack(states).detach()
    adjoints, velocities = lean_adjoint(
        flow, trajectories, Terminal(-QUADRATIC.gradient(trajectories[-1])), steps
    )
    # Float64 rounding over a dozen products of Jacobians of order one.
    torch.testing.assert_close(adjoints, torch.stack(gradients[1:]), rtol=1e-11, atol=1e-12)
    for k, t in enumerate(flow.time_grid(count)[:-1]):
        torch.testing.assert_close(velocities[k], flow.velocity(trajectories[k], tensor(t)))
    assert not adjoints.requires_grad
    assert not velocities.requires_grad


@paths
@pytest.mark.parametrize("moving", [[], [1, 4], list(range(6))], ids=["none", "some", "all"])
@pytest.mark.parametrize("target", ["state", "step"])
def test_samples_at_rest_are_left_out_of_the_adjoint_and_not_of_the_velocities(path, moving, target):
    """Their terminal value is zero, and the adjoint is linear in it."""
    flow = nonlinear_flow(path)
    steps = memoryless_steps(flow, 8)
    trajectories = sample_sde(flow, 6, 8, generator(0))
    terminal = torch.zeros(6, 2, dtype=torch.float64)
    terminal[moving] = torch.randn(len(moving), 2, generator=generator(1), dtype=torch.float64)
    chosen = torch.tensor([0, 3, 7])
    # a_{k+1} has the number k: of the state x_k of step k it is the one before.
    at = {"step": chosen, "state": torch.tensor([0, 2, 6])}[target]
    adjoints, velocities = lean_adjoint(flow, trajectories, Terminal(terminal), steps)
    whole = [adjoints[at], velocities[chosen]]
    targets = _targets(flow, trajectories, Terminal(terminal), steps, chosen, None, "lean", target)
    for ours, theirs in zip(targets, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    whole[0] = posterior_mean_adjoint(flow, trajectories, terminal, 8, at)
    targets = _targets(flow, trajectories, Terminal(terminal), steps, chosen, None, "posterior_mean", target)
    for ours, theirs in zip(targets, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_the_lean_adjoint_runs_through_the_base_along_trajectories_of_any_model():
    flow, other, count = nonlinear_flow(PATHS["vp"]), nonlinear_flow(PATHS["vp"], seed=5), 6
    steps = memoryless_steps(flow, count)
    trajectories = sample_sde(other, 3, count, generator(0))
    terminal = torch.randn(3, 2, generator=generator(1), dtype=torch.float64)
    adjoints, _ = lean_adjoint(flow, trajectories, Terminal(terminal), steps)
    for i in range(3):
        expected = terminal[i]
        for k in range(count - 1, 0, -1):
            jacobian = torch.autograd.functional.jacobian(
                lambda x, k=k: flow.velocity(x[None], tensor(k / count))[0], trajectories[k, i]
            )
            expected = steps[k].state * expected + steps[k].velocity * (jacobian.T @ expected)
            torch.testing.assert_close(adjoints[k - 1, i], expected)


@paths
@pytest.mark.parametrize("count", [2, 7, 40])
@pytest.mark.parametrize("data_variance", [0.0, 1.0])
@pytest.mark.parametrize("power", [1, 2.5])
def test_the_lean_adjoint_of_a_linear_reward_and_gaussian_data_is_exact_with_any_number_of_steps(
    path, count, data_variance, power
):
    """``a(t) = (alpha S Sigma^-1)^T a(1)``, the slope of ``E[x_1 | x_t]``, which every step conserves."""
    flow = MixtureFlow(path, GAUSSIAN, data_variance)
    flow.time_power = power
    steps = memoryless_steps(flow, count)
    terminal, s = tensor([[1.0, -2.0]]), GAUSSIAN.covariance
    adjoints, _ = lean_adjoint(flow, torch.zeros(count + 1, 1, 2).double(), Terminal(terminal), steps)
    for k, t in enumerate(tensor(flow.time_grid(count))[1:]):
        alpha, beta = path.alpha(t), path.beta(t)
        at_time = alpha**2 * s + beta**2 * torch.eye(2, dtype=torch.float64)
        limit = terminal @ (alpha * s @ torch.linalg.inv(at_time))
        torch.testing.assert_close(adjoints[k], limit, rtol=0, atol=1e-12)


@paths
@pytest.mark.parametrize("data_variance", [0.0, 1.0])
@pytest.mark.parametrize("power", [1, 2.5])
def test_the_adjoint_by_the_posterior_mean_is_that_of_gaussian_data(path, data_variance, power):
    flow, count, terminal = MixtureFlow(path, GAUSSIAN, data_variance), 7, tensor([[1.0, -2.0]])
    flow.time_power = power
    trajectories = torch.zeros(count + 1, 1, 2).double()
    lean, _ = lean_adjoint(flow, trajectories, Terminal(terminal), memoryless_steps(flow, count))
    chosen = torch.tensor([6, 0, 3])
    adjoints = posterior_mean_adjoint(flow, trajectories, terminal, count, chosen)
    torch.testing.assert_close(adjoints, lean[chosen], rtol=0, atol=1e-12)


@paths
def test_the_adjoint_by_the_posterior_mean_is_the_mean_of_the_lean_one_where_the_tilt_is_linear(path):
    """Over the ways on from one state that a mixture's flow may take, with far less noise: none."""
    flow, count, at, ways = MixtureFlow(path, MIXTURE), 160, 80, 4000
    steps, rng = memoryless_steps(flow, count), generator(0)
    x = tensor([[0.5, 0.2]]).expand(ways, 2)
    states = [torch.zeros_like(x)] * at + [x]
    for t, step in zip(flow.time_grid(count)[at:-1], steps[at:], strict=True):
        x = step.state * x + step.velocity * flow.velocity(x, tensor(t))
        x = x + step.noise * torch.randn(x.shape, generator=rng, dtype=x.dtype)
        states.append(x)
    trajectories, terminal = torch.stack(states), tensor([1.0, -2.0]).expand(ways, 2)
    lean = lean_adjoint(flow, trajectories, Terminal(terminal), steps)[0][at - 1]
    ours = posterior_mean_adjoint(flow, trajectories, terminal, count, torch.tensor([at - 1]))[0]
    assert float(ours.std(0).max()) < 1e-12
    error = lean.std(0) / math.sqrt(ways)
    # Three standard errors, and what is left of the discretisation, an order of one in 160 steps.
    assert ((lean.mean(0) - ours[0]).abs() < 3 * error + ours[0].norm() / count).all()
    # The noise that it is without: of the size of the adjoint itself.
    assert float(lean.std(0).norm()) > 0.3 * float(ours[0].norm())


@paths
@pytest.mark.slow_after(1)
def test_the_lean_adjoint_has_order_one(path):
    """Along a curve through a mixture's flow, against ``da/dt = -(grad b)^T a``, ``b = 2 v - kappa x``."""
    flow, start, end = MixtureFlow(path, MIXTURE), tensor([1.0, -0.5]), tensor([0.3, 0.8])
    terminal = np.array([1.0, -2.0])

    def rate(t, a):
        def drift(x):
            return 2 * flow.velocity(x[None], tensor(t))[0] - path.kappa(tensor(t)) * x

        jacobian = torch.autograd.functional.jacobian(drift, start + t * (end - start))
        return -(jacobian.T @ tensor(a)).numpy()

    # Just before 1, where a velocity of the variance-preserving path is infinity times zero.
    limit = solve_ivp(rate, (1 - 1e-7, 0.5), terminal, rtol=1e-8, atol=1e-8).y[:, -1]
    errors = []
    for count in (80, 160, 320, 640):
        times = tensor(time_grid(count))[:, None, None]
        curve = start + times * (end - start)
        steps = memoryless_steps(flow, count)
        adjoints, _ = lean_adjoint(flow, curve, Terminal(tensor(terminal)[None]), steps)
        errors.append(float(np.linalg.norm(adjoints[count // 2 - 1, 0].numpy() - limit)))
    orders = halving_orders(errors)
    # The next order is still felt, half as much at each finer pair.
    assert orders == pytest.approx([1, 1, 1], abs=0.2)
    assert orders[-1] == pytest.approx(1, abs=0.06)


def _ratios(flow, steps, target):
    scale = loss_scale(flow, steps, target)
    return scale.noise / scale.mean


@paths
def test_the_scales_of_the_loss_tend_to_those_of_the_continuous_problem(path):
    """``2 / sigma`` and ``sigma``; their ratio is the target's: ``eta``, or the discrete move's."""
    errors = []
    for count in (50, 100, 200):
        flow = MixtureFlow(path, GAUSSIAN)
        steps = memoryless_steps(flow, count)
        scale = loss_scale(flow, steps)
        inner = slice(count // 10, count - count // 10)
        sigma = (2 * path.eta(tensor(time_grid(count)[:-1]))).sqrt()[inner]
        errors.append(
            max(
                float((scale.mean[inner] * sigma / 2 - 1).abs().max()),
                float((scale.noise[inner] / sigma - 1).abs().max()),
            )
        )
        ratios = {target: _ratios(flow, steps, target) for target in ("state", "step")}
        eta = path.eta(tensor(time_grid(count)[1:-1]))
        torch.testing.assert_close(ratios["state"][1:], eta, rtol=1e-12, atol=0)
        moves = tensor([step.noise**2 / step.velocity for step in steps[:-1]])
        torch.testing.assert_close(ratios["step"][:-1], moves, rtol=1e-12, atol=0)
        # The first state's target is the step's, the last step's has the limit of its noise.
        assert float(ratios["state"][0]) == float(ratios["step"][0])
        assert float(ratios["step"][-1]) == pytest.approx(float(eta[-1]), rel=1e-12)
    assert min(halving_orders(errors)) > 0.8


@paths
def test_an_affine_flow_is_the_corrected_flow_with_its_derivative(path):
    """Trainings below are of the one; all that has a network is of the other."""
    flows = [kind(MixtureFlow(path, GAUSSIAN), AffineTable(path, 6)) for kind in (CorrectedFlow, AffineFlow)]
    apart = Columnwise(((path, 1), (path, 1)))
    flows.append(AffineFlow(ColumnwiseFlow(apart, GAUSSIAN), AffineTable(apart, 6)))
    for flow in flows:
        with torch.no_grad():
            for parameter in flow.correction.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(0), dtype=torch.float64))
    times = tensor(time_grid(6))[1:-1]
    states, a = torch.randn(2, len(times), 5, 2, generator=generator(1), dtype=torch.float64)
    gradients = []
    every = [flow.velocity(states.flatten(0, 1), times.repeat_interleave(5)) for flow in flows]
    for flow, velocity in zip(flows, every, strict=True):
        torch.testing.assert_close(velocity, every[0])
        loss = (velocity * a.flatten(0, 1)).sum()
        gradients.append(torch.autograd.grad(loss, list(flow.correction.parameters())))
        torch.testing.assert_close(gradients[-1], gradients[0])
        for k, time in enumerate(times):
            torch.testing.assert_close(flow.velocity(states[k], time), velocity.view_as(states)[k])
            expected, pull = flows[0].linearised(states, times)(k)
            found, own_pull = flow.linearised(states, times)(k)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(own_pull(a[k]), pull(a[k]))


# --- Discretisation of the whole method, without sampling --------------------------------------


@paths
@rewards
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.slow_after(2)
@pytest.mark.parametrize("target", ["state", "step"])
def test_what_adjoint_matching_converges_to_has_order_one(path, reward, power, target):
    """Mean and covariance of the fixed point of the regression against those of the continuous problem.

    With the adjoint of the state the mean has a higher order: what is left is the sampler's covariance.
    """
    limit = memoryless_limit(path, GAUSSIAN, reward, KL_WEIGHT)
    errors = {"mean": [], "covariance": []}
    flow = MixtureFlow(path, GAUSSIAN)
    flow.time_power = power
    for count in (80, 160, 320, 640):
        found = matched_distribution(flow, reward, KL_WEIGHT, count, target)
        for name, value, exact in zip(errors, found, limit, strict=True):
            errors[name].append(float(torch.linalg.norm(value - exact)))
    if target == "state":
        assert errors["mean"][0] < 1e-6
        assert halving_orders(errors.pop("mean"))[0] > 1.9
    for name in errors:
        orders = halving_orders(errors[name])
        # The observed order approaches 1 by a term of the size of a step.
        assert orders == pytest.approx([1, 1, 1], abs=0.2)
        assert orders[-1] == pytest.approx(1, abs=0.05)


@rewards
def test_without_memory_the_limit_is_the_tilted_distribution(reward):
    mean, covariance = memoryless_limit(PATHS["linear"], GAUSSIAN, reward, KL_WEIGHT)
    tilted = GAUSSIAN.tilted(reward, KL_WEIGHT)
    torch.testing.assert_close(mean, tilted.mean)
    torch.testing.assert_close(covariance, tilted.covariance)
    # What the variance-preserving path remembers of its start moves mean and covariance by less than 1 %.
    mean, covariance = memoryless_limit(PATHS["vp"], GAUSSIAN, reward, KL_WEIGHT)
    assert relative_error(mean, tilted.mean) < 0.01
    assert relative_error(covariance, tilted.covariance) < 0.01


# --- Gradients at the end from values alone ----------------------------------------------------


@paths
def test_what_is_added_before_the_end_goes_back_from_there(path):
    """The adjoint is linear: pulled back from the end, and from one state before, are two parts of a sum."""
    flow, count = nonlinear_flow(path), 6
    steps = memoryless_steps(flow, count)
    trajectories = sample_sde(flow, 5, count, generator(0))
    end, before = torch.randn(2, 5, 2, generator=generator(1), dtype=torch.float64)
    both, velocities = lean_adjoint(flow, trajectories, Terminal(end, before), steps)
    alone, expected = lean_adjoint(flow, trajectories, Terminal(end), steps)
    torch.testing.assert_close(velocities, expected)
    added = both - alone
    # The last step has no noise of its own, and takes what is added before it.
    torch.testing.assert_close(added[-1], before)
    torch.testing.assert_close(added[-2], before)
    for k in range(count - 2, 0, -1):
        x = trajectories[k].clone().requires_grad_(True)
        (pulled,) = torch.autograd.grad(flow.velocity(x, tensor(k / count)), x, added[k])
        torch.testing.assert_close(added[k - 1], steps[k].state * added[k] + steps[k].velocity * pulled)


class Ridge(Reward):
    """A smooth step of a given width along x."""

    def __init__(self, width):
        self.width = width

    def value(self, x, context=None):
        return torch.sigmoid((x[:, 0] - 0.2) / self.width)


def pairs_of_estimates(path, reward, count=40_000, steps=10):
    """Both estimates of the adjoint's mean at one state before the last noise, each (count, 2)."""
    flow = nonlinear_flow(path)
    coefficients = memoryless_steps(flow, steps)
    noisy, last = coefficients[-2:]
    times = time_grid(steps)
    before = tensor([[0.3, -0.4]]).expand(count, 2)
    noise = torch.randn(count, 2, generator=generator(3), dtype=torch.float64)
    state = noisy.state * before + noisy.velocity * flow.velocity(before, tensor(times[-3]))
    state = (state + noisy.noise * noise).requires_grad_(True)
    end = last.state * state + last.velocity * flow.velocity(state, tensor(times[-2]))
    (pathwise,) = torch.autograd.grad(reward.value(end).sum(), state)
    trajectories = torch.stack([before, state.detach(), end.detach()])
    ratio, _ = likelihood_ratio_gradient(flow, RewardVariation(reward), trajectories, coefficients)
    return ratio, pathwise


@paths
@pytest.mark.parametrize("reward", [QUADRATIC, Ridge(0.3), Ridge(0.02)], ids=["quadratic", "wide", "narrow"])
def test_the_likelihood_ratio_gradient_has_the_mean_of_the_pathwise_one(path, reward):
    ratio, pathwise = pairs_of_estimates(path, reward)
    difference = ratio - pathwise
    errors = difference.mean(0) / (difference.std(0) / math.sqrt(len(ratio)))
    assert float(errors.abs().max()) < 4
    # It has one worth telling from zero, or the test would say little.
    signal = pathwise.mean(0) / (pathwise.std(0) / math.sqrt(len(ratio)))
    assert float(signal.abs().max()) > 20


@paths
def test_the_likelihood_ratio_gradient_has_less_noise_at_an_edge_and_more_on_a_slope(path):
    noise = {}
    for width in (0.002, 0.02, 1.0):
        ratio, pathwise = pairs_of_estimates(path, Ridge(width))
        noise[width] = float(ratio[:, 0].std() / pathwise[:, 0].std())
    # Noise of the pathwise estimate grows as width^(-1/2), and the other's not at all.
    assert noise[0.002] < 0.4 * noise[0.02] < 0.4 * noise[1.0]
    assert noise[0.002] < 0.25
    assert noise[1.0] > 1


class ByGradient(RewardVariation):
    """A reward of which only the gradient may be asked for."""

    cheap_values = False

    def value(self, x, context=None):
        raise AssertionError("the value of this is dear")


def test_the_part_of_a_tilt_with_dear_values_keeps_its_own_gradient():
    flow = nonlinear_flow(PATHS["vp"])
    steps = memoryless_steps(flow, 6)
    pool = sample_sde(flow, 40, 6, generator(0))
    hinge = Hinge(Ridge(0.3), 0.5, 0.5, "upper")
    tilt = WeightedVariation(((2.0, hinge), (-0.5, ByGradient(LINEAR)), (0.0, ByGradient(QUADRATIC))))
    ends = Ends.of(flow, tilt, pool, tilt.active(pool[-1]), steps, None, "likelihood_ratio")
    ratio = 2.0 * likelihood_ratio_gradient(flow, hinge, pool, steps)[0]
    torch.testing.assert_close(ends.ratio, ratio)
    assert torch.equal(ends.active, ratio.any(1))
    assert 0 < int(ends.active.sum()) < 40
    index = torch.tensor([3, 0, 17])
    terminal = ends.terminal(pool[-1, index], index, None, -0.1)
    torch.testing.assert_close(terminal.before, -0.1 * ratio[index])
    torch.testing.assert_close(terminal.end, 0.05 * LINEAR.gradient(pool[-1, index]))
    # By the pathwise estimator nothing is split.
    whole = Ends.of(flow, tilt, pool, tilt.active(pool[-1]), steps, None, "pathwise")
    assert whole.ratio is None
    expected = -0.1 * tilt.gradient(pool[-1, index])
    torch.testing.assert_close(whole.terminal(pool[-1, index], index, None, -0.1).end, expected)


# --- Columns on paths of their own --------------------------------------------------------------

SCHEDULES = {
    "straight_and_cosine": Columnwise(((Linear(), 1), (Cosine(2.0), 1))),
    "two_cosines": Columnwise(((Cosine(1.5), 1), (Cosine(2.0), 1))),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@schedules
@rewards
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.slow
@pytest.mark.parametrize("target", ["state", "step"])
def test_with_columns_apart_what_adjoint_matching_converges_to_is_the_tilted_distribution_to_order_one(
    schedule, reward, power, target
):
    """The tilt couples columns whose noise vanishes at different rates; the limit is the joint tilt."""
    exact = GAUSSIAN.tilted(reward, KL_WEIGHT)
    errors = {"mean": [], "covariance": []}
    flow = ColumnwiseFlow(schedule, GAUSSIAN)
    flow.time_power = power
    for count in (40, 80, 160, 320):
        found = matched_distribution(flow, reward, KL_WEIGHT, count, target)
        for name, value, limit in zip(errors, found, (exact.mean, exact.covariance), strict=True):
            errors[name].append(float(torch.linalg.norm(value - limit)))
    for name in errors:
        assert halving_orders(errors[name])[-1] == pytest.approx(1, abs=0.1)
        assert errors[name][-1] < 0.01


@schedules
@pytest.mark.parametrize(
    ("reward", "steps", "batch"), [(LINEAR, 40, 128), (QUADRATIC, 80, 256)], ids=["linear", "quadratic"]
)
@pytest.mark.slow
def test_a_gaussian_with_columns_apart_is_tilted_to_the_closed_form(schedule, reward, steps, batch):
    """``N(m + S c / alpha, S)`` for a linear reward; most of the 4 % is the discretisation."""
    flow = AffineFlow(ColumnwiseFlow(schedule, GAUSSIAN), AffineTable(schedule, steps))
    choice = settings(steps=steps, batch=batch, pool=batch)
    solution = solve(flow, RewardVariation(reward), KL_WEIGHT, choice, generator(0))
    mean, covariance = chain_distribution(solution.model, steps)
    exact = GAUSSIAN.tilted(reward, KL_WEIGHT)
    assert relative_error(mean, exact.mean) < 0.01
    assert relative_error(covariance, exact.covariance) < 0.04
    discrete = matched_distribution(flow, reward, KL_WEIGHT, steps)
    assert relative_error(mean, discrete[0]) < 0.01
    assert relative_error(covariance, discrete[1]) < 0.015


@schedules
@pytest.mark.slow
def test_with_columns_apart_the_control_energy_is_the_divergence_from_the_base(schedule):
    flow = AffineFlow(ColumnwiseFlow(schedule, GAUSSIAN), AffineTable(schedule, 40))
    choice = settings(rest_share=1.0, updates=100)
    solution = solve(flow, RewardVariation(LINEAR), KL_WEIGHT, choice, generator(0))
    c = LINEAR.linear / KL_WEIGHT
    expected = float(c @ GAUSSIAN.covariance @ c) / 2
    assert solution.history[-1]["path_kl"] == pytest.approx(expected, rel=0.03)


@paths
@pytest.mark.parametrize("estimator", ["pathwise", "likelihood_ratio"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.slow_after(4)
def test_columns_that_share_a_path_are_solved_as_one_state(path, estimator, clip):
    """Coefficients are equal bit for bit, and what follows from them to rounding of double precision.

    The rounding is that of ``x + c y``, which is fused where c is a number, and not where it is a vector.
    """
    choice = settings(updates=3, steps=6, endpoint_gradient=estimator, control_clip=clip)
    one, two = (CorrectedFlow(MixtureFlow(path, GAUSSIAN), AffineTable(path, 6)) for _ in range(2))
    two.path = Columnwise(((path, 1), (path, 1)))
    scales = [loss_scale(flow, memoryless_steps(flow, 6)) for flow in (one, two)]
    for name in ("mean", "noise"):
        expected = getattr(scales[0], name)
        assert torch.equal(getattr(scales[1], name), expected[:, None].expand(-1, 2))
    solutions = [solve(flow, RewardVariation(LINEAR), 1.0, choice, generator(0)) for flow in (one, two)]
    for a, b in zip(*(s.model.correction.parameters() for s in solutions), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for row, other in zip(*(s.history for s in solutions), strict=True):
        for key in ("loss", "path_kl", "gradient_norm", "clipped_share"):
            assert row[key] == pytest.approx(other[key], rel=1e-10, abs=1e-14)


# --- Training against closed forms -------------------------------------------------------------


def settings(**changes):
    """Enough for families of a few numbers a time step: no ramp, a large learning rate, no clipping."""
    base = {"updates": 200, "batch": 128, "pool": 128, "steps": 40, "learning_rate": 0.1}
    return AdjointMatchingSettings(**(base | {"ramp": 0.0, "gradient_clip": 10.0} | changes))


estimators = pytest.mark.parametrize("estimator", ["pathwise", "likelihood_ratio"])


@paths
@pytest.mark.parametrize(
    ("estimator", "adjoint"),
    [("pathwise", "lean"), ("likelihood_ratio", "lean"), ("pathwise", "posterior_mean")],
)
@pytest.mark.parametrize(
    ("reward", "steps", "batch"), [(LINEAR, 40, 128), (QUADRATIC, 80, 256)], ids=["linear", "quadratic"]
)
@pytest.mark.slow_after(1)
def test_a_gaussian_is_tilted_to_the_closed_form(path, reward, steps, batch, estimator, adjoint):
    """Mean and covariance within 3 %. The trained one is propagated exactly, without sampling error."""
    flow = AffineFlow(MixtureFlow(path, GAUSSIAN), AffineTable(path, steps))
    choice = settings(steps=steps, batch=batch, pool=batch, endpoint_gradient=estimator, adjoint=adjoint)
    solution = solve(flow, RewardVariation(reward), KL_WEIGHT, choice, generator(0))
    mean, covariance = chain_distribution(solution.model, steps)
    exact = GAUSSIAN.tilted(reward, KL_WEIGHT)
    assert relative_error(mean, exact.mean) < 0.03
    assert relative_error(covariance, exact.covariance) < 0.03
    # Most of that is the discretisation; the noise of training leaves up to 0.006, by seed, and more
    # where a smooth reward is known by its values alone.
    discrete = matched_distribution(flow, reward, KL_WEIGHT, steps)
    noise = 0.01 if estimator == "pathwise" else 0.02
    assert relative_error(mean, discrete[0]) < noise
    assert relative_error(covariance, discrete[1]) < noise


@pytest.mark.slow_after(1)
@paths
def test_the_control_energy_is_the_divergence_from_the_base(path):
    """For a linear reward ``KL(p* || p) = c^T S c / (2 kl_weight^2)``."""
    flow = AffineFlow(MixtureFlow(path, GAUSSIAN), AffineTable(path, 40))
    choice = settings(rest_share=1.0, updates=100)
    solution = solve(flow, RewardVariation(LINEAR), KL_WEIGHT, choice, generator(0))
    c = LINEAR.linear / KL_WEIGHT
    # Left by discretisation at 40 steps: the sum over steps of order one in their size.
    assert solution.history[-1]["path_kl"] == pytest.approx(float(c @ GAUSSIAN.covariance @ c) / 2, rel=0.03)


def posterior_share(x, distribution):
    """Mean posterior probability of the second component: its weight, for samples of the distribution."""
    log_parts = [
        w.log() + torch.distributions.MultivariateNormal(m, c).log_prob(x)
        for w, m, c in zip(distribution.weights, distribution.means, distribution.covariances, strict=True)
    ]
    return float(torch.softmax(torch.stack(log_parts), 0)[1].mean())


@paths
@estimators
@pytest.mark.slow
def test_the_weights_of_a_mixture_are_tilted_to_the_closed_form(path, estimator):
    reward, steps = Quadratic([0.6, 0.3]), 60
    exact = MIXTURE.tilted(reward, 1.0)
    assert float(exact.weights[1] - MIXTURE.weights[1]) > 0.25
    flow = MixtureFlow(path, MIXTURE, trainable=True)
    choice = settings(steps=steps, updates=150, endpoint_gradient=estimator)
    solution = solve(flow, RewardVariation(reward), 1.0, choice, generator(0))
    x = sample_sde(solution.model, 40_000, steps, generator(1))[-1]
    # Of the 0.02, 0.008 are the order-one error of 60 steps and four standard errors of sampling.
    assert posterior_share(x, exact) == pytest.approx(float(exact.weights[1]), abs=0.02)
    # Four standard errors of the mean are 0.03 of its size, those of a variance 0.03 of it.
    assert relative_error(x.mean(0), exact.mean) < 0.05
    assert relative_error(x.T.cov(), exact.covariance) < 0.03


@pytest.mark.slow_after(1)
@paths
@pytest.mark.parametrize("sign", [1, -1])
def test_the_model_moves_towards_the_reward(path, sign):
    """One Gaussian blob and the reward +x or -x: the mean follows the sign, by variance over KL weight."""
    blob = Mixture.gaussian([0.42, 0.0], [[0.5, 0.0], [0.0, 0.5]])
    flow = CorrectedFlow(MixtureFlow(path, blob), Perceptron(path))
    choice = settings(updates=120, learning_rate=0.03, steps=10)
    reward = Quadratic([sign, 0.0])
    solution = solve(flow, RewardVariation(reward), 1.0, choice, generator(0))
    mean = sample_sde(solution.model, 20_000, 10, generator(1))[-1].mean(0)
    assert sign * float(mean[0] - 0.42) > 0.4  # the closed form moves by 0.5
    # Against the fixed point at 10 steps: 0.02 are four standard errors, the rest is for 120 updates.
    expected, _ = matched_distribution(flow, reward, 1.0, 10)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("tail", ["lower", "upper"])
@pytest.mark.slow
def test_a_hinge_is_solved_with_a_pool_larger_than_the_batch(tail):
    """N(0, 1) along x tilted by ``exp(hinge)``: two pieces of Gaussians with a known mean."""
    at, mass, weight = (-0.8, 0.25, 4.0) if tail == "lower" else (0.8, 0.25, 4.0)
    slope = 1 / (mass * weight)  # of the exponent on the active side
    x = np.linspace(-9, 9, 40_001)
    cut = np.minimum(x - at, 0) if tail == "lower" else np.maximum(x - at, 0)
    density = norm.pdf(x) * np.exp(slope * cut)
    density /= density.sum()
    path = PATHS["linear"]
    standard = Mixture.gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    flow = CorrectedFlow(MixtureFlow(path, standard), Perceptron(path))
    hinge = Hinge(Quadratic([1.0, 0.0]), at, mass, tail)
    choice = settings(updates=120, batch=128, pool=512, learning_rate=0.01, steps=40)
    solution = solve(flow, hinge, weight, choice, generator(0))
    found = sample_sde(solution.model, 20_000, 40, generator(1))[-1][:, 0]
    # Four standard errors are 0.03; the rest is for 40 steps and a network of 120 updates.
    assert float(found.mean()) == pytest.approx(float(density @ x), abs=0.05)
    active = found < at if tail == "lower" else found > at
    expected = density[x < at if tail == "lower" else x > at].sum()
    assert float(active.double().mean()) == pytest.approx(expected, abs=0.02)
    assert solution.history[-1]["active_share"] == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 512))


# --- Bookkeeping -------------------------------------------------------------------------------

QUICK = {"updates": 3, "batch": 16, "pool": 16, "steps": 5}


def quick_flow(path=PATHS["linear"], steps=5):
    return CorrectedFlow(MixtureFlow(path, MIXTURE), AffineTable(path, steps))


def test_a_solve_repeats_itself_leaves_the_base_alone_and_reports_every_update():
    flow, seen = quick_flow(), []
    before = [p.detach().clone() for p in flow.parameters()]
    runs = [
        solve(flow, RewardVariation(LINEAR), 1.0, settings(**QUICK), generator(7), progress)
        for progress in (seen.append, None)
    ]
    for parameter, old in zip(flow.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.requires_grad
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
        assert bool((a != 0).any())
    assert seen == runs[0].history
    assert [row["update"] for row in seen] == [0, 1, 2]
    expected = {"update", "loss", "active_share", "failed_share", "path_kl", "gradient_norm"}
    assert set(seen[0]) == expected | {"clipped_share", "network_passes", "seconds"}
    # The first update still runs the base; velocities are compared at times in single precision.
    assert seen[0]["path_kl"] < 1e-12
    assert all(row["active_share"] == 1 for row in seen)


def test_a_schedule_gives_each_update_its_tilt_and_ends_where_it_ends():
    flow, asked = quick_flow(), []
    choice = settings(**QUICK | {"updates": 4, "pool": 64})
    hinges = [Hinge(LINEAR, at, 0.5, "upper") for at in (-9.0, -9.0, 9.0, -9.0)]

    def schedule(progress):
        asked.append(progress)
        return hinges[round(4 * progress)]

    solution = solve(flow, schedule, 1.0, choice, generator(7))
    assert asked == [0, 0.25, 0.5, 0.75]
    assert [row["active_share"] for row in solution.history] == [1, 1, 0, 1]
    constant, plain = (
        solve(flow, tilt, 1.0, choice, generator(7)).model for tilt in (lambda _: hinges[0], hinges[0])
    )
    for a, b in zip(constant.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


class Counted(CorrectedFlow):
    """Counts network passes of states as they happen, in a list that its copies share."""

    def __init__(self, passes):
        super().__init__(MixtureFlow(PATHS["linear"], MIXTURE), AffineTable(PATHS["linear"], 5))
        self.passes = passes

    def __deepcopy__(self, memo):
        other = Counted(self.passes)
        other.load_state_dict(self.state_dict())
        return other

    def velocity(self, x, t, context=None):
        v = super().velocity(x, t, context)
        self.passes.append(len(x))
        if v.requires_grad:  # called when a gradient comes back, to the input or to the parameters as well
            trained = next(self.parameters()).requires_grad
            v.register_hook(lambda _: self.passes.append(len(x) * (2 if trained else 1)))
        return v


@pytest.mark.parametrize(
    ("tilt", "active"),
    [
        (RewardVariation(LINEAR), {16}),
        (Hinge(Quadratic([1.0, 0.0]), 0.0, 0.5, "upper"), set(range(1, 16))),
        (Hinge(Quadratic([1.0, 0.0]), 1e3, 0.5, "upper"), {0}),
    ],
    ids=["all samples", "some samples", "no sample"],
)
@pytest.mark.parametrize("adjoint", ["lean", "posterior_mean"])
@pytest.mark.parametrize("target", ["state", "step"])
def test_network_passes_are_what_goes_through_the_network(tilt, active, adjoint, target):
    passes, after, moved = [], [], []

    class Seen(FirstVariation):
        sparse = tilt.sparse

        def value(self, x, context=None):
            return tilt.value(x)

        def active(self, x, context=None):
            return tilt.active(x)

        def gradient(self, x, context=None):
            moved.append(int(tilt.active(x).sum()))
            return tilt.gradient(x)

    choice = settings(**(QUICK | {"pool": 40, "adjoint": adjoint, "target": target}))
    solution = solve(Counted(passes), Seen(), 1.0, choice, generator(0), lambda _: after.append(sum(passes)))
    assert [row["network_passes"] for row in solution.history] == after
    assert set(moved) <= active


class GradientOnly(FirstVariation):
    def value(self, x, context=None):
        raise AssertionError("Adjoint Matching asks for gradients, never for values")


def test_the_shape_of_the_state_does_not_matter():
    class StackedVariation(GradientOnly):
        def gradient(self, x, context=None):
            return LINEAR.gradient(x[..., 0])[..., None]

    flat = solve(quick_flow(), RewardVariation(LINEAR), 1.0, settings(**QUICK), generator(0))
    stacked = solve(Stacked(quick_flow()), StackedVariation(), 1.0, settings(**QUICK), generator(0))
    for a, b in zip(flat.model.parameters(), stacked.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class Tagged(FlowModel):
    """A flow whose context is a tag that each state carries in its second coordinate, times a factor of time.

    The velocity is zero, so a state is its prior times a product of steps: all samples agree on the
    ratio of coordinate and tag, unless a context has come to a sample that it does not belong to.
    """

    def __init__(self):
        super().__init__()
        self.path = PATHS["vp"]
        self.weight = torch.nn.Parameter(torch.zeros(()).double())

    def draw_context(self, count, generator):
        return 1 + torch.rand(count, generator=generator, dtype=torch.float64)

    def select_context(self, context, index):
        return context[index]

    def prior(self, count, generator, context=None):
        return torch.stack([torch.randn(count, generator=generator, dtype=torch.float64), context], dim=1)

    def noise_like(self, x, generator, context=None):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype) * tensor([1.0, 0.0])

    def velocity(self, x, t, context=None):
        assert len(context) == len(x)
        ratio = (x[:, 1] / context).detach()
        for time in t.unique():
            at_time = ratio[(t == time).expand(len(x))]
            torch.testing.assert_close(at_time, at_time[:1].expand(len(at_time)))
        return x * self.weight


def test_contexts_stay_with_their_samples():
    class Tail(GradientOnly):
        sparse = True

        def active(self, x, context=None):
            return context > 1.8

        def gradient(self, x, context=None):
            assert len(context) == len(x)
            return x * context[:, None]

    solve(Tagged(), Tail(), 1.0, settings(**(QUICK | {"pool": 64, "updates": 1})), generator(0))


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_kl_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="KL weight of a solve must be positive"):
        solve(quick_flow(), RewardVariation(LINEAR), weight, settings(**QUICK), generator(0))


def test_a_pool_smaller_than_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"pool \(8\) must be at least batch \(16\)"):
        AdjointMatchingSettings(batch=16, pool=8)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(
        ValueError, match="endpoint_gradient must be pathwise or likelihood_ratio, got 'score'"
    ):
        AdjointMatchingSettings(endpoint_gradient="score")
    with pytest.raises(ValueError, match="adjoint must be lean or posterior_mean, got 'full'"):
        AdjointMatchingSettings(adjoint="full")
    with pytest.raises(ValueError, match="target must be state or step, got 'end'"):
        AdjointMatchingSettings(target="end")
    with pytest.raises(ValueError, match="endpoint_gradient must be pathwise, got 'likelihood_ratio'"):
        AdjointMatchingSettings(adjoint="posterior_mean", endpoint_gradient="likelihood_ratio")


def test_a_batch_without_room_for_both_strata_is_refused():
    with pytest.raises(ValueError, match="batch must be a whole number of at least 2, got 1"):
        AdjointMatchingSettings(batch=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_stops_being_finite_stops_the_run_and_names_the_update(bad):
    class Failing(GradientOnly):
        calls = 0

        def gradient(self, x, context=None):
            self.calls += 1
            return torch.full_like(x, bad if self.calls == 3 else 1.0)

    history = []
    with pytest.raises(TrainingDiverged, match="at update 2 of 5"):
        solve(
            quick_flow(), Failing(), 1.0, settings(**(QUICK | {"updates": 5})), generator(0), history.append
        )
    assert len(history) == 2


def test_trajectories_that_stop_being_finite_stop_the_run():
    class Exploding(GradientOnly):
        def gradient(self, x, context=None):
            return torch.full_like(x, 1e30)

    choice = settings(**(QUICK | {"updates": 20, "learning_rate": 1e200}))
    with pytest.raises(TrainingDiverged, match=r"at update \d+ of 20"):
        solve(quick_flow(), Exploding(), 1.0, choice, generator(0))


# --- Shortened controls ------------------------------------------------------------------------


@paths
def test_a_control_that_is_too_long_is_shortened_and_keeps_its_direction(path):
    flow = MixtureFlow(path, GAUSSIAN)
    scale = loss_scale(flow, memoryless_steps(flow, 6))
    adjoints = torch.randn(6, 50, 2, generator=generator(0), dtype=torch.float64)
    adjoints[:, 0] *= 1000
    shortened, count = _clipped(adjoints, scale, 0.8)
    controls = scale.noise.view(-1, 1) * adjoints.norm(dim=2)
    found = scale.noise.view(-1, 1) * shortened.norm(dim=2)
    long = controls > 0.8
    assert count == int(long.sum())
    assert 0 < count < long.numel()
    torch.testing.assert_close(found[long], torch.full_like(found[long], 0.8))
    torch.testing.assert_close(shortened[~long], adjoints[~long])
    torch.testing.assert_close(
        F.cosine_similarity(shortened, adjoints, dim=2), torch.ones(6, 50, dtype=torch.float64)
    )
    kept, none = _clipped(adjoints, scale, None)
    assert none == 0
    assert torch.equal(kept, adjoints)


def test_a_bound_that_nothing_reaches_changes_nothing():
    flow = CorrectedFlow(MixtureFlow(PATHS["vp"], GAUSSIAN), AffineTable(PATHS["vp"], 10))
    runs = [
        solve(
            flow,
            RewardVariation(LINEAR),
            KL_WEIGHT,
            settings(steps=10, updates=5, control_clip=clip),
            generator(0),
        )
        for clip in (None, 1e6, 0.05)
    ]
    losses = [[row["loss"] for row in run.history] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert [run.history[-1]["clipped_share"] for run in runs[:2]] == [0, 0]
    assert runs[2].history[-1]["clipped_share"] > 0.9


# ------------------------------------------------------------------ what large models need


def test_updates_on_the_same_trajectories_take_steps_of_their_own():
    """Trajectories are sampled, and adjoints solved, once for all passes; the regression sees new steps."""
    choice = settings(**(QUICK | {"updates": 6, "passes": 3}))
    passes = []
    solution = solve(Counted(passes), RewardVariation(LINEAR), 1.0, choice, generator(0))
    counted = np.diff([0, *(row["network_passes"] for row in solution.history)])
    assert sum(passes) == solution.history[-1]["network_passes"]
    assert counted[0] == counted[3] > counted[1] == counted[2] == counted[4] == counted[5]
    losses = [row["loss"] for row in solution.history]
    assert len(set(losses)) == len(losses)


def test_one_pass_with_all_steps_is_the_first_of_several():
    """With every step in the loss nothing is drawn: the first update of a buffer is that of a batch."""
    every = QUICK | {"updates": 1, "last_share": 1.0}
    one, several = (
        solve(quick_flow(), RewardVariation(LINEAR), 1.0, settings(**every, passes=p), generator(0))
        for p in (1, 4)
    )
    for a, b in zip(one.model.parameters(), several.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("tilt", [RewardVariation(LINEAR), Hinge(Quadratic([1.0, 0.0]), 0.0, 0.5, "upper")])
def test_micro_batches_add_up_to_the_batch(tilt):
    whole, parts = (
        solve(quick_flow(), tilt, 1.0, settings(**QUICK, micro_batch=m), generator(0)) for m in (None, 3)
    )
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        # Where a gradient is zero but for rounding, 1e-16, Adam makes 0.1 * 1e-16 / 1e-8 of it.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["path_kl"] == pytest.approx(b["path_kl"], rel=1e-9)


class ByUse(FlowModel):
    """A flow that writes down what its velocity was asked for, and for which of its parameters."""

    def __init__(self):
        super().__init__()
        self.path = PATHS["vp"]
        self.tuned = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.fixed = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen = set()

    def prior(self, count, generator, context=None):
        return torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def draw_context(self, count, generator):
        return "sampling"

    def select_context(self, context, index):
        return context

    def context_for(self, use, context):
        return use

    def tunable(self):
        return [self.tuned]

    def velocity(self, x, t, context=None):
        kind = "base" if not self.tuned.requires_grad else "model"
        self.seen.add((kind, context, torch.is_grad_enabled()))
        return self.fixed * (self.tuned - 0.1 * x)


def test_each_use_of_the_velocity_has_its_own_context_and_only_a_part_is_tuned():
    flow = ByUse()
    choice = settings(**(QUICK | {"updates": 1, "batch": 8, "pool": 8}))
    solution = solve(flow, RewardVariation(LINEAR), 1.0, choice, generator(0))
    assert solution.model.seen == {("model", "sampling", False), ("model", "control", True)}
    assert bool((solution.model.tuned != 0).all())
    assert float(solution.model.fixed) == 1.0


@pytest.mark.parametrize(("key", "value"), [("passes", 0), ("micro_batch", 0)])
def test_settings_of_large_models_are_checked(key, value):
    with pytest.raises(ValueError, match=key):
        AdjointMatchingSettings(**{key: value})
