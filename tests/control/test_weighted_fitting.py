import logging
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from closed_forms import (
    PATHS,
    AffinePolynomial,
    AffineTable,
    CorrectedFlow,
    Mixture,
    MixtureFlow,
    Perceptron,
    Quadratic,
    Stacked,
    Values,
    chain_distribution,
    generator,
    ode_distribution,
    pushforward,
    relative_error,
)
from flowtilt.control.base import TrainingDiverged
from flowtilt.control.penalties import PENALTIES, solve_weights
from flowtilt.control.weighted_fitting import (
    UnusableBank,
    WeightedFittingSettings,
    draw_bank,
    plan_draws,
    solve,
    stratified_indices,
    stratified_uniforms,
)
from flowtilt.functionals.utilities import Hinge, RewardVariation
from flowtilt.model import FlowModel
from flowtilt.rewards import Reward, RewardError
from flowtilt.sampling import OdeSettings, sample_ode

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
MIXTURE = Mixture.of(
    [0.6, 0.4], [[-0.9, 0.0], [0.9, 0.3]], [[[0.25, 0.0], [0.0, 0.35]], [[0.2, 0.05], [0.05, 0.25]]]
)
LINEAR = Quadratic([1.0, 0.5])
QUADRATIC = Quadratic([1.0, -0.5], [[1.5, 0.3], [0.3, 0.8]])
KL_WEIGHT = 1.3

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


class Waves(Reward):
    """Bounded, as reverse KL and squared Hellinger need it: their slopes end at 1."""

    def value(self, x, context=None):
        return torch.sin(1.2 * x[:, 0]) + 0.5 * torch.tanh(x[:, 1])


def settings(**changes):
    """Enough for families of a few numbers: a large learning rate."""
    base = {"bank": 40_000, "updates": 300, "batch": 512, "learning_rate": 0.02, "gradient_clip": 10.0}
    return WeightedFittingSettings(**(base | changes))


# --- Drawing from the bank ---------------------------------------------------------------------


def test_stratified_uniforms_are_one_in_each_slice():
    u = stratified_uniforms(1000, generator(0))
    assert torch.equal((u * 1000).floor(), torch.arange(1000, dtype=torch.float64))
    jitter = u * 1000 - torch.arange(1000)
    assert float(jitter.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 1000))


def test_indices_are_drawn_with_their_probabilities_and_vary_less_than_independent_ones():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(60, 0.5))
    p[[0, 17, 59]] = 0
    p /= p.sum()
    cumulative, batch, draws = torch.from_numpy(np.cumsum(p)), 40, 4000
    values = np.sort(rng.normal(size=60))
    random, counts, means = generator(1), np.zeros(60), []
    for _ in range(draws):
        index = stratified_indices(cumulative, batch, random).numpy()
        one = np.bincount(index, minlength=60)
        # An index takes part in its own share of slices and in two at the edges.
        assert (np.abs(one - batch * p) < 2).all()
        counts += one
        means.append(values[index].mean())
    assert counts[[0, 17, 59]].sum() == 0
    # Counts of one draw vary by less than those of independent ones: a bound on the error of the share.
    deviation = np.sqrt(p * (1 - p) / (batch * draws))
    assert (np.abs(counts / (batch * draws) - p) <= 5 * deviation).all()
    independent = math.sqrt((p @ values**2 - (p @ values) ** 2) / batch)
    assert np.mean(means) == pytest.approx(p @ values, abs=5 * independent / math.sqrt(draws))
    # In order of the values, a mean over 40 slices varies several times less.
    assert np.std(means) < 0.25 * independent


# --- The bank against the exact tilt -----------------------------------------------------------

WEIGHTS = {
    "kl": np.exp,
    "pearson": lambda s: np.maximum(1 + s, 0),
    "cressie_read_3": lambda s: np.sqrt(np.maximum(1 + 2 * s, 0)),
    "reverse_kl": lambda s: 1 / (1 - s),
    "squared_hellinger": lambda s: 1 / (1 - s) ** 2,
}
FEATURES = {
    "x": lambda x: x[:, 0],
    "y": lambda x: x[:, 1],
    "xx": lambda x: x[:, 0] ** 2,
    "xy": lambda x: x[:, 0] * x[:, 1],
    "yy": lambda x: x[:, 1] ** 2,
}


