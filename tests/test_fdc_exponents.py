"""Flow Density Control by accumulated exponents: on models, by solvers, against closed forms."""

import itertools
import json
import logging
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import norm

from closed_forms import PATHS, Mixture, MixtureFlow, Quadratic, generator
from flowtilt.control import weighted_fitting
from flowtilt.control.base import Solution, TrainingDiverged
from flowtilt.control.weighted_fitting import WeightedFittingSettings
from flowtilt.fdc import ExponentAscent, NoStep, Trail, ascend_by_exponents
from flowtilt.functionals.base import FiniteDistribution, NoValues, WeightedSum
from flowtilt.functionals.design import OptimalDesign
from flowtilt.functionals.utilities import (
    SQ,
    Barrier,
    CVaR,
    Entropy,
    ExpectedReward,
    InfeasibleBarrier,
    LogBarrier,
    MeanVariance,
)
from flowtilt.metrics.tails import upper_tail_mean
from flowtilt.mirror import Exponents, numbers_of, with_numbers
from flowtilt.resuming import Resumption
from flowtilt.rewards import Reward
from flowtilt.thresholds import dual_objective, threshold

PATH = PATHS["linear"]
START = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
REWARD = Quadratic([1.0, 0.5])
COST = Quadratic([0.2, -0.4])


def exact_solver(base, tilt, kl_weight, random, slot=None, given=None):
    """The exact tilt of a Gaussian flow by a linear direction, read off its values."""
    values = tilt.value(torch.eye(3, dtype=torch.float64)[:, 1:])
    tilted = base.distribution.tilted(Quadratic(values[1:] - values[0]), kl_weight)
    return Solution(MixtureFlow(base.path, tilted), [{"update": 0}])


def settings(**changes):
    base = {"distribution_samples": 4000, "distribution_steps": 20}
    return ExponentAscent(**(base | changes))


@pytest.mark.parametrize("eta", [0.8, 2.0])
def test_at_a_fixed_weight_it_contracts_as_by_scores(eta):
    """``log p_k = log p_0 + (1 - (1 - alpha / eta)^k) r / alpha``, exactly: there is no score to estimate."""
    start, alpha = MixtureFlow(PATH, START), 0.8
    for k in range(1, 5):
        result = ascend_by_exponents(
            start, ExpectedReward(REWARD), alpha, k, settings(step_weight=eta), exact_solver, generator
        )
        expected = START.tilted(REWARD, alpha / (1 - (1 - alpha / eta) ** k))
        torch.testing.assert_close(result.model.distribution.mean, expected.mean, rtol=0, atol=1e-9)
        assert [row["iteration"] for row in result.history] == list(range(1, k + 1))


def test_the_line_search_takes_the_whole_way_where_samples_carry_it_and_stops_there(caplog):
    """An expected reward is at its optimum after the largest step; three nats take several."""
    start, alpha = MixtureFlow(PATH, START), math.sqrt(1.55 / 6)
    with caplog.at_level(logging.INFO):
        result = ascend_by_exponents(
            start, ExpectedReward(REWARD), alpha, 12, settings(), exact_solver, generator
        )
    exact = START.tilted(REWARD, alpha)
    torch.testing.assert_close(result.model.distribution.mean, exact.mean, rtol=1e-3, atol=1e-3)
    rows = result.history
    assert 3 <= len(rows) < 12
    assert "no step gains anything after" in caplog.text
    assert all(row["gain"] > 0 and row["effective_share"] > 0.299 for row in rows)
    assert rows[0]["step_weight"] > 1.5 * alpha
    assert rows[-1]["step_weight"] == pytest.approx(alpha)
    assert rows[-1]["kl"] == pytest.approx(3, rel=0.05)
    # What the samples promise is what the next ones have.
    for row, after in itertools.pairwise(rows):
        assert after["utility"] == pytest.approx(row["utility_promised"], abs=0.15)


class Height(Reward):
    def value(self, x, context=None):
        return x[:, 0]


