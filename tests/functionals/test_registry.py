"""One set of numerical checks for every registered functional; a new one gets them by being registered."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch

from closed_forms import Mixture, MixtureFlow, Quadratic, generator, tensor
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.functionals.base import Distribution, FirstVariation, Functional, Objective, WeightedSum
from flowtilt.functionals.checks import (
    CheckError,
    check_entry,
    check_first_variation,
    check_gradient,
    check_tangents,
    check_tensors,
)
from flowtilt.functionals.critic import CriticSettings
from flowtilt.functionals.curvature import (
    Chords,
    curvature,
    example_problem,
    random_distributions,
    tier_table,
)
from flowtilt.functionals.design import PolynomialFeatures, RandomFourierFeatures
from flowtilt.functionals.divergences import KL, ReferenceDraw, Renyi, Wasserstein1
from flowtilt.functionals.registry import (
    DIVERGENCES,
    UTILITIES,
    Entry,
    Ingredients,
    UnmetNeed,
    check_needs,
    number,
)
from flowtilt.functionals.utilities import CVaR, DiverseModes, Entropy, ExpectedReward
from flowtilt.interpolants import Linear
from flowtilt.sampling import OdeSettings
from mode_flow import ModeFlow, Modes

REGISTRIES = (UTILITIES, DIVERGENCES)
DISTRIBUTION, FINITE = example_problem()
MODES = [
    Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]]),
    Mixture.gaussian([-0.8, 0.4], [[0.5, -0.1], [-0.1, 0.9]]),
]
PRETRAINED = Mixture.gaussian([-0.2, 0.1], [[0.7, -0.1], [-0.1, 1.2]])
# Scores are taken where the likelihood's ODE begins: both then speak of the same distribution.
MODEL = Ingredients(
    reward=Quadratic([1.0, 0.5], [[0.3, 0.1], [0.1, 0.2]]),
    reference=MixtureFlow(Linear(), PRETRAINED),
    cost=Quadratic([0.1, 0.2]),
    score_time=1 - 1e-5,
    ode=OdeSettings(steps=20, margin=1e-5),
    draw=ReferenceDraw(samples=300, steps=20),
)


def examples():
    """Every example of every entry, as (registry, name, parameters)."""
    return [
        pytest.param(registry, name, example, id=f"{name}-{k}")
        for registry in REGISTRIES
        for name, entry in registry.items()
        for k, example in enumerate(entry.examples)
    ]


every_example = pytest.mark.parametrize(("registry", "name", "example"), examples())


def model_distribution(count: int = 40, seed: int = 0) -> Distribution:
    model = ModeFlow(Linear(), MODES)
    context = torch.arange(count) % 2
    samples = torch.stack(
        [distribution.sample(count, generator(2 * seed + k)) for k, distribution in enumerate(MODES)]
    )
    return Distribution(model, samples[context, torch.arange(count)], context)


def check_at_models(functional: Functional) -> None:
    """:func:`check_gradient` between distributions of correlated modes."""
    check_gradient(functional, model_distribution(), model_distribution(seed=1))


@every_example
def test_first_variation_against_finite_differences(registry, name, example):
    check_first_variation(registry.build(name, example, FINITE), DISTRIBUTION)


@every_example
def test_linearisations_bound_what_is_concave_or_convex(registry, name, example):
    check_tangents(registry.build(name, example, FINITE), DISTRIBUTION)


@every_example
def test_gradients_are_those_of_the_values(registry, name, example):
    check_at_models(registry.build(name, example, MODEL))


@every_example
def test_linearisations_leave_the_samples_alone(registry, name, example):
    check_tensors(registry.build(name, example, MODEL), model_distribution(6))


@every_example
def test_gradients_have_the_precision_of_the_samples(registry, name, example):
    """Networks run in single precision, and a solver feeds gradients back into them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, reference = (PlanarFlow(Linear(), (8,), "silu", "velocity") for _ in range(2))
    distribution = model_distribution(8)
    if name == "diverse_modes":  # the one that asks for a model of modes
        network = Modes([network, reference])
    samples = distribution.samples.float()
    ingredients = replace(MODEL, reference=reference, score_time=0.975, draw=ReferenceDraw(30, 5))
    functional = registry.build(name, example, ingredients)
    check_tensors(functional, Distribution(network, samples, distribution.context))


EXPECTED = {
    "expected_reward": ["linear"],
    "cvar": ["convex"],
    "sq": ["concave"],
    "mean_variance": ["convex"],
    "entropy": ["concave"],
    "optimal_design": ["concave"] * 3,
    "diverse_modes": ["convex"],
    "log_barrier": ["concave"],
    "kl": ["convex"],
    "renyi": ["convex", "neither"],
    "mmd": ["convex"] * 3,
    "wasserstein1": ["convex"],
}
PAPER = {
    "linear": {"expected_reward", "kl"},
    "convex": {"cvar", "entropy", "optimal_design", "log_barrier", "mmd"},
    "general": {"sq", "mean_variance", "diverse_modes", "renyi", "wasserstein1"},
}


