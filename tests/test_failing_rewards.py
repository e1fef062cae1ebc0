"""Rewards that fail on some samples, or have no gradient, in every solver, estimate and functional."""

import logging
import math

import numpy as np
import pytest
import torch

from closed_forms import PATHS, AffineTable, CorrectedFlow, Mixture, MixtureFlow, generator
from flowtilt.control import adjoint_matching, weighted_fitting
from flowtilt.control.adjoint_matching import AdjointMatchingSettings
from flowtilt.control.base import NoValues
from flowtilt.control.endpoints import likelihood_ratio_gradient
from flowtilt.control.penalties import PENALTIES
from flowtilt.control.weighted_fitting import UnusableBank, WeightedFittingSettings
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import Distribution, FirstVariation, Objective, gradient_of
from flowtilt.functionals.curvature import example_distribution, example_problem
from flowtilt.functionals.divergences import KL, ReferenceDraw
from flowtilt.functionals.registry import DIVERGENCES, UTILITIES, Ingredients
from flowtilt.functionals.utilities import CVaR, LogBarrier, MeanVariance, RewardVariation
from flowtilt.rewards import Reward, RewardError
from flowtilt.sampling import OdeSettings, memoryless_steps, sample_sde
from flowtilt.tfft import TailProblem
from flowtilt.thresholds import active_share, descend_threshold, dual_objective, threshold

DISTRIBUTION = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
AM = {"updates": 3, "batch": 32, "pool": 32, "steps": 5}
FITTED = {"bank": 400, "updates": 3, "batch": 16, "steps": 3, "minimum_ess": 1, "warning_ess": 1}


class Failing(Reward):
    """``x + y / 2``, without a value right of a line; ``trap`` says how the NaN comes about."""

    may_fail = True

    def __init__(self, line=0.8, trap="where"):
        self.line, self.trap = line, trap

    def value(self, x, context=None):
        bad = x[:, 0] > self.line
        if self.trap == "where":
            return torch.where(bad, math.nan, x[:, 0] + 0.5 * x[:, 1])
        if self.trap == "times":  # NaN is in the gradient too
            return (x[:, 0] + 0.5 * x[:, 1]) * torch.where(bad, math.nan, 1.0)
        return torch.where(bad, math.nan, (self.line - x[:, 0]).sqrt())  # infinite slope at the line


traps = pytest.mark.parametrize("trap", ["where", "times", "root"])


def flow():
    return CorrectedFlow(MixtureFlow(PATHS["linear"], DISTRIBUTION), AffineTable(PATHS["linear"], 5))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


FUNCTIONALS = [
    pytest.param(registry, name, example, id=f"{name}-{'-'.join(map(str, example.values()))}")
    for registry in (UTILITIES, DIVERGENCES)
    for name, entry in registry.items()
    for example in entry.examples
]


@traps
@pytest.mark.parametrize(("registry", "name", "example"), FUNCTIONALS)
def test_functionals_leave_failed_samples_out(registry, name, example, trap):
    """The value is that of the samples that are left; a failed one pulls nowhere and is not active."""
    reward = Failing(trap=trap)
    _, finite = example_problem()
    ingredients = Ingredients(
        reward=reward,
        cost=finite.cost,
        reference=finite.reference,
        score_time=0.9,
        ode=OdeSettings(steps=3),
        draw=ReferenceDraw(samples=20, steps=3),
    )
    if "critic" in example:
        example = example | {"critic": {"updates": 3}}
    functional = registry.build(name, example, ingredients)
    distribution = example_distribution()
    bad = distribution.samples[:, 0] > 0.8
    assert 0 < int(bad.sum()) < len(bad) // 2
    variation = functional.linearise(distribution)
    gradient = variation.gradient(distribution.samples, distribution.context)
    assert bool(torch.isfinite(gradient).all())
    assert math.isfinite(functional.value(distribution))
    concerned = bool(functional.rewards)
    assert torch.equal(variation.failed(distribution.samples, distribution.context), bad & concerned)
    if not concerned:
        return
    kept = Distribution(distribution.model, distribution.samples[~bad], distribution.context[~bad])
    assert functional.value(distribution) == functional.value(kept)
    assert not bool(gradient[bad].any())
    assert not bool(variation.active(distribution.samples, distribution.context)[bad].any())
    assert torch.equal(variation.value(distribution.samples, distribution.context).isnan(), bad)
    of_kept = functional.linearise(kept).gradient(kept.samples, kept.context)
    torch.testing.assert_close(gradient[~bad], of_kept)


def test_a_barrier_counts_samples_with_both_values():
    """Reward and cost fail on different samples; either leaves a sample out, whole."""
    reward, cost = Failing(0.8), Failing(0.3)
    distribution = example_distribution()
    barrier = LogBarrier(reward, cost, bound=9.0)
    kept = distribution.samples[distribution.samples[:, 0] <= 0.3]
    x = kept[:, 0] + 0.5 * kept[:, 1]
    assert barrier.value(distribution) == pytest.approx(float(x.mean() + (9.0 - x.mean()).log()))
    gradient = barrier.linearise(distribution).gradient(distribution.samples)
    assert torch.equal(gradient.any(1), distribution.samples[:, 0] <= 0.3)