def test_an_upper_tail_is_raised_to_its_optimum_by_weighted_fitting():
    """Two components of which one moves: nearly the tilt by a hinge. The optimum is that of the dual."""
    two = Mixture.of([0.8, 0.2], [[-0.2, 0.0], [0.6, 0.0]], torch.eye(2).expand(2, 2, 2))
    flow, mass, alpha = MixtureFlow(PATH, two, trainable=True), 0.1, 4.0
    fitting = WeightedFittingSettings(
        bank=10_000,
        steps=8,
        updates=200,
        learning_rate=0.03,
        gradient_clip=10.0,
        minimum_ess=0,
        warning_ess=0,
    )
    result = ascend_by_exponents(
        flow,
        SQ(Height(), mass),
        alpha,
        3,
        settings(distribution_samples=20_000),
        lambda base, tilt, weight, random, slot, given: weighted_fitting.solve(
            base, tilt, weight, fitting, random
        ),
        generator,
    )
    rewards = two.sample(400_000, generator(9))[:, 0].numpy()
    at = threshold(rewards, alpha, mass, "upper")
    optimum = dual_objective(at, rewards, alpha, mass, "upper")
    samples = result_samples(result.model, 200_000)
    reached = upper_tail_mean(samples, mass) - alpha * result.history[-1]["kl"]
    before = upper_tail_mean(rewards, mass)
    assert reached - before > 0.9 * (optimum - before)
    steps = {row["iteration"]: row for row in result.history}.values()
    assert all(row["gain"] > 0 for row in steps)


def result_samples(model, count):
    weights = torch.softmax(model.logits.detach(), 0)
    found = Mixture(weights, model.means.detach(), model.distribution.covariances)
    return found.sample(count, generator(10))[:, 0].numpy()


def test_a_fixed_weight_that_descends_says_so(caplog):
    """Past the kink of an upper tail: the first step moves more than the tail's mass."""
    start = MixtureFlow(PATH, START)
    with caplog.at_level(logging.WARNING):
        ascend_by_exponents(start, SQ(REWARD, 0.1), 0.5, 1, settings(step_weight=0.5), still, generator)
    assert "at the fixed weight 0.5, step 1 lowers the objective by" in caplog.text


def still(base, tilt, kl_weight, random, slot=None, given=None):
    return Solution(base, [{"update": 0}])