@pytest.mark.slow
def test_the_table_of_tiers():
    """Curvatures as theory has them: the two tails stand the other way round than in the paper."""
    rows = tier_table()
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row.curvature)
    assert found == EXPECTED
    assert {tier: {r.name for r in rows if r.paper == tier} for tier in PAPER} == PAPER
    measured = {(r.name, r.measured) for r in rows if r.name in ("cvar", "sq", "kl", "entropy")}
    assert measured == {("cvar", "general"), ("sq", "convex"), ("kl", "convex"), ("entropy", "convex")}


def test_renyi_of_order_two_is_the_log_of_a_convex_functional():
    """Neither concave nor convex itself; its exponential is the convex ``sum p^2 / reference``."""
    functional = Renyi(FINITE.reference, 2.0)

    class Exponential(Renyi):
        def finite_value(self, distribution):
            return float(np.exp(super().finite_value(distribution)))

    assert curvature(functional, DISTRIBUTION) == "neither"
    assert curvature(Exponential(FINITE.reference, 2.0), DISTRIBUTION) == "convex"


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"),
    [
        (-1e-13, 1e-13, "linear"),
        (-1e-13, 1.0, "concave"),
        (-1.0, 1e-13, "convex"),
        (-1.0, 1.0, "neither"),
    ],
)
def test_chords_are_classified_up_to_rounding(lowest, highest, expected):
    assert Chords(lowest, highest, 1e-12).curvature == expected


def test_random_distributions_keep_the_modes():
    for distribution in random_distributions(DISTRIBUTION, 10, seed=0):
        np.testing.assert_allclose(
            np.bincount(DISTRIBUTION.modes, distribution.p),
            np.bincount(DISTRIBUTION.modes, DISTRIBUTION.p),
            rtol=1e-12,
        )


@dataclass(frozen=True)
class _Along(FirstVariation):
    direction: torch.Tensor

    def value(self, x, context=None):
        return x @ self.direction

    def gradient(self, x, context=None):
        return self.direction.expand_as(x)


@dataclass(frozen=True)
class MeanNorm(Functional):
    """``strength |E x|^2``."""

    strength: float = 1.0
    error: float = field(default=1.0)

    def value(self, distribution):
        return self.strength * float(distribution.samples.mean(0).square().sum())

    def linearise(self, distribution):
        return _Along(2 * self.strength * distribution.samples.mean(0))

    def finite_value(self, distribution):
        return self.strength * float(np.square(distribution.p @ distribution.points.numpy()).sum())

    def finite_variation(self, distribution):
        return (
            2
            * self.error
            * self.strength
            * distribution.points.numpy()
            @ (distribution.p @ distribution.points.numpy())
        )


TOY = Entry(MeanNorm, parameters={"strength": number()}, examples=({"strength": 3.0},))


def test_a_functional_is_checked_by_being_registered(monkeypatch):
    monkeypatch.setitem(UTILITIES, "mean_norm", TOY)
    (added,) = [p.values for p in examples() if p.values[1] == "mean_norm"]
    registry, name, example = added
    check_first_variation(registry.build(name, example, FINITE), DISTRIBUTION)
    assert [checked.curvature for checked in check_entry(UTILITIES["mean_norm"])] == ["convex"]
    (row,) = [row for row in tier_table() if row.name == "mean_norm"]
    assert (row.paper, row.curvature, row.measured) == ("general", "convex", "general")


def test_a_wrong_first_variation_fails_the_checks():
    with pytest.raises(CheckError, match="MeanNorm: first variation against finite differences: off by"):
        check_first_variation(MeanNorm(3.0, error=1.001), DISTRIBUTION)
    with pytest.raises(CheckError, match="MeanNorm, convex: below its linearisation: off by"):
        check_tangents(MeanNorm(3.0, error=-1.0), DISTRIBUTION)
    with pytest.raises(CheckError, match="first variation"):
        check_entry(Entry(partial(MeanNorm, error=1.001)))


class _WrongSlope(MeanNorm):
    def linearise(self, distribution):
        exact = super().linearise(distribution)

        class Wrong(_Along):
            def gradient(self, x, context=None):
                return -exact.gradient(x, context)

        return Wrong(exact.direction)


def test_a_wrong_gradient_fails_the_checks():
    with pytest.raises(CheckError, match="gradient against the value's differences: off by 2"):
        check_at_models(_WrongSlope())
    with pytest.raises(CheckError, match="_WrongSlope: gradient"):
        check_entry(Entry(_WrongSlope))


