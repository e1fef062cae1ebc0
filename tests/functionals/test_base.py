import numpy as np
import pytest
import torch

from closed_forms import Quadratic, tensor
from flowtilt.functionals.base import FiniteLaw, Functional, Law, Objective, WeightedSum, per_sample
from flowtilt.functionals.divergences import KL, Renyi
from flowtilt.functionals.utilities import SQ, CVaR, Entropy, ExpectedReward, LogBarrier

FIRST, SECOND = Quadratic([1.0, 0.0]), Quadratic([0.0, 1.0])
SAMPLES = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAW = Law(None, SAMPLES)


def finite_law():
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(50)), random.dirichlet(np.ones(50))
    return FiniteLaw(SAMPLES, np.log(p), np.log(q))


class Unusable(Functional):
    """A functional that must not be evaluated."""

    def value(self, law):
        raise AssertionError("evaluated")

    linearise = finite_value = finite_variation = value


def test_a_weighted_sum_is_the_sum_of_its_parts():
    parts = ((2.0, CVaR(FIRST, 0.3)), (-0.5, ExpectedReward(SECOND)), (0.7, SQ(SECOND, 0.6)))
    whole, law = WeightedSum(parts), finite_law()
    for method, at in (("value", LAW), ("finite_value", law), ("finite_variation", law)):
        expected = sum(weight * getattr(part, method)(at) for weight, part in parts)
        np.testing.assert_allclose(getattr(whole, method)(at), expected, rtol=1e-13)
    variations = [(weight, part.linearise(LAW)) for weight, part in parts]
    found = whole.linearise(LAW)
    for method in ("value", "gradient"):
        expected = sum(weight * getattr(part, method)(SAMPLES) for weight, part in variations)
        torch.testing.assert_close(getattr(found, method)(SAMPLES), expected)
    assert torch.equal(found.active(SAMPLES), variations[0][1].active(SAMPLES))
    assert found.sparse
    assert not WeightedSum(parts[1:]).linearise(LAW).sparse


def test_sums_nest():
    inner = WeightedSum(((1.0, CVaR(FIRST, 0.3)), (2.0, ExpectedReward(SECOND))))
    outer = Objective(inner, ExpectedReward(FIRST), 0.25)
    flat = WeightedSum(
        ((1.0, CVaR(FIRST, 0.3)), (2.0, ExpectedReward(SECOND)), (-0.25, ExpectedReward(FIRST)))
    )
    assert outer.value(LAW) == pytest.approx(flat.value(LAW), rel=1e-14)
    torch.testing.assert_close(outer.linearise(LAW).gradient(SAMPLES), flat.linearise(LAW).gradient(SAMPLES))
    assert outer.components == flat.components
    assert outer.rewards == (FIRST, SECOND, FIRST)
    assert outer.linearise(LAW).sparse


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
    functional, law = build(reward, Unusable()), finite_law()
    assert functional.value(LAW) == reward.value(LAW)
    assert functional.finite_value(law) == reward.finite_value(law)
    np.testing.assert_array_equal(functional.finite_variation(law), reward.finite_variation(law))
    assert torch.equal(functional.linearise(LAW).gradient(SAMPLES), FIRST.gradient(SAMPLES))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_must_be_finite(weight):
    with pytest.raises(ValueError, match=f"weight of ExpectedReward must be finite, got {weight}"):
        WeightedSum(((weight, ExpectedReward(FIRST)),))


def test_rewards_of_a_functional_are_its_attributes():
    assert LogBarrier(FIRST, SECOND, 1.0).rewards == (FIRST, SECOND)
    assert Entropy().rewards == ()


def test_finite_laws_keep_their_points():
    law = finite_law().with_p(np.eye(50)[3])
    assert law.log_p[3] == 0
    assert np.isneginf(np.delete(law.log_p, 3)).all()
    np.testing.assert_array_equal(law.reference, finite_law().reference)
    assert ExpectedReward(FIRST).finite_value(law) == float(SAMPLES[3, 0])


def test_factors_follow_their_samples():
    x = torch.ones(3, 2, 4)
    scaled = per_sample(tensor([1.0, 2.0, 3.0]), x) * x
    assert scaled.dtype == x.dtype
    assert scaled[:, 1, 3].tolist() == [1, 2, 3]