def test_a_solver_that_goes_down_is_stopped():
    def down(base, tilt, kl_weight, random, slot=None, given=None):
        moved = Mixture.gaussian([-3.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
        return Solution(MixtureFlow(base.path, moved), [{"update": 0}])

    for iterations in (1, 2):
        with pytest.raises(TrainingDiverged, match=f"after iteration 1 of {iterations} the utility is"):
            ascend_by_exponents(
                MixtureFlow(PATH, START), CVaR(REWARD, 0.1), 0.5, iterations, settings(), down, generator
            )


@pytest.mark.parametrize(
    "utility", [Entropy(), WeightedSum(((1.0, ExpectedReward(REWARD)), (1.0, Entropy())))]
)
def test_a_functional_without_values_is_refused_before_any_training(utility):
    def never(*arguments):
        raise AssertionError("no solve")

    with pytest.raises(NoValues, match=r"Entropy is not known from weights of samples: .* by scores"):
        ascend_by_exponents(MixtureFlow(PATH, START), utility, 1.0, 2, settings(), never, generator)


def test_samples_that_give_no_step_are_an_error_before_any_training():
    """Of 400 samples four are in the tail: what a step adds cannot rest on fifty."""
    start, few = MixtureFlow(PATH, START), settings(distribution_samples=400)
    with pytest.raises(NoStep, match=r"on 400 samples .* no step .* 50 effective samples for what it adds"):
        ascend_by_exponents(start, SQ(REWARD, 0.01), 2.0, 2, few, still, generator)


class Failing(Reward):
    may_fail = True

    def value(self, x, context=None):
        return torch.where(x[:, 0] > 0.2, x[:, 0], math.nan)


def test_samples_without_a_value_are_left_out_and_counted():
    result = ascend_by_exponents(
        MixtureFlow(PATH, START), SQ(Failing(), 0.1), 2.0, 1, settings(), still, generator
    )
    (row,) = result.history
    assert row["failed_share"] == pytest.approx(norm.cdf(0.2, 0.5), abs=0.04)
    assert math.isfinite(row["gain"])


BANK = FiniteDistribution(
    START.sample(200, generator(0)), np.full(200, -math.log(200)), np.full(200, -math.log(200))
)
UTILITIES = [
    ExpectedReward(REWARD),
    CVaR(REWARD, 0.2),
    SQ(REWARD, 0.2),
    MeanVariance(REWARD, 0.3),
    LogBarrier(REWARD, COST, bound=5.0),
    OptimalDesign(),
    WeightedSum(((1.0, SQ(REWARD, 0.2)), (0.5, CVaR(REWARD, 0.1)))),
]


@pytest.mark.parametrize("utility", UTILITIES, ids=lambda u: type(u).__name__)
def test_first_variations_are_written_down_as_numbers(utility):
    """From samples of one distribution, at another: what a state on disk holds."""
    other = FiniteDistribution(BANK.points + 1, BANK.log_p, BANK.log_p)
    variation, template = utility.variation_at(BANK), utility.variation_at(other)
    again = with_numbers(template, iter(numbers_of(variation)))
    x = START.sample(50, generator(1))
    torch.testing.assert_close(again.value(x), variation.value(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.gradient(x), variation.gradient(x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variation.on(BANK), variation.value(BANK.points).numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(variation.on(BANK), utility.finite_variation(BANK), rtol=1e-12)
    both = Exponents(((0.5, variation), (2.0, template)))
    torch.testing.assert_close(both.value(x), 0.5 * variation.value(x) + 2 * template.value(x))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_stopped_ascent_goes_on_exactly_where_it_was(seconds, tmp_path):
    two = Mixture.of([0.8, 0.2], [[-0.2, 0.0], [0.6, 0.0]], torch.eye(2).expand(2, 2, 2))
    start = MixtureFlow(PATH, two, trainable=True)
    fitting = WeightedFittingSettings(bank=400, steps=3, updates=6, batch=16, minimum_ess=0, warning_ess=0)
    done = []

    def climb(progress=None, resumption=None):
        def solver(base, tilt, weight, random, slot=None, given=None):
            return weighted_fitting.solve(base, tilt, weight, fitting, random, progress, slot)

        choice = settings(distribution_samples=300, distribution_steps=4, minimum_ess=0)
        return ascend_by_exponents(start, SQ(Height(), 0.2), 1.0, 3, choice, solver, generator, resumption)

    def progress(row):
        done.append(row["update"])
        if len(done) in (3, 9, 14):
            raise Stopped

    whole = climb()
    assert len(whole.history) == 18
    resumption = Resumption(tmp_path, "an ascent", seconds)
    for _ in range(3):
        with pytest.raises(Stopped):
            climb(progress, resumption)
    resumed = climb(progress, resumption)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [{**row, "seconds": 0} for row in resumed.history] == [
        {**row, "seconds": 0} for row in whole.history
    ]


def test_an_ascent_goes_on_from_the_trail_of_another():
    """Through JSON, and in all that a single one has; from one at its end there is nothing to do."""
    start, alpha = MixtureFlow(PATH, START), 1.5

    def climb(first, iterations, trail=None):
        return ascend_by_exponents(
            first, ExpectedReward(REWARD), alpha, iterations, settings(), exact_solver, generator, trail=trail
        )

    whole, half = climb(start, 3), climb(start, 1)
    read = Trail(**json.loads(json.dumps(asdict(half.trail))))
    rest = climb(half.model, 3, read)
    assert half.history + rest.history == whole.history
    assert rest.trail == whole.trail
    torch.testing.assert_close(rest.model.distribution.mean, whole.model.distribution.mean, rtol=0, atol=0)
    after = climb(whole.model, 9, whole.trail)
    more = climb(after.model, 12, after.trail)
    assert len(after.history) < 6
    assert more.history == []
    assert more.trail == after.trail


# --- Budgets --------------------------------------------------------------------------------------


def test_steps_of_a_budget_end_at_the_divergences_that_are_asked_for():
    """Of an expected reward each is the Gaussian moved by the root of twice its nats, in units of its own
    spread along the reward."""
    start, found = MixtureFlow(PATH, START), []
    spread = math.sqrt(float(REWARD.linear @ START.covariance @ REWARD.linear))
    before = float(START.mean @ REWARD.linear)

    def measure(x, context, values):
        found.append(float(values.mean()))
        return {"mean": found[-1]}

    choice = settings(kl=1.2, stage_kl=0.4, distribution_samples=20_000)
    result = ascend_by_exponents(
        start, ExpectedReward(REWARD), 7.0, 9, choice, exact_solver, generator, measure=measure
    )
    rows = result.history
    assert [row["kl"] for row in rows] == pytest.approx([0.4, 0.8, 1.2], abs=1e-6)
    mean = before + spread * math.sqrt(2.4)
    assert float(result.model.distribution.mean @ REWARD.linear) == pytest.approx(mean, rel=0.03)
    assert [row["kl"] for row in result.frontier] == pytest.approx([0, 0.4, 0.8, 1.2], abs=1e-6)
    expected = [before + spread * math.sqrt(2 * nats) for nats in (0, 0.4, 0.8, 1.2)]
    assert [row["mean"] for row in result.frontier] == found == pytest.approx(expected, abs=0.04)
    assert [row["bank_mean"] for row in rows] == found[:-1]
    # From the trail of the first two steps there is one to go.
    half = ascend_by_exponents(start, ExpectedReward(REWARD), 7.0, 2, choice, exact_solver, generator)
    rest = ascend_by_exponents(
        half.model, ExpectedReward(REWARD), 7.0, 9, choice, exact_solver, generator, trail=half.trail
    )
    assert len(rest.history) == 1
    assert rest.history[0]["kl"] == pytest.approx(1.2, abs=1e-6)


class Beyond(Reward):
    """1 where the second coordinate is above a bound."""

    differentiable = False

    def value(self, x, context=None):
        return (x[:, 1] > 0.0).to(x)


def grid_solver(base, tilt, kl_weight, random, slot=None, given=None):
    """The tilt itself, as its own samples by rejection: no network."""
    return Solution(Tilted(base, tilt, kl_weight), [{"update": 0}])


class Tilted(MixtureFlow):
    """A Gaussian flow whose samples are those of the pretrained one, resampled by a sum of tilts."""

    def __init__(self, base, tilt, weight):
        super().__init__(base.path, base.distribution)
        self.tilts = [*getattr(base, "tilts", []), (tilt, weight)]

    def data_of(self, x, context=None):
        return x


def drawn(model, count, random):
    x = (
        START.mean
        + torch.randn(count, 2, generator=random, dtype=torch.float64)
        @ torch.linalg.cholesky(START.covariance).mT
    )
    logits = sum((tilt.value(x) / weight for tilt, weight in getattr(model, "tilts", [])), torch.zeros(count))
    index = torch.multinomial(torch.softmax(logits, 0), count // 8, True, generator=random)
    return x[index]


@pytest.fixture
def by_resampling(monkeypatch):
    """Samples of an ascent's models by resampling, instead of by their velocity."""

    def distribution(model, settings, random):
        return FiniteDistributionOf(drawn(model, 8 * settings.distribution_samples, random))

    monkeypatch.setattr("flowtilt.fdc._distribution", distribution)


class FiniteDistributionOf:
    def __init__(self, samples):
        self.samples, self.context = samples, None


def test_a_barrier_keeps_the_share_below_its_bound_where_the_reward_would_pass_it(by_resampling):
    """The reward rises with the second coordinate, which the constraint wants low."""
    start = MixtureFlow(PATH, START)
    reward = Quadratic([0.3, 1.0])
    share = 1 - norm.cdf(0.3 / math.sqrt(0.6))  # at the start
    choice = settings(kl=0.6, stage_kl=0.2, distribution_samples=4000)

    def reached(utility):
        banks = []

        def measure(x, context, values):
            banks.append((float((x[:, 1] > 0).double().mean()), upper_tail_mean(values.numpy(), 0.1)))
            return {"share": banks[-1][0]}

        def plain(x, context, values):
            return measure(x, context, torch.as_tensor(values))

        result = ascend_by_exponents(start, utility, 0.0, 4, choice, grid_solver, generator, measure=plain)
        assert result.history[-1]["kl"] == pytest.approx(0.6, abs=1e-3)
        return banks[-1]

    sq = SQ(reward, 0.1)
    free, tail = reached(sq)
    kept, tail_kept = reached(WeightedSum(((1.0, sq), (2.0, Barrier(Beyond(), 0.45)))))
    assert share == pytest.approx(0.35, abs=0.01)
    assert free > 0.45
    assert kept < 0.45
    assert tail_kept > upper_tail_mean(reward(drawn(start, 40_000, generator(3))).numpy(), 0.1)
    assert tail > tail_kept


def test_a_barrier_that_the_start_already_violates_is_one_error_before_any_training():
    utility = WeightedSum(((1.0, SQ(REWARD, 0.1)), (1.0, Barrier(Beyond(), 0.2))))

    def untrained(*args, **more):
        raise AssertionError("trained")

    with pytest.raises(InfeasibleBarrier, match="raise the bound"):
        ascend_by_exponents(MixtureFlow(PATH, START), utility, 0.0, 4, settings(kl=0.6), untrained, generator)


def test_the_first_variation_of_a_barrier_is_its_derivative():
    """By a finite difference of the functional along a mixture of two distributions."""
    x = torch.randn(50, 2, generator=generator(0), dtype=torch.float64)
    p, q = (w / w.sum() for w in np.random.default_rng(1).random((2, 50)))
    barrier = Barrier(Beyond(), 0.9)

    def at(weights):
        return FiniteDistribution(x, np.log(weights), np.log(p))

    step = 1e-6
    change = barrier.finite_value(at((1 - step) * p + step * q)) - barrier.finite_value(at(p))
    assert change / step == pytest.approx(barrier.variation_at(at(p)).on(at(p)) @ (q - p), rel=1e-4)


@pytest.mark.parametrize("more", [{"step_weight": 1.0, "kl": 1.0}, {"stage_kl": 0.5}])
def test_a_budget_of_steps_is_refused_beside_what_it_replaces(more):
    with pytest.raises(ValueError, match="kl"):
        settings(**more)
