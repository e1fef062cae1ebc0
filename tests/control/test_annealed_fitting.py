"""Annealed fitting against closed forms, where one bank of the same size does and does not do."""

import logging
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from closed_forms import (
    PATHS,
    GaussianFlow,
    Mixture,
    MixtureFlow,
    Quadratic,
    Values,
    generator,
    relative_error,
)
from flowtilt.control import adjoint_matching, weighted_fitting
from flowtilt.control.adjoint_matching import AdjointMatchingSettings
from flowtilt.control.annealed_fitting import AnnealedFittingSettings, base_weights, solve, solve_tail
from flowtilt.control.weighted_fitting import UnusableBank, WeightedFittingSettings
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.resuming import Resumption
from flowtilt.rewards import Reward
from flowtilt.tfft import TailProblem
from flowtilt.tilts import Groups, strongest, tilted
from mode_flow import Modes

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
PATH = PATHS["linear"]


def fitting(**changes):
    base = {"bank": 20_000, "steps": 8, "updates": 200, "batch": 512, "learning_rate": 0.05}
    loose = {"gradient_clip": 10.0, "minimum_ess": 0.0, "warning_ess": 0.0}
    return WeightedFittingSettings(**(base | loose | changes))


def annealed(share=0.3, stages=20, settled=1e-3, **changes):
    return AnnealedFittingSettings(fitting(**changes), share, stages, settled)


def divergence(distribution, base):
    """``KL(distribution || base)`` of two Gaussians, in nats."""
    own, other = (torch.distributions.MultivariateNormal(g.mean, g.covariance) for g in (distribution, base))
    return float(torch.distributions.kl_divergence(own, other))


def weight_of(distribution, reward, nats):
    """The KL weight at which the tilt of a Gaussian is so many nats from it."""
    return brentq(lambda w: divergence(distribution.tilted(reward, w), distribution) - nats, 1e-3, 1e3)


ten_nats = pytest.mark.parametrize("nats", [2, 5, pytest.param(10, marks=pytest.mark.slow)])


# --- Closed forms ------------------------------------------------------------------------------


@ten_nats
def test_a_gaussian_is_tilted_by_many_nats_in_stages_and_not_by_one_bank(nats):
    """Mean and covariance within 3 %; one bank of the same size is off by far at 10 nats.

    A stage keeps 18,000 effective samples: it knows variances to one per cent, and errors of stages add up.
    """
    reward = Quadratic([1.0, 0.5], [[0.06, 0.02], [0.02, 0.1]])
    weight = weight_of(GAUSSIAN, reward, nats)
    exact = GAUSSIAN.tilted(reward, weight)
    choice = annealed(bank=60_000, updates=200, batch=1024, learning_rate=0.03)
    flow = GaussianFlow(PATH, GAUSSIAN)
    solution = solve(flow, Values(reward), weight, choice, generator(0))
    assert relative_error(solution.model.mean.detach(), exact.mean) < 0.03
    deviation = math.sqrt(2 / (0.3 * choice.fitting.bank) * len(solution.stages))
    assert relative_error(solution.model.covariance.detach(), exact.covariance) < max(0.03, 3 * deviation)
    last = solution.stages[-1]
    assert last["kl"] == pytest.approx(nats, rel=0.03)
    assert last["strength"] == pytest.approx(1, abs=0.02)
    # What the weights promise is what the next bank has.
    moved = last["mean_reached"] - solution.stages[0]["mean_before"]
    for row in solution.stages:
        assert row["mean_reached"] == pytest.approx(row["mean_promised"], abs=0.02 * moved)
        assert row["effective_share"] >= 0.3 * (1 - 1e-9)
    if nats == 10:
        one = weighted_fitting.solve(flow, Values(reward), weight, choice.fitting, generator(0))
        assert one.diagnostics["effective_sample_size"] < 10
        assert relative_error(one.model.mean.detach(), exact.mean) > 0.06
        assert relative_error(one.model.covariance.detach(), exact.covariance) > 0.3


MIXTURE = Mixture.of(
    [0.7, 0.3], [[0.0, -1.5], [0.0, 1.5]], [[[0.25, 0.0], [0.0, 0.3]], [[0.2, 0.05], [0.05, 0.25]]]
)