def grid_tilt(penalty, kl_weight, distribution):
    """Points, probabilities and weights of the penalised problem on a grid, from its optimality condition."""
    axis = np.linspace(-7, 7, 281)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    p = multivariate_normal(distribution.mean.numpy(), distribution.covariance.numpy()).pdf(points)
    p /= p.sum()
    g = Waves()(torch.from_numpy(points)).numpy()
    weight = WEIGHTS[penalty]

    def surplus(nu):
        return p @ weight((g - nu) / kl_weight) - 1

    bounded = penalty in ("reverse_kl", "squared_hellinger")
    low = g.max() - kl_weight * (1 - 1e-9) if bounded else g.min() - kl_weight
    nu = brentq(surplus, low, g.max() + kl_weight, xtol=1e-13)
    return points, p, weight((g - nu) / kl_weight), (g - nu) / kl_weight


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_moments_of_the_weighted_bank_are_those_of_the_exact_tilt(penalty, sampler):
    """Within five standard errors, by the influence function of the weighted mean.

    With weights at ``(g - nu) / alpha`` and nu from the normalisation, a sample changes the mean of h by
    ``w h - theta - B (w - 1)``, where ``B = E[w' h] / E[w']`` is what nu answers.
    """
    weight, alpha = WEIGHTS[penalty], 1.5
    points, p, w, s = grid_tilt(penalty, alpha, GAUSSIAN)
    steps = {"ode": 16, "sde": 120}[sampler]
    choice = settings(bank=20_000, penalty=penalty, sampler=sampler, steps=steps)
    bank = draw_bank(MixtureFlow(PATHS["linear"], GAUSSIAN), Values(Waves()), alpha, choice, generator(3))
    x, q = bank.samples.numpy(), bank.solution.probabilities
    rate = (weight(s + 1e-6) - weight(s - 1e-6)) / 2e-6
    moved = []
    for name, feature in FEATURES.items():
        h = feature(points)
        theta, answer = (p * w) @ h, (p * rate) @ h / (p @ rate)
        deviation = math.sqrt(p @ (w * h - theta - answer * (w - 1)) ** 2)
        error = abs(q @ feature(x) - theta) / (deviation / math.sqrt(choice.bank))
        # The SDE's steps leave up to two standard errors at this size; the ODE's leave nothing that is seen.
        assert error < (5 if sampler == "ode" else 7), name
        moved.append(abs(theta - p @ h) / (deviation / math.sqrt(choice.bank)))
    # Without the weights, or with those of no penalty, the same test fails by far.
    assert max(moved) > 40


@pytest.mark.parametrize("penalty", PENALTIES)
def test_bank_and_weights_are_in_the_order_of_the_values(penalty):
    choice = settings(bank=1000, penalty=penalty, steps=5)
    flow = MixtureFlow(PATHS["vp"], GAUSSIAN)
    bank = draw_bank(flow, Values(Waves()), 2.0, choice, generator(0))
    values = Waves()(bank.samples).numpy()
    assert (np.diff(values) >= 0).all()
    expected = solve_weights(values, 2.0, PENALTIES[penalty])
    np.testing.assert_array_equal(bank.solution.weights, expected.weights)
    assert bank.solution.relative_gap < 1e-9
    # All the draws of the sampler itself, each once.
    drawn = sample_ode(flow, 1000, generator(0), settings=OdeSettings(steps=5))
    assert torch.equal(bank.samples.sort(0).values, drawn.sort(0).values)
    assert torch.equal(drawn[bank.order], bank.samples)


# --- The control variate -----------------------------------------------------------------------


def distributions(seed, spread, size=400):
    logs = spread * np.random.default_rng(seed).normal(size=size)
    q = np.exp(logs - logs.max())
    return q / q.sum(), np.full(size, 1 / size)


