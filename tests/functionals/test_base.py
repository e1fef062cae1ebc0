import numpy as np
import pytest
import torch

from closed_forms import Quadratic, tensor
from flowtilt.functionals.base import (
    Distribution,
    FiniteDistribution,
    Functional,
    Objective,
    WeightedSum,
    per_sample,
)
from flowtilt.functionals.divergences import KL, Renyi
from flowtilt.functionals.utilities import SQ, CVaR, Entropy, ExpectedReward, LogBarrier

FIRST, SECOND = Quadratic([1.0, 0.0]), Quadratic([0.0, 1.0])
SAMPLES = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DISTRIBUTION = Distribution(None, SAMPLES)


def finite_distribution():
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(50)), random.dirichlet(np.ones(50))
    return FiniteDistribution(SAMPLES, np.log(p), np.log(q))


class Unusable(Functional):
    """A functional that must not be evaluated."""

    def value(self, distribution):
        raise AssertionError("evaluated")

    linearise = finite_value = finite_variation = value


def test_a_weighted_sum_is_the_sum_of_its_parts():
    parts = ((2.0, CVaR(FIRST, 0.3)), (-0.5, ExpectedReward(SECOND)), (0.7, SQ(SECOND, 0.4)))
    whole, distribution = WeightedSum(parts), finite_distribution()
    for method, at in (
        ("value", DISTRIBUTION),
        ("finite_value", distribution),
        ("finite_variation", distribution),
    ):
        expected = sum(weight * getattr(part, method)(at) for weight, part in parts)
        np.testing.assert_allclose(getattr(whole, method)(at), expected, rtol=1e-13)
    variations = [(weight, part.linearise(DISTRIBUTION)) for weight, part in parts]
    found = whole.linearise(DISTRIBUTION)
    for method in ("value", "gradient"):
        expected = sum(weight * getattr(part, method)(SAMPLES) for weight, part in variations)
        torch.testing.assert_close(getattr(found, method)(SAMPLES), expected)
    assert torch.equal(found.active(SAMPLES), variations[0][1].active(SAMPLES))
    assert found.sparse
    assert not WeightedSum(parts[1:]).linearise(DISTRIBUTION).sparse


def test_sums_nest():
    inner = WeightedSum(((1.0, CVaR(FIRST, 0.3)), (2.0, ExpectedReward(SECOND))))
    outer = Objective(inner, ExpectedReward(FIRST), 0.25)
    flat = WeightedSum(
        ((1.0, CVaR(FIRST, 0.3)), (2.0, ExpectedReward(SECOND)), (-0.25, ExpectedReward(FIRST)))
    )
    assert outer.value(DISTRIBUTION) == pytest.approx(flat.value(DISTRIBUTION), rel=1e-14)
    torch.testing.assert_close(
        outer.linearise(DISTRIBUTION).gradient(SAMPLES), flat.linearise(DISTRIBUTION).gradient(SAMPLES)
    )
    assert outer.components == flat.components
    assert outer.rewards == (FIRST, SECOND, FIRST)
    assert outer.linearise(DISTRIBUTION).sparse


def test_a_sum_has_the_hardest_tier_and_the_dearest_need_of_its_parts():
    reward = ExpectedReward(FIRST)
    assert (WeightedSum(((1.0, reward),)).tier, WeightedSum(((1.0, reward),)).needs) == ("linear", "nothing")
    both = WeightedSum(((1.0, reward), (0.1, Entropy())))
    assert (both.tier, both.needs) == ("convex", "score")
    regularised = Objective(both, Renyi(None, 2.0), 0.5)
    assert (regularised.tier, regularised.needs) == ("general", "density")
    assert Objective(reward, KL(None), 0.5).tier == "linear"
    assert Objective(reward, Renyi(None, 2.0), 0.0).needs == "nothing"


@pytest.mark.parametrize(
    "build",
    [lambda a, b: Objective(a, b, 0.0), lambda a, b: WeightedSum(((1, a), (0, b)))],
    ids=["objective", "sum"],
)
def test_terms_of_weight_zero_are_not_evaluated(build):
    reward = ExpectedReward(FIRST)
    functional, distribution = build(reward, Unusable()), finite_distribution()
    assert functional.value(DISTRIBUTION) == reward.value(DISTRIBUTION)
    assert functional.finite_value(distribution) == reward.finite_value(distribution)
    np.testing.assert_array_equal(
        functional.finite_variation(distribution), reward.finite_variation(distribution)
    )
    assert torch.equal(functional.linearise(DISTRIBUTION).gradient(SAMPLES), FIRST.gradient(SAMPLES))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_must_be_finite(weight):
    with pytest.raises(ValueError, match=f"weight of ExpectedReward must be finite, got {weight}"):
        WeightedSum(((weight, ExpectedReward(FIRST)),))


def test_rewards_of_a_functional_are_its_attributes():
    assert LogBarrier(FIRST, SECOND, 1.0).rewards == (FIRST, SECOND)
    assert Entropy().rewards == ()


def test_finite_distributions_keep_their_points():
    distribution = finite_distribution().with_p(np.eye(50)[3])
    assert distribution.log_p[3] == 0
    assert np.isneginf(np.delete(distribution.log_p, 3)).all()
    np.testing.assert_array_equal(distribution.reference, finite_distribution().reference)
    assert ExpectedReward(FIRST).finite_value(distribution) == float(SAMPLES[3, 0])


def test_factors_follow_their_samples():
    x = torch.ones(3, 2, 4)
    scaled = per_sample(tensor([1.0, 2.0, 3.0]), x) * x
    assert scaled.dtype == x.dtype
    assert scaled[:, 1, 3].tolist() == [1, 2, 3]