@ten_nats
def test_the_weights_and_means_of_a_mixture_are_tilted_by_many_nats(nats):
    reward = Quadratic([1.0, 0.15])
    # Of the mean component's tilt; that of the mixture differs by what the weights cost.
    weight = math.sqrt(0.25 / 2 / nats)
    exact = MIXTURE.tilted(reward, weight)
    flow = MixtureFlow(PATH, MIXTURE, trainable=True)
    choice = annealed(bank=60_000, updates=150, learning_rate=0.05)
    solution = solve(flow, Values(reward), weight, choice, generator(0))
    found = torch.softmax(solution.model.logits.detach(), 0)
    assert float(abs(exact.weights - MIXTURE.weights).max()) > 0.02
    torch.testing.assert_close(found, exact.weights, rtol=0, atol=0.03)
    assert relative_error(solution.model.means.detach(), exact.means) < 0.03
    if nats == 10:
        one = weighted_fitting.solve(flow, Values(reward), weight, choice.fitting, generator(0))
        assert one.diagnostics["effective_sample_size"] < 20
        assert relative_error(one.model.means.detach(), exact.means) > 0.06


class LabelledModes(Modes):
    def context_labels(self, context):
        return context


MEANS = ([-1.0, 0.0], [0.0, 0.5], [1.5, 0.0])


def mode_flow():
    distributions = [Mixture.gaussian(mean, [[1.0, 0.3], [0.3, 0.8]]) for mean in MEANS]
    return LabelledModes([MixtureFlow(PATH, distribution, trainable=True) for distribution in distributions])


def by_adjoint_matching(flow, tilt, weight):
    choice = AdjointMatchingSettings(updates=60, batch=128, pool=128, steps=40, learning_rate=0.1)
    return adjoint_matching.solve(flow, tilt, weight, choice, generator(0))


SOLVERS = {
    "adjoint_matching": by_adjoint_matching,
    "weighted_fitting": lambda *problem: weighted_fitting.solve(*problem, fitting(), generator(0)),
    "annealed_fitting": lambda *problem: solve(*problem, annealed(), generator(0)),
}


@pytest.mark.parametrize(
    ("name", "nats"),
    [
        *(("adjoint_matching", 0.5), ("weighted_fitting", 0.5), ("annealed_fitting", 2)),
        *(pytest.param(name, 5, marks=pytest.mark.slow) for name in SOLVERS if name != "weighted_fitting"),
    ],
)
def test_every_solver_tilts_each_context_by_itself(name, nats):
    """``N(m_c, S)`` under ``c^T x`` is ``N(m_c + S c / alpha, S)``, in each context; within 5 % of the move.

    A context has a third of the bank: five nats leave one bank nothing of it.
    """
    reward, flow = Quadratic([1.0, 0.5]), mode_flow()
    weight = weight_of(flow.flows[0].distribution, reward, nats)
    solution = SOLVERS[name](flow, RewardVariation(reward), weight)
    for own, before in zip(solution.model.flows, flow.flows, strict=True):
        exact = before.distribution.tilted(reward, weight).means
        move = float((exact - before.distribution.means).norm())
        assert float((own.means.detach() - exact).norm()) < 0.05 * move


# --- Tails -------------------------------------------------------------------------------------


class Height(Reward):
    def value(self, x, context=None):
        return x[:, 0]


TWO = Mixture.of([0.85, 0.15], [[-0.2, 0.0], [0.6, 0.0]], torch.eye(2).expand(2, 2, 2))


def exact_threshold(problem):
    """By quadrature of the dual of the first coordinate's density."""
    r = np.linspace(-8, 16, 200_001)
    p = 0.85 * norm.pdf(r, -0.2) + 0.15 * norm.pdf(r, 0.6)
    logs = np.log(p) + math.log(r[1] - r[0])

    def dual(t):
        return t + problem.alpha * np.logaddexp.reduce(
            logs + np.maximum(r - t, 0) / (problem.alpha * problem.mass)
        )

    return minimize_scalar(dual, bounds=(-2, 14), method="bounded", options={"xatol": 1e-9}).x