@pytest.mark.parametrize("spread", [0.01, 0.3, 0.6, 1.0, 3.0, 30.0])
def test_draws_count_for_the_tilted_distribution_and_the_control_variate_for_the_base(spread):
    """Drawn probabilities times their factors are the two distributions; the noise is what is left."""
    q, p = distributions(0, spread)
    plan = plan_draws(q)
    drawn = np.diff(plan.cumulative.numpy(), prepend=0)
    tilted, base = drawn * plan.tilted.numpy(), drawn * plan.base.numpy()
    # Differences of cumulative sums have the rounding of 1.
    np.testing.assert_allclose(tilted, q, rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(base, plan.coefficient * p, rtol=1e-6, atol=1e-13)
    left = (plan.tilted - plan.base).numpy()
    assert drawn @ left**2 == pytest.approx(plan.noise, rel=1e-9)
    if plan.coefficient:
        # The least over all coefficients, and small enough to pay for a fourth network pass.
        for other in (plan.coefficient - 1e-3, plan.coefficient + 1e-3):
            assert ((q - other * p) ** 2 / (0.5 * (p + q))).sum() > plan.noise
        assert plan.noise <= 0.75
    else:
        np.testing.assert_allclose(drawn, q, rtol=1e-6, atol=1e-13)
        assert plan.noise == 1


def test_the_control_variate_is_for_small_tilts():
    coefficients = [
        plan_draws(distributions(0, spread)[0]).coefficient for spread in (0.01, 0.3, 0.6, 1.0, 3.0)
    ]
    assert coefficients[0] == pytest.approx(1, abs=1e-3)
    assert coefficients[0] > coefficients[1] > coefficients[2] > 0
    assert coefficients[-1] == 0
    # Noise of the size of the weights' variance, which is the square of the spread.
    assert plan_draws(distributions(0, 0.01)[0]).noise == pytest.approx(1e-4, rel=0.15)
    even = plan_draws(np.full(10, 0.1))
    assert (even.coefficient, even.noise) == pytest.approx((1, 0), abs=1e-15)


def test_without_a_tilt_the_model_stays_what_it_is():
    class Nothing(Values):
        def value(self, x, context=None):
            return torch.full((len(x),), 3.0)

    flow = CorrectedFlow(MixtureFlow(PATHS["linear"], MIXTURE), Perceptron(PATHS["linear"]))
    choice = settings(bank=512, updates=20)
    model = solve(flow, Nothing(None), 1.0, choice, generator(0)).model
    for a, b in zip(model.parameters(), flow.parameters(), strict=True):
        # Adam makes steps of the learning rate out of gradients of rounding only where these are not 0.
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-12)


@pytest.mark.slow_after(1)
@paths
@pytest.mark.parametrize("quadratic", [True, False])
def test_a_small_tilt_is_fitted_to_a_few_percent_of_itself(path, quadratic):
    """A move of the means by 0.05, against noise of the optimiser that alone would move them by 0.02."""
    kl_weight = 20.0
    flow = MixtureFlow(path, GAUSSIAN, trainable=True)
    flow.quadratic_loss = quadratic  # without it, the control variate is the gradient at the base
    solution = solve(flow, Values(LINEAR), kl_weight, settings(updates=150), generator(0))
    assert solution.diagnostics["control_variate"] > 0.99
    exact = GAUSSIAN.tilted(LINEAR, kl_weight)
    move = exact.means[0] - GAUSSIAN.means[0]
    # A bank of 40,000 alone leaves one percent.
    torch.testing.assert_close(solution.model.means, exact.means, rtol=0, atol=0.05 * float(move.norm()))


# --- The fit against closed forms --------------------------------------------------------------


@paths
@pytest.mark.parametrize("reward", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])
@pytest.mark.slow
def test_a_gaussian_is_tilted_to_the_closed_form(path, reward):
    """Mean and covariance within 3 %: of that the bank's error is 1 %, and the optimiser's up to 2 % by seed.

    The fitted distribution is propagated exactly: no sampling error in it. The memoryless process samples the
    tilt itself. The probability-flow ODE starts the variance-preserving path from N(0, I), where the
    distribution at time 0 has a mean of ``alpha(0) = 0.049`` of the data's, and keeps that difference: once
    in the bank, once in the sampling.
    """
    flow = CorrectedFlow(MixtureFlow(path, GAUSSIAN), AffinePolynomial(path))
    choice = settings(bank=100_000, steps=8, updates=400, batch=1024, learning_rate=0.1)
    model = solve(flow, Values(reward), KL_WEIGHT, choice, generator(0)).model
    tilt = GAUSSIAN.tilted(reward, KL_WEIGHT)
    of_bank = pushforward(path, GAUSSIAN, 0, 1).tilted(reward, KL_WEIGHT)
    by_ode = pushforward(path, of_bank, 0, 1)
    for (mean, covariance), exact in (
        (ode_distribution(model), by_ode),
        (chain_distribution(model, 320), tilt),
    ):
        assert relative_error(mean, exact.mean) < 0.03
        assert relative_error(covariance, exact.covariance) < 0.03