@pytest.mark.parametrize("name", ["expected_reward", "cvar", "mean_variance", "log_barrier"])
def test_a_finite_distribution_with_a_point_without_a_value_is_refused(name):
    distribution, finite = example_problem()
    functional = UTILITIES.build(
        name, UTILITIES[name].examples[0], Ingredients(reward=Failing(), cost=finite.cost)
    )
    for use in (functional.finite_value, functional.finite_variation):
        with pytest.raises(RewardError, match=r"failed on \d+ of the 30 points of a finite distribution"):
            use(distribution)


ESTIMATES = {
    "pathwise": {"adjoint": "lean"},
    "likelihood_ratio": {"endpoint_gradient": "likelihood_ratio"},
    "posterior_mean": {"adjoint": "posterior_mean"},
}
TILTS = {
    "reward": RewardVariation,
    "lower tail": lambda reward: TailProblem("lower", 0.5, 1.0).pseudo_reward(reward, 0.6),
    "upper tail": lambda reward: TailProblem("upper", 0.5, 1.0).pseudo_reward(reward, 0.3),
    "mean and variance": lambda reward: MeanVariance(reward, 0.3).linearise(example_distribution()),
}


@traps
@pytest.mark.parametrize("tilt", TILTS.values(), ids=TILTS.keys())
@pytest.mark.parametrize("changes", ESTIMATES.values(), ids=ESTIMATES.keys())
def test_adjoint_matching_leaves_failed_samples_out_and_counts_them(changes, tilt, trap):
    choice = AdjointMatchingSettings(**(AM | changes))
    solution = adjoint_matching.solve(flow(), tilt(Failing(trap=trap)), 1.0, choice, generator(0))
    assert bool(torch.isfinite(weights(solution.model)).all())
    assert bool(weights(solution.model).any())
    for row in solution.history:
        assert 0 < row["failed_share"] < 1
        assert 0 < row["active_share"] <= 1 - row["failed_share"] + 1e-12 or "endpoint_gradient" in changes


@pytest.mark.parametrize("penalty", PENALTIES)
def test_weighted_fitting_leaves_failed_samples_out_and_counts_them(penalty):
    choice = WeightedFittingSettings(**FITTED, penalty=penalty)
    tilted = CorrectedFlow(MixtureFlow(PATHS["linear"], DISTRIBUTION), AffineTable(PATHS["linear"], 5))
    solution = weighted_fitting.solve(tilted, RewardVariation(Failing()), 1.0, choice, generator(0))
    assert bool(torch.isfinite(weights(solution.model)).all())
    assert {row["failed_share"] for row in solution.history} == {solution.diagnostics["failed"] / 400}
    assert 0 < solution.diagnostics["failed"] < 400


@pytest.mark.parametrize("changes", ESTIMATES.values(), ids=ESTIMATES.keys())
def test_flow_density_control_leaves_failed_samples_out(changes):
    start = flow()
    choice = AdjointMatchingSettings(**(AM | changes))
    ascent = ascend(
        start,
        Objective(CVaR(Failing(), 0.5), KL(start, 0.8), 0.5),
        range(2),
        MirrorAscent(1.0, 100, 5),
        lambda base, tilt, weight, random, slot: adjoint_matching.solve(base, tilt, weight, choice, random),
        generator,
    )
    assert bool(torch.isfinite(weights(ascent.model)).all())
    assert all(0 < row["failed_share"] < 1 for row in ascent.history)


def test_the_likelihood_ratio_is_zero_where_one_of_a_pair_has_no_value():
    steps, trajectories = memoryless_steps(flow(), 5), sample_sde(flow(), 200, 5, generator(0))
    found, _ = likelihood_ratio_gradient(flow(), RewardVariation(Failing()), trajectories, steps)
    whole, _ = likelihood_ratio_gradient(flow(), RewardVariation(Failing(99.0)), trajectories, steps)
    zero = ~found.any(1)
    assert bool(zero[trajectories[-1, :, 0] > 0.8].all())
    assert int(zero.sum()) > int((trajectories[-1, :, 0] > 0.8).sum())  # and some by their mirror image
    torch.testing.assert_close(found[~zero], whole[~zero])


@pytest.mark.parametrize("changes", ESTIMATES.values(), ids=ESTIMATES.keys())
def test_a_batch_without_any_value_is_refused(changes):
    choice = AdjointMatchingSettings(**(AM | changes))
    with pytest.raises(NoValues, match="no value on any of the 32 trajectories of update 0 of 3"):
        adjoint_matching.solve(flow(), RewardVariation(Failing(-1e9)), 1.0, choice, generator(0))
    fitted = WeightedFittingSettings(**FITTED)
    with pytest.raises(UnusableBank, match="no value on any of the 400 samples"):
        weighted_fitting.solve(flow(), RewardVariation(Failing(-1e9)), 1.0, fitted, generator(0))