class _Doubled(MeanNorm):
    def linearise(self, distribution):
        class Double(_Along):
            def gradient(self, x, context=None):
                return super().gradient(x, context).double()

        return Double(super().linearise(distribution).direction)


def test_a_gradient_of_another_precision_fails_the_checks():
    with pytest.raises(CheckError, match=r"the gradient is torch.float64, the samples torch.float32"):
        check_entry(Entry(_Doubled))


@pytest.mark.parametrize(
    "entry", [*UTILITIES.values(), *DIVERGENCES.values()], ids=[*UTILITIES, *DIVERGENCES]
)
@pytest.mark.slow_after(2)
def test_entries_are_checked_by_one_call(entry):
    found = check_entry(entry)
    assert [each.parameters for each in found] == [dict(example) for example in entry.examples]
    assert max(each.first_variation for each in found) < 1e-5


def test_entries_are_built_from_plain_data():
    built = UTILITIES.build("cvar", {"mass": 0.25}, FINITE)
    assert built == CVaR(FINITE.reward, 0.25)
    draw = {"kind": "random_fourier", "count": 8, "bandwidth": 2}
    design = UTILITIES.build("optimal_design", {"criterion": "trace", "features": draw, "ridge": 0.5}, FINITE)
    assert (design.criterion, design.ridge) == ("trace", 0.5)
    assert design.features == RandomFourierFeatures(count=8, bandwidth=2.0)
    plain = UTILITIES.build("optimal_design", {"criterion": "log_det"}, FINITE)
    assert plain.features == PolynomialFeatures(2)
    critic = {"updates": 7, "penalty": 2}
    metric = DIVERGENCES.build("wasserstein1", {"weights": [1, 4], "critic": critic}, MODEL)
    assert metric == Wasserstein1(
        MODEL.reference, (1.0, 4.0), CriticSettings(updates=7, penalty=2.0), MODEL.draw
    )
    assert DIVERGENCES.build("kl", {}, MODEL) == KL(MODEL.reference, MODEL.score_time, MODEL.ode)


BAD = [
    (UTILITIES, "cvr", {}, ["utility 'cvr'", "known: expected_reward, cvar, sq"]),
    (UTILITIES, "cvar", {}, ["utility cvar", "key mass: missing", "known keys: mass"]),
    (UTILITIES, "cvar", {"mass": 0.1, "b": 1}, ["key b: unknown", "known keys: mass"]),
    (UTILITIES, "expected_reward", {"mass": 0.1}, ["key mass: unknown", "known keys: none"]),
    (UTILITIES, "cvar", {"mass": "low"}, ["key mass", "finite number", "'low'", "known keys: mass"]),
    (UTILITIES, "cvar", {"mass": True}, ["key mass", "True"]),
    (UTILITIES, "cvar", {"mass": 1.5}, ["utility cvar", "mass of a tail", "1.5", "known keys: mass"]),
    (UTILITIES, "mean_variance", {"risk": float("nan")}, ["key risk", "nan"]),
    (UTILITIES, "diverse_modes", {"modes": 2.5}, ["key modes", "whole number", "2.5"]),
    (UTILITIES, "diverse_modes", {"modes": 1}, ["at least 2", "1"]),
    (UTILITIES, "log_barrier", {"bound": 1.0, "strength": -1}, ["strength", "-1"]),
    (UTILITIES, "optimal_design", {"criterion": "d"}, ["criterion", "'d'", "log_det, trace, eigenvalue"]),
    (UTILITIES, "optimal_design", {"criterion": "trace", "ridge": -1}, ["ridge", "-1"]),
    (
        UTILITIES,
        "optimal_design",
        {"criterion": "trace", "features": {"kind": "cubic"}},
        ["key features", "polynomial, random_fourier", "cubic"],
    ),
    (
        UTILITIES,
        "optimal_design",
        {"criterion": "trace", "features": {"kind": "polynomial", "degree": 3}},
        ["key features", "degree", "3"],
    ),
    (
        UTILITIES,
        "optimal_design",
        {"criterion": "trace", "features": {"kind": "polynomial", "order": 2}},
        ["key features", "key order: unknown", "known keys: degree"],
    ),
    (DIVERGENCES, "renyi", {"order": 1}, ["order", "1.0", "limit at 1 is the KL"]),
    (DIVERGENCES, "renyi", {"order": -0.5}, ["order", "-0.5"]),
    (DIVERGENCES, "renyi", {"order": 0}, ["order", "0.0"]),
    (DIVERGENCES, "mmd", {"kernel": "cauchy"}, ["'cauchy'", "gaussian, inverse_multiquadric, energy"]),
    (DIVERGENCES, "mmd", {"kernel": "gaussian", "bandwidth": 0}, ["bandwidth", "0"]),
    (DIVERGENCES, "mmd", {"kernel": 3}, ["key kernel", "a name", "3"]),
    (DIVERGENCES, "wasserstein1", {"weights": [1, -1]}, ["weights", "positive", "-1"]),
    (DIVERGENCES, "wasserstein1", {"weights": 2}, ["key weights", "list of finite numbers", "2"]),
    (
        DIVERGENCES,
        "wasserstein1",
        {"weights": [1, 1], "critic": {"updates": 0}},
        ["key critic", "updates", "0"],
    ),
    (DIVERGENCES, "wasserstein1", {"weights": [1, 1], "critic": {"update": 3}}, ["key update: unknown"]),
    (DIVERGENCES, "wasserstein1", {"weights": [1, 1], "critic": 5}, ["key critic", "mapping of updates"]),
]