@paths
@pytest.mark.slow_after(1)
def test_the_weights_of_a_mixture_are_tilted_to_the_closed_form(path):
    reward = Quadratic([0.6, 0.3])
    exact = MIXTURE.tilted(reward, 1.0)
    assert float(exact.weights[1] - MIXTURE.weights[1]) > 0.25
    flow = MixtureFlow(path, MIXTURE, trainable=True)
    model = solve(flow, Values(reward), 1.0, settings(), generator(0)).model
    torch.testing.assert_close(torch.softmax(model.logits, 0), exact.weights, rtol=0, atol=0.02)
    torch.testing.assert_close(model.means, exact.means, rtol=0, atol=0.03)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.slow_after(2)
def test_for_every_penalty_the_fit_has_the_mean_of_the_weighted_bank(penalty):
    """With only the mean of a Gaussian to fit, the loss is least at the weighted mean of the bank.

    The control variate corrects it by what the bank's plain mean is off the base's.
    """
    flow = MixtureFlow(PATHS["linear"], GAUSSIAN, trainable=True)
    choice = settings(bank=2000, penalty=penalty, updates=200)
    solution = solve(flow, Values(Waves()), 1.5, choice, generator(0))
    bank = draw_bank(flow, Values(Waves()), 1.5, choice, generator(0))
    weighted = torch.from_numpy(bank.solution.probabilities) @ bank.samples
    surplus = bank.samples.mean(0) - GAUSSIAN.mean
    assert float(surplus.norm()) > 0.01
    expected = weighted - solution.diagnostics["control_variate"] * surplus
    torch.testing.assert_close(solution.model.means[0], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("tail", ["lower", "upper"])
@pytest.mark.slow
def test_a_hinge_is_solved(tail):
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
    solution = solve(flow, hinge, weight, settings(updates=150), generator(0))
    found = sample_ode(solution.model, 20_000, generator(1), settings=OdeSettings(steps=8))[:, 0]
    # Four standard errors are 0.03; the rest is for the bank and a network of few updates.
    assert float(found.mean()) == pytest.approx(float(density @ x), abs=0.05)
    active = found < at if tail == "lower" else found > at
    expected = density[x < at if tail == "lower" else x > at].sum()
    assert float(active.double().mean()) == pytest.approx(expected, abs=0.02)
    # Stratified draws hold the share of the bank, which varies with its size.
    assert solution.history[-1]["active_share"] == pytest.approx(expected, abs=0.02)


# --- Bookkeeping -------------------------------------------------------------------------------

QUICK = {"bank": 64, "updates": 3, "batch": 16, "steps": 2, "minimum_ess": 1.0, "warning_ess": 1.0}


def quick_flow():
    return CorrectedFlow(MixtureFlow(PATHS["linear"], MIXTURE), AffineTable(PATHS["linear"], 5))


def test_a_solve_repeats_itself_leaves_the_base_alone_and_reports_every_update():
    flow, seen = quick_flow(), []
    before = [p.detach().clone() for p in flow.parameters()]
    runs = [
        solve(flow, Values(LINEAR), 1.0, settings(**QUICK), generator(7), progress)
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
    expected = {"update", "loss", "active_share", "failed_share", "gradient_norm", "network_passes"} | {
        "seconds"
    }
    assert set(seen[0]) == expected
    assert all(row["active_share"] == 1 for row in seen)


def test_the_diagnostics_are_those_of_the_bank_s_weights():
    choice = settings(**QUICK)
    solution = solve(quick_flow(), Values(LINEAR), 1.0, choice, generator(7))
    bank = draw_bank(quick_flow(), Values(LINEAR), 1.0, choice, generator(7))
    weights = bank.solution
    plan = plan_draws(weights.probabilities)
    assert solution.diagnostics == {
        "bank": 64,
        "failed": 0,
        "contexts": 1,
        "groups": 1,
        "pooled": 0,
        "effective_sample_size": weights.effective_sample_size,
        "least_effective_share": pytest.approx(weights.effective_sample_size / 64),
        "kl": pytest.approx((weights.probabilities * np.log(64 * weights.probabilities)).sum()),
        "mean_before": pytest.approx(bank.values.mean()),
        "mean_promised": pytest.approx(weights.probabilities @ bank.values),
        "largest_probability": weights.probabilities.max(),
        "nu": weights.nu,
        "primal": weights.primal,
        "dual": weights.dual,
        "gap": weights.gap,
        "relative_gap": weights.relative_gap,
        "control_variate": plan.coefficient,
        "noise": plan.noise,
    }


class Counted(CorrectedFlow):
    """Counts network passes of states in a list that its copies share: one forward, two backward."""

    def __init__(self, passes):
        super().__init__(MixtureFlow(PATHS["linear"], MIXTURE), AffineTable(PATHS["linear"], 5))
        self.passes = passes

    def __deepcopy__(self, memo):
        other = Counted(self.passes)
        other.load_state_dict(self.state_dict())
        return other

    def velocity(self, x, t, context=None):
        v = super().velocity(x, t, context)
        self.passes.append(len(x) * (3 if v.requires_grad else 1))
        return v


@pytest.mark.parametrize(("kl_weight", "with_control_variate"), [(0.3, False), (30.0, True)])
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_network_passes_are_what_goes_through_the_network(sampler, kl_weight, with_control_variate):
    passes, after = [], []
    choice = settings(**(QUICK | {"sampler": sampler}))
    flow = Counted(passes)
    solution = solve(
        flow, Values(LINEAR), kl_weight, choice, generator(0), lambda row: after.append(sum(passes))
    )
    assert [row["network_passes"] for row in solution.history] == after
    assert (solution.diagnostics["control_variate"] > 0) == with_control_variate


def test_the_shape_of_the_state_does_not_matter():
    class StackedValues(Values):
        def value(self, x, context=None):
            return self.reward(x[..., 0])

    flat = solve(quick_flow(), Values(LINEAR), 1.0, settings(**QUICK), generator(0))
    stacked = solve(Stacked(quick_flow()), StackedValues(LINEAR), 1.0, settings(**QUICK), generator(0))
    for a, b in zip(flat.model.parameters(), stacked.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class Tagged(FlowModel):
    """A flow whose context is a tag, which each state carries in its second coordinate."""

    def __init__(self, seen=None):
        super().__init__()
        self.path, self.seen = PATHS["vp"], seen
        self.weight = torch.nn.Parameter(torch.zeros(()).double())

    def draw_context(self, count, generator):
        return 1 + torch.rand(count, generator=generator, dtype=torch.float64)

    def select_context(self, context, index):
        return context[index]

    def prior(self, count, generator, context=None):
        return torch.stack([torch.randn(count, generator=generator, dtype=torch.float64), context], dim=1)

    def velocity(self, x, t, context=None):
        return x * self.weight

    def matching_residual(self, x1, x0, t, context=None):
        assert torch.equal(x1[:, 1], context)
        return (self.weight - context)[:, None].expand_as(x1)


def test_contexts_stay_with_their_samples():
    class OfContext(Values):
        sparse = True

        def value(self, x, context=None):
            assert torch.equal(x[:, 1], context)
            return context

        def active(self, x, context=None):
            return context > 1.8

    choice = settings(**(QUICK | {"bank": 5000, "batch": 500, "updates": 1}))
    solution = solve(Tagged(), OfContext(None), 0.2, choice, generator(0))
    # Tags are uniform on [1, 2], tilted by exp(5 c).
    expected = (math.exp(10) - math.exp(9)) / (math.exp(10) - math.exp(5))
    assert solution.history[0]["active_share"] == pytest.approx(expected, abs=0.03)


def test_the_active_share_is_that_of_the_tilted_distribution_and_never_above_one():
    """Of draws with importance weights it would be more than 1 in every other update."""
    hinge = Hinge(LINEAR, 1.5, 0.5, "upper")
    choice = settings(**(QUICK | {"bank": 500, "batch": 16, "updates": 40}))
    for tilt in (hinge, RewardVariation(LINEAR)):
        solution = solve(quick_flow(), tilt, 1.0, choice, generator(0))
        bank = draw_bank(quick_flow(), tilt, 1.0, choice, generator(0))
        expected = 1.0
        if tilt is hinge:
            expected = float(bank.solution.probabilities[(LINEAR(bank.samples) > 1.5).numpy()].sum())
            assert 0 < expected < 1
        shares = [row["active_share"] for row in solution.history]
        assert shares == pytest.approx([expected] * 40)
        assert max(shares) <= 1


# --- Too few effective samples, and bad input ---------------------------------------------------


def test_a_low_effective_sample_size_is_a_warning_with_the_number(caplog):
    choice = settings(**(QUICK | {"warning_ess": 60.0}))
    with caplog.at_level(logging.WARNING):
        solution = solve(quick_flow(), Values(LINEAR), 1.0, choice, generator(0))
    number = f"{solution.diagnostics['effective_sample_size']:.4g}"
    (record,) = caplog.records
    assert f"effective sample size of the weights is {number} of a bank of 64" in record.message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        solve(quick_flow(), Values(LINEAR), 1.0, settings(**QUICK), generator(0))
    assert not caplog.records


@pytest.mark.parametrize("penalty", PENALTIES)
def test_an_unusable_effective_sample_size_is_an_error_with_the_number_and_the_fix(penalty):
    choice = settings(bank=2000, penalty=penalty)
    message = r"is 10?(\.\d+)? of a bank of 2000, below the minimum of 50; draw a larger bank, raise the KL"
    with pytest.raises(UnusableBank, match=message):
        solve(quick_flow(), Values(LINEAR), 1e-5, choice, generator(0))


def test_without_a_tilt_the_whole_bank_counts_and_none_is_refused():
    class Nothing(Values):
        def value(self, x, context=None):
            return torch.zeros(len(x))

    choice = settings(**(QUICK | {"minimum_ess": 64.0, "warning_ess": 60.0}))
    solution = solve(quick_flow(), Nothing(None), 1.0, choice, generator(0))
    assert solution.diagnostics["effective_sample_size"] == pytest.approx(64)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_kl_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="KL weight of a solve must be positive"):
        solve(quick_flow(), Values(LINEAR), weight, settings(**QUICK), generator(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty": "chi2"}, "unknown penalty 'chi2'; there are kl"),
        ({"sampler": "heun"}, "sampler must be 'ode' or 'sde', got 'heun'"),
        ({"margin": 0.5}, r"margin must be a number in \(0, 0.5\), got 0.5"),
        ({"bank": 40}, "a bank of 40 cannot reach the minimum_ess of 50; draw a larger bank"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        WeightedFittingSettings(**changes)


def test_values_that_are_not_finite_are_refused():
    class Broken(Reward):
        def value(self, x, context=None):
            return torch.where(x[:, 0] > 0, x[:, 0], math.inf)

    class Raw(Values):
        def value(self, x, context=None):
            return self.reward.value(x, context)

    with pytest.raises(RewardError, match="is not finite on"):
        solve(quick_flow(), Values(Broken()), 1.0, settings(**QUICK), generator(0))
    with pytest.raises(ValueError, match=r"weights need finite values; \d+ of 64 are not"):
        solve(quick_flow(), Raw(Broken()), 1.0, settings(**QUICK), generator(0))


class Failing(Reward):
    """Has no value on one side of a line."""

    may_fail = True

    def __init__(self, line):
        self.line = line

    def value(self, x, context=None):
        return torch.where(x[:, 0] > self.line, x[:, 0], math.nan)


def test_samples_without_a_value_are_left_out_as_if_they_had_not_been_drawn():
    choice = settings(bank=2000)
    flow = MixtureFlow(PATHS["linear"], GAUSSIAN)
    whole = draw_bank(flow, Values(LINEAR), 1.0, choice, generator(0))
    bank = draw_bank(flow, Values(Failing(0.2)), 1.0, choice, generator(0))
    kept = whole.samples[whole.samples[:, 0] > 0.2]
    assert bank.failed == 2000 - len(kept) > 200
    assert bool((bank.samples[:, 0] > 0.2).all())
    values = np.sort(kept[:, 0].numpy())
    expected = solve_weights(values, 1.0, PENALTIES["kl"])
    np.testing.assert_allclose(bank.samples[:, 0].numpy(), values)
    np.testing.assert_allclose(bank.solution.probabilities, expected.probabilities)
    trainable = MixtureFlow(PATHS["linear"], GAUSSIAN, trainable=True)
    solution = solve(trainable, Values(Failing(0.2)), 1.0, settings(bank=2000, updates=1), generator(0))
    assert (solution.diagnostics["bank"], solution.diagnostics["failed"]) == (len(kept), bank.failed)


def test_a_bank_without_any_value_is_refused():
    with pytest.raises(UnusableBank, match="no value on any of the 64 samples"):
        solve(quick_flow(), Values(Failing(1e9)), 1.0, settings(**QUICK), generator(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_stops_being_finite_stops_the_run_and_names_the_update(bad):
    class Breaking(Tagged):
        calls = 0

        def matching_residual(self, x1, x0, t, context=None):
            self.calls += 1
            return super().matching_residual(x1, x0, t, context) * (bad if self.calls == 3 else 1.0)

    history = []
    choice = settings(**(QUICK | {"updates": 5}))
    with pytest.raises(
        TrainingDiverged, match=r"the loss is (nan|inf) at update 2 of 5; lower learning_rate"
    ):
        solve(Breaking(), Values(Quadratic([3.0, 0.0])), 1.0, choice, generator(0), history.append)
    assert len(history) == 2