@pytest.mark.parametrize("tail", ["lower", "upper"])
def test_thresholds_leave_failed_rewards_out_and_say_how_many(tail, caplog):
    rewards = np.random.default_rng(0).normal(size=50)
    every = np.insert(rewards, [3, 20, 50], math.nan)
    shares = np.insert(np.linspace(1, 2, 50), [3, 20, 50], 7.0)
    problem = TailProblem(tail, 0.2, 1.5)
    with caplog.at_level(logging.WARNING):
        assert problem.threshold(every) == problem.threshold(rewards)
    assert "leaves out 3 of 53 rewards" in caplog.text
    of_kept = threshold(rewards, 1.0, 0.3, tail, np.linspace(1, 2, 50))
    assert threshold(every, 1.0, 0.3, tail, shares) == of_kept
    assert dual_objective(0.1, every, 1.0, 0.3, tail) == dual_objective(0.1, rewards, 1.0, 0.3, tail)
    assert active_share(every, 0.1, tail) == active_share(rewards, 0.1, tail)
    if tail == "upper":
        assert descend_threshold(every, 1.0, 0.3) == descend_threshold(rewards, 1.0, 0.3)


# --- Rewards without a gradient -----------------------------------------------------------------


class Without(Reward):
    """``x`` along the first axis, by a way that leaves no graph."""

    def __init__(self, way):
        self.way = way

    def value(self, x, context=None):
        if self.way == "no_grad":
            with torch.no_grad():
                return x[:, 0] + 0.0
        if self.way == "detached":
            return x[:, 0].detach()
        if self.way == "parameter":  # requires a gradient, and not one of x
            return x[:, 0].detach() * torch.nn.Parameter(torch.ones((), dtype=x.dtype))
        return (10 * x[:, 0]).long() if self.way == "integer" else torch.ones(len(x))


class ByCall(FirstVariation):
    """A first variation whose gradient is taken of checked rewards, which have none."""

    def __init__(self, reward):
        self.reward = reward

    def value(self, x, context=None):
        return self.reward(x, context)

    def gradient(self, x, context=None):
        return gradient_of(self.value, x)


ways = pytest.mark.parametrize("way", ["no_grad", "detached", "parameter", "integer", "constant"])
CURE = "endpoint_gradient: likelihood_ratio, or kind: weighted_fitting"


@ways
@pytest.mark.parametrize("tilt", [*TILTS.values(), ByCall], ids=[*TILTS.keys(), "called"])
def test_a_reward_without_a_graph_is_an_error_that_names_the_cure(tilt, way):
    if way == "constant" and tilt not in (RewardVariation, ByCall):
        pytest.skip("a hinge need not reach a constant")
    for changes in ({}, {"adjoint": "posterior_mean"}):
        with pytest.raises(RewardError, match=CURE):
            adjoint_matching.solve(
                flow(), tilt(Without(way)), 1.0, AdjointMatchingSettings(**(AM | changes)), generator(0)
            )


@ways
def test_solvers_by_values_take_a_reward_without_a_graph(way):
    choice = AdjointMatchingSettings(**AM, endpoint_gradient="likelihood_ratio")
    fitted = WeightedFittingSettings(**FITTED)
    tilt = RewardVariation(Without(way))
    expected = 0 if way == "constant" else 1
    for module, own in ((adjoint_matching, choice), (weighted_fitting, fitted)):
        history = module.solve(flow(), tilt, 1.0, own, generator(0)).history
        assert [row["active_share"] for row in history] == pytest.approx([expected] * 3, abs=0.3 * expected)


class Partly(Reward):
    """A hinge of its own: a gradient on the right of the line alone, zero elsewhere."""

    def __init__(self, line):
        self.line = line

    def value(self, x, context=None):
        return (x[:, 0] - self.line).clamp(min=0)


@pytest.mark.parametrize("changes", ESTIMATES.values(), ids=ESTIMATES.keys())
@pytest.mark.parametrize("line", [0.4, 1e9])
def test_the_active_share_counts_gradients_that_are_not_zero(changes, line):
    """A reward with a graph whose gradient is zero on a part of the batch, or on all of it, is legal."""
    choice = AdjointMatchingSettings(**(AM | changes | {"updates": 1, "batch": 64, "pool": 64}))
    (row,) = adjoint_matching.solve(flow(), RewardVariation(Partly(line)), 1.0, choice, generator(0)).history
    x = sample_sde(flow(), 64, 5, generator(0))[-1]
    share = float((x[:, 0] > line).double().mean())
    if "endpoint_gradient" in changes:  # or its mirror image is on the right
        assert share <= row["active_share"] < max(1.0, share)
        assert row["active_share"] == share or line < 1
    else:
        assert row["active_share"] == share