@pytest.mark.parametrize(("registry", "name", "parameters", "words"), BAD)
def test_bad_parameters_are_named(registry, name, parameters, words):
    with pytest.raises(ValueError) as caught:
        registry.build(name, parameters, MODEL)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("registry", "name", "parameters", "lacks"),
    [
        (UTILITIES, "cvar", {"mass": 0.1}, "reward"),
        (UTILITIES, "log_barrier", {"bound": 1}, "reward"),
        (DIVERGENCES, "kl", {}, "reference"),
    ],
)
def test_missing_ingredients_are_named(registry, name, parameters, lacks):
    with pytest.raises(ValueError, match=f"{registry.kind} {name}: needs a {lacks}"):
        registry.build(name, parameters, Ingredients())


def test_sums_are_built_from_lists():
    items = [{"name": "cvar", "weight": 2, "mass": 0.25}, {"name": "expected_reward"}]
    built = UTILITIES.build_sum(items, FINITE)
    assert built == WeightedSum(((2.0, CVaR(FINITE.reward, 0.25)), (1.0, ExpectedReward(FINITE.reward))))
    check_first_variation(built, DISTRIBUTION)
    with pytest.raises(ValueError, match="key weight: must be a finite number, got 'x'"):
        UTILITIES.build_sum([{"name": "expected_reward", "weight": "x"}], FINITE)
    with pytest.raises(ValueError, match="key name: missing"):
        UTILITIES.build_sum([{"weight": 1}], FINITE)
    with pytest.raises(ValueError, match="at least one part"):
        UTILITIES.build_sum([], FINITE)


class _NoLikelihood(MixtureFlow):
    has_likelihood = False


class _NoGradient(Quadratic):
    differentiable = False


def test_needs_are_checked():
    blind, full = _NoLikelihood(Linear(), PRETRAINED), MODEL.reference
    reward, hard = MODEL.reward, _NoGradient([1.0, 0.5])
    renyi, kl = Renyi(full, 2.0), KL(full)
    for functional in (renyi, DiverseModes(2), Objective(ExpectedReward(reward), renyi, 0.1)):
        check_needs(functional, full, reward)
        with pytest.raises(UnmetNeed, match=r"(Renyi|DiverseModes) needs the likelihood.*_NoLikelihood"):
            check_needs(functional, blind, reward)
    check_needs(Objective(ExpectedReward(reward), renyi, 0.0), blind, reward)
    for functional in (kl, Entropy(), ExpectedReward(reward)):
        check_needs(functional, blind, reward)
    for functional in (kl, Entropy()):
        with pytest.raises(UnmetNeed, match="needs the likelihood"):
            check_needs(functional, blind, takes="value")
    for functional in (CVaR(hard, 0.1), Objective(CVaR(hard, 0.1), kl, 0.1)):
        with pytest.raises(UnmetNeed, match="CVaR needs the gradient of the reward, and _NoGradient"):
            check_needs(functional, full)
        check_needs(functional, full, takes="value")
    with pytest.raises(UnmetNeed, match="solver needs the gradient of the reward"):
        check_needs(Entropy(), full, hard)


def test_the_example_problem_is_one_of_pairs():
    """Every point once in each mode, so that distributions of a sample and its mode are tested as such."""
    assert DISTRIBUTION.modes.tolist() == [0] * 15 + [1] * 15
    assert torch.equal(DISTRIBUTION.points[:15], DISTRIBUTION.points[15:])
    assert DISTRIBUTION.p.sum() == pytest.approx(1)
    assert DISTRIBUTION.reference.sum() == pytest.approx(1)
    x = tensor([[0.3, -0.2], [1.0, 2.0]])
    velocity = FINITE.reference.velocity(x, tensor([0.2, 0.9]))
    exact = MixtureFlow(Linear(), Mixture.gaussian([0.0, 0.0], np.eye(2)))
    torch.testing.assert_close(velocity, exact.velocity(x, tensor([0.2, 0.9])))