@pytest.mark.parametrize("reach", [2.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_the_threshold_of_a_tail_beyond_the_batch_comes_from_the_chain(reach):
    """The hinge moves a tenth of the mass by ``reach``; at 5 the batch of 4,000 has nothing there.

    The tilted distribution is nearly one of the family: two components, one of which moves.
    """
    problem = TailProblem("upper", mass=0.1, alpha=10 / reach)
    exact = exact_threshold(problem)
    flow = MixtureFlow(PATH, TWO, trainable=True)
    choice = annealed(bank=4_000, updates=200, learning_rate=0.03, minimum_ess=50)
    solution = solve_tail(flow, Height(), problem, choice, generator(1))
    batches = [TWO.sample(4_000, generator(seed))[:, 0].numpy() for seed in range(20)]
    off = math.sqrt(np.mean([(problem.threshold(batch) - exact) ** 2 for batch in batches]))
    assert abs(solution.stages[-1]["parameter"] - exact) < (off if reach == 5 else 0.15)
    if reach == 5:
        assert off > 0.5
        # Past the best sample of nearly every batch; what the fits fall short of 5 the exponents do not see.
        assert float(solution.model.means.detach()[:, 0].max()) > 3.8
    assert solution.history[-1]["active_share"] == pytest.approx(problem.mass, abs=0.04)
    assert {row["stage"] for row in solution.history} == set(range(1, len(solution.stages) + 1))


def test_what_a_hinge_adds_rests_on_as_many_samples_as_were_asked_for():
    """All others, which it leaves alone, would hide that one sample has it."""
    values = np.sort(np.random.default_rng(0).normal(size=2000))
    exponents = np.maximum(values - 2.5, 0) * 5
    groups = Groups.single(2000)
    by_all = tilted(strongest(exponents, groups, 0.3) * exponents, groups)
    assert 2000 * by_all.gaining_share < 10
    by_few = strongest(exponents, groups, 0.3, gaining=8 / 2000)
    assert 2000 * tilted(by_few * exponents, groups).gaining_share >= 8
    # Nothing that so few samples are past can rest on 50 of them.
    assert strongest(exponents, groups, 0.3, gaining=50 / 2000) < 1e-10


def test_a_threshold_that_the_first_bank_knows_stays_whatever_the_fits_miss():
    """The optimum is far from Gaussian, and each fit is one: thresholds of later banks would run away."""
    problem, flow = TailProblem("lower", mass=0.2, alpha=0.5), GaussianFlow(PATH, GAUSSIAN)
    choice = annealed(0.7, bank=4000, updates=100, learning_rate=0.03)
    solution = solve_tail(flow, Height(), problem, choice, generator(0))
    assert 1 < len(solution.stages) < 8
    bank = GAUSSIAN.sample(100_000, generator(3))[:, 0].numpy()
    assert {row["parameter"] for row in solution.stages} == {solution.stages[0]["parameter"]}
    assert solution.stages[0]["parameter"] == pytest.approx(problem.threshold(bank), abs=0.2)
    assert solution.stages[-1]["strength"] == pytest.approx(1)
    paid = [row["kl"] for row in solution.stages]
    assert paid == sorted(paid)
    assert paid[0] > 0


@pytest.mark.parametrize("tail", ["lower", "upper"])
def test_a_tail_within_reach_is_that_of_the_offline_threshold(tail):
    problem = TailProblem(tail, mass=0.3, alpha=4.0)
    flow, rewards = MixtureFlow(PATH, TWO, trainable=True), TWO.sample(200_000, generator(5))[:, 0]
    solution = solve_tail(flow, Height(), problem, annealed(updates=5), generator(0))
    assert len(solution.stages) == 1
    assert solution.stages[0]["parameter"] == pytest.approx(problem.threshold(rewards.numpy()), abs=0.05)


# --- Banks of a chain as samples of the base ----------------------------------------------------


def test_samples_of_tilts_are_weighted_back_to_the_base():
    """Moments of N(0, 1) from samples of N(s, 1), whose exponents are ``s x`` up to any constant."""
    rng, shifts, count = np.random.default_rng(0), [0.0, 1.0, 2.0, 3.0], 20_000
    x = np.concatenate([rng.normal(size=count) + s for s in shifts])
    banks = np.repeat(np.arange(4), count)
    exponents = np.stack([s * x + 7.0 * s for s in shifts])
    weights = base_weights(exponents, banks, Groups.single(len(x)))
    assert weights.sum() == pytest.approx(1)
    assert weights @ x == pytest.approx(0, abs=0.02)
    assert weights @ x**2 == pytest.approx(1, abs=0.03)
    # The tail that no bank of the base has reached: P(x > 4.5) = 3.4e-6.
    assert weights @ (x > 4.5) == pytest.approx(norm.sf(4.5), rel=0.1)
    assert not (x[banks == 0] > 4.5).any()


def test_a_long_chain_whose_banks_hardly_overlap_is_weighted_to_the_end():
    """Fifteen tilts of a standard normal, 3.5 deviations apart: weights solve their equation, moments hold.

    Repeating the equation a thousand times is off by 0.07 in the second moment here.
    """
    random, banks = np.random.default_rng(0), np.repeat(np.arange(15), 4000)
    x = random.normal(3.5 * banks, 1)
    h = 3.5 * np.arange(15)[:, None] * x
    weights = base_weights(h, banks, Groups.single(len(x)))
    with np.errstate(divide="ignore"):
        log_z = np.logaddexp.reduce(np.log(weights) + h, axis=1)
    again = -np.logaddexp.reduce(h - log_z[:, None], axis=0)
    again -= np.logaddexp.reduce(again)
    heavy = weights > 1e-12
    np.testing.assert_allclose(np.log(weights[heavy]), again[heavy], atol=1e-6)
    assert weights @ x == pytest.approx(0, abs=0.03)
    assert weights @ x**2 == pytest.approx(1, abs=0.04)


def test_one_bank_is_weighted_by_minus_its_exponents_and_contexts_keep_their_shares():
    rng = np.random.default_rng(1)
    labels, x = np.repeat([0, 1], [300, 100]), rng.normal(size=400)
    groups = Groups.of(labels, np.arange(400))
    weights = base_weights((x * (1 + labels))[None], np.zeros(400, dtype=int), groups)
    expected = np.exp(-x * (1 + labels))
    for context, share in ((0, 0.75), (1, 0.25)):
        own = labels == context
        np.testing.assert_allclose(weights[own], share * expected[own] / expected[own].sum(), rtol=1e-6)
    # Shifts of a context's exponents are its normaliser.
    shifted = base_weights((x * (1 + labels) + 3.0 * labels)[None], np.zeros(400, dtype=int), groups)
    np.testing.assert_allclose(shifted, weights, rtol=1e-6)


# --- Reports and bad input ---------------------------------------------------------------------

QUICK = {"bank": 200, "steps": 3, "updates": 2, "batch": 8}


def quick(share=0.5, **changes):
    return annealed(share, **(QUICK | changes))


def test_rows_count_all_passes_and_banks_and_repeat_themselves():
    flow, seen = MixtureFlow(PATH, GAUSSIAN, trainable=True), []
    reward = Quadratic([1.0, 0.5])
    runs = [solve(flow, Values(reward), 0.5, quick(), generator(3), call) for call in (seen.append, None)]
    assert seen == runs[0].history
    timeless = [[{**row, "seconds": 0} for row in run.history] for run in runs]
    assert timeless[0] == timeless[1]
    stages = len(runs[0].stages)
    assert stages > 2
    assert [row["stage"] for row in seen] == [k for k in range(1, stages + 1) for _ in range(2)]
    assert (np.diff([row["network_passes"] for row in seen]) > 0).all()
    assert (np.diff([row["seconds"] for row in seen]) > 0).all()
    bank = 200 * 3 * 4
    assert seen[0]["network_passes"] >= bank
    assert runs[0].diagnostics["network_passes"] == seen[-1]["network_passes"] + bank
    assert not runs[0].model.means.requires_grad
    assert torch.equal(flow.means.detach(), GAUSSIAN.means)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
@pytest.mark.parametrize("kind", ["tilt", "tail"])
def test_a_stopped_chain_goes_on_exactly_where_it_was(kind, seconds, tmp_path):
    """Within stages and at their ends; a tail's thresholds come from banks of stages before the stop."""
    flow, stops = MixtureFlow(PATH, TWO, trainable=True), [(1, 1), (2, 0), (3, 1)]

    def run(progress=None, slot=None):
        if kind == "tilt":
            return solve(flow, Values(Height()), 0.3, quick(), generator(3), progress, slot)
        problem = TailProblem("upper", mass=0.3, alpha=0.5)
        return solve_tail(flow, Height(), problem, quick(stages=5), generator(3), progress, slot)

    def progress(row):
        if stops and (row["stage"], row["update"]) == stops[0]:
            stops.pop(0)
            raise Stopped

    whole, slot = run(), Resumption(tmp_path, "a chain", seconds).slot("solve")
    assert len(whole.stages) > 2
    for _ in range(3):
        with pytest.raises(Stopped):
            run(progress, slot)
    resumed = run(progress, slot)
    assert torch.equal(whole.model.means, resumed.model.means)
    assert resumed.stages == whole.stages
    assert [{**row, "seconds": 0} for row in resumed.history] == [
        {**row, "seconds": 0} for row in whole.history
    ]


def test_a_chain_that_runs_out_of_stages_says_how_far_it_came(caplog):
    flow = MixtureFlow(PATH, GAUSSIAN, trainable=True)
    with caplog.at_level(logging.WARNING):
        solution = solve(flow, Values(Quadratic([1.0, 0.5])), 0.2, quick(stages=2), generator(0))
    assert len(solution.stages) == 2
    strength = solution.diagnostics["strength"]
    assert 0 < strength < 0.9
    assert f"after 2 stages the tilt has come {strength:.3g} of the way" in caplog.text


def test_a_tilt_that_no_stage_can_keep_is_refused_before_any_training():
    flow = MixtureFlow(PATH, GAUSSIAN, trainable=True)
    with pytest.raises(
        UnusableBank, match=r"keeps an effective share of 0.5, and 0 effective .* no number of stages"
    ):
        solve(flow, Values(Quadratic([1.0, 0.5])), 1e-6, quick(), generator(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, r"share must be a number in \(0, 1\)"),
        ({"stages": 0}, "stages must be a whole number of at least 1"),
        ({"settled": -1.0}, "settled must be finite and not negative"),
        ({"penalty": "pearson"}, "penalty must be kl for annealed fitting, got 'pearson'"),
        ({"bank": 100, "minimum_ess": 50.0}, "keeps 30 effective samples, below the minimum_ess of 50"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        annealed(**changes)


def test_contexts_with_one_sample_are_pooled_and_counted():
    class Many(LabelledModes):
        def draw_context(self, count, generator):
            context = torch.zeros(count, dtype=torch.long)
            context[-1] = 2
            return context

    flow = Many(list(mode_flow().flows))
    solution = weighted_fitting.solve(
        flow, Values(Quadratic([1.0, 0.5])), 1.0, fitting(**QUICK), generator(0)
    )
    assert (solution.diagnostics["contexts"], solution.diagnostics["groups"]) == (2, 1)
    assert solution.diagnostics["pooled"] == 200


# --- Budgets: a frontier of divergences -----------------------------------------------------------


def within(kl, stage_kl=None, share=0.3, stages=20, **changes):
    return AnnealedFittingSettings(fitting(**changes), share, stages, kl=kl, stage_kl=stage_kl)


UNIT, PLANE = Mixture.gaussian([0.0], [[1.0]]), Mixture.gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])


def test_a_budget_moves_a_gaussian_by_the_root_of_twice_its_nats():
    """Under a linear reward of slope 1 a stage's model is N(sqrt(2 KL), 1), and the KL weight one over it."""
    choice = within(1.2, 0.4, bank=40_000, updates=150, batch=1024, learning_rate=0.03)
    reward, found = Quadratic([1.0, 0.0]), []

    def measure(x, context, values):
        found.append(float(x[:, 0].mean()))
        return {"mean": float(values.mean()), "best": float(np.sort(values)[-400:].mean())}

    solution = solve(GaussianFlow(PATH, PLANE), Values(reward), 77.0, choice, generator(0), measure=measure)
    assert [row["kl"] for row in solution.stages] == pytest.approx([0.4, 0.8, 1.2], abs=1e-6)
    for row, nats in zip(solution.stages, (0.4, 0.8, 1.2), strict=True):
        mean = math.sqrt(2 * nats)
        assert row["step"] == 1
        assert row["kl_weight"] == row["parameter"] == pytest.approx(1 / mean, rel=0.02)
        assert row["mean_promised"] == pytest.approx(mean, abs=0.03)
    assert float(solution.model.mean.detach()[0]) == pytest.approx(math.sqrt(2.4), abs=0.03)
    # A row for the base and each stage, on banks that are there anyway.
    assert [row["stage"] for row in solution.frontier] == [0, 1, 2, 3]
    assert [row["kl"] for row in solution.frontier] == pytest.approx([0, 0.4, 0.8, 1.2], abs=1e-6)
    assert [row["mean"] for row in solution.frontier] == pytest.approx(found, abs=1e-12)
    assert found == pytest.approx([0, *(math.sqrt(2 * n) for n in (0.4, 0.8, 1.2))], abs=0.03)
    tail = norm.pdf(norm.isf(0.01)) / 0.01
    assert solution.frontier[0]["best"] == pytest.approx(tail, abs=0.1)
    assert found[-1] == pytest.approx(solution.stages[-1]["mean_reached"], abs=1e-12)


def test_a_budget_of_a_mixture_is_its_divergence():
    """The KL weight is the one at which the exact tilt, by quadrature, has as many nats."""
    values = np.linspace(-9, 9, 20_001)
    base = 0.7 * norm.pdf(values, -1, 0.6) + 0.3 * norm.pdf(values, 2, 0.5)
    weight = brentq(lambda w: nats_of(base, values / w) - 0.5, 0.1, 50)
    own = Mixture.of([0.7, 0.3], [[-1.0], [2.0]], [[[0.36]], [[0.25]]])
    flow = MixtureFlow(PATH, own, trainable=True)
    choice = within(0.5, 0.25, bank=40_000, updates=150, learning_rate=0.05)
    solution = solve(flow, Values(Quadratic([1.0])), 1.0, choice, generator(0))
    assert [row["kl"] for row in solution.stages] == pytest.approx([0.25, 0.5], abs=1e-6)
    assert solution.stages[-1]["kl_weight"] == pytest.approx(weight, rel=0.03)
    exact = own.tilted(Quadratic([1.0]), weight)
    torch.testing.assert_close(
        torch.softmax(solution.model.logits.detach(), 0), exact.weights, rtol=0, atol=0.02
    )


def nats_of(base, exponents):
    """``KL(tilt || base)`` of densities on a grid."""
    p = base / base.sum()
    q = p * np.exp(exponents - exponents.max())
    q /= q.sum()
    held = q > 0
    return float(q[held] @ np.log(q[held] / p[held]))


def test_a_budget_is_paid_within_contexts():
    """Three modes, each a Gaussian of variance 1 along the reward: each is moved by the root of its nats, and
    none becomes more likely."""
    choice = within(0.6, 0.3, bank=40_000, updates=150, batch=1024, learning_rate=0.03)
    solution = solve(mode_flow(), Values(Quadratic([1.0, 0.0])), 1.0, choice, generator(0))
    assert [row["kl"] for row in solution.stages] == pytest.approx([0.3, 0.6], abs=1e-6)
    assert solution.stages[-1]["kl_weight"] == pytest.approx(1 / math.sqrt(1.2), rel=0.02)
    assert solution.stages[-1]["mean_promised"] == pytest.approx(0.5 / 3 + math.sqrt(1.2), abs=0.03)


def optimum_on_grid(tail, mass, nats):
    """KL weight and threshold at which the tail optimum of a unit Gaussian has so many nats."""
    values = np.linspace(-8, 8, 16_001)
    p = norm.pdf(values)
    p /= p.sum()

    def at(weight):
        return TailProblem(tail, mass, weight).threshold(values, p)

    def hinge(weight):
        cut = at(weight) - values if tail == "lower" else values - at(weight)
        return (-1 if tail == "lower" else 1) * np.maximum(cut, 0) / (mass * weight)

    weight = brentq(lambda w: nats_of(p, hinge(w)) - nats, 0.05, 100, xtol=1e-6)
    return weight, at(weight)


@pytest.mark.parametrize(
    ("tail", "mass", "kl"), [("upper", 0.3, 0.2), ("lower", 0.2, 0.2), ("lower", 0.5, 0.6)]
)
def test_every_stage_of_a_budget_is_the_optimum_of_its_own_tail_problem(tail, mass, kl):
    choice = within(kl, kl / 2, share=0.2, bank=40_000, updates=150, batch=1024, learning_rate=0.03)
    problem = TailProblem(tail, mass, 123.0)  # whose weight does not count
    flow = MixtureFlow(PATH, UNIT, trainable=True)
    solution = solve_tail(flow, Quadratic([1.0]), problem, choice, generator(0))
    assert [row["kl"] for row in solution.stages] == pytest.approx([kl / 2, kl], abs=1e-3)
    row = solution.stages[0]
    weight, threshold = optimum_on_grid(tail, mass, kl / 2)
    assert row["kl_weight"] == pytest.approx(weight, rel=0.05)
    assert row["parameter"] == pytest.approx(threshold, abs=0.03)


def test_what_a_bank_does_not_carry_takes_more_stages_each_an_optimum(caplog):
    """A tenth of the mass rests on few of 2,000 samples: all optima pay less than the stage that is asked."""
    choice = within(0.3, bank=2_000, stages=4, updates=60, batch=256, learning_rate=0.03, minimum_ess=50)
    flow = MixtureFlow(PATH, UNIT, trainable=True)
    problem = TailProblem("upper", 0.1, 1.0)
    with caplog.at_level(logging.WARNING):
        solution = solve_tail(flow, Quadratic([1.0]), problem, choice, generator(0))
    paid = [row["kl"] for row in solution.stages]
    assert len(paid) > 1
    assert paid == sorted(paid)
    assert paid[0] < 0.2
    assert all(row["step"] == 1 for row in solution.stages)
    row = solution.stages[0]
    weight, threshold = optimum_on_grid("upper", 0.1, row["kl"])
    assert row["kl_weight"] == pytest.approx(weight, rel=0.2)
    assert row["parameter"] == pytest.approx(threshold, abs=0.15)


def test_a_chain_with_a_budget_says_where_it_ends_before_it_is_spent(caplog):
    choice = within(3.0, 1.0, bank=500, stages=1, updates=5, batch=64)
    with caplog.at_level(logging.WARNING):
        solution = solve(GaussianFlow(PATH, PLANE), Values(Quadratic([1.0, 0.0])), 1.0, choice, generator(0))
    assert len(solution.stages) == 1
    assert "of the 3 divergences that the chain aims at" in caplog.text


@pytest.mark.parametrize(
    ("kl", "stage_kl"), [(0.0, None), (-1.0, None), (math.inf, None), (None, 0.4), (0.4, 0.5), (0.4, 0.0)]
)
def test_a_budget_is_positive_and_a_stage_is_within_it(kl, stage_kl):
    with pytest.raises(ValueError, match="kl"):
        within(kl, stage_kl)


def test_a_chain_with_a_budget_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    choice = within(0.8, 0.4, bank=2_000, updates=20, batch=128)
    problem = (GaussianFlow(PATH, PLANE), Values(Quadratic([1.0, 0.0])), 1.0, choice)

    def measure(x, context, values):
        return {"mean": float(values.mean())}

    whole = solve(*problem, generator(0), measure=measure)
    resumption = Resumption(tmp_path, "state", 0.0)
    stopped = 0

    class Stop(Exception):
        pass

    def stop(row):
        nonlocal stopped
        stopped += 1
        if stopped == 30:  # in the second stage
            raise Stop

    with pytest.raises(Stop):
        solve(*problem, generator(0), stop, resumption.slot("solve"), measure=measure)
    again = solve(*problem, generator(0), slot=resumption.slot("solve"), measure=measure)
    assert again.frontier == whole.frontier
    torch.testing.assert_close(again.model.mean, whole.model.mean, rtol=0, atol=0)
