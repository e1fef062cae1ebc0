import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from closed_forms import Quadratic, generator, tensor
from flowtilt.functionals.base import Law, Objective, WeightedVariation
from flowtilt.functionals.utilities import SQ, CVaR, ExpectedReward, Hinge, RewardVariation
from flowtilt.metrics.tails import lower_tail_mean, upper_tail_mean

COORDINATE = Quadratic([1.0])
TAILS = {CVaR: lower_tail_mean, SQ: upper_tail_mean}
tails = pytest.mark.parametrize("functional", TAILS, ids=["cvar", "sq"])


def on_points(rewards):
    """The uniform law on points whose first coordinate is their reward."""
    return Law(None, tensor(rewards)[:, None])


def mass_of(functional, level):
    return level if functional is CVaR else 1 - level


def value(functional, rewards, level, probabilities):
    return TAILS[functional](rewards, mass_of(functional, level), probabilities)


@tails
@pytest.mark.parametrize("level", [0.0137, 0.25, 0.5, 0.87, 0.993])
def test_first_variations_against_finite_differences(functional, level):
    """The tail mean is linear in the probabilities near a law whose quantile lies inside an atom."""
    rng = np.random.default_rng(0)
    n, step = 101, 1e-6
    rewards, p = rng.normal(size=n) * 3, np.full(n, 1 / n)
    hinge = functional(COORDINATE, level).linearise(on_points(rewards))
    assert (hinge.mass, hinge.side) == (
        pytest.approx(mass_of(functional, level)),
        "lower" if functional is CVaR else "upper",
    )
    for _ in range(20):
        direction = rng.normal(size=n)
        direction -= direction.mean()
        values = [value(functional, rewards, level, p + sign * step * direction) for sign in (1, -1)]
        slope = (values[0] - values[1]) / (2 * step)
        # Rounding only: values of about 3, known to 1e-15, over a difference of 2e-6 and the mass.
        assert slope == pytest.approx(direction @ hinge.of_rewards(rewards), abs=1e-8 / hinge.mass)


@st.composite
def two_laws(draw):
    rewards = draw(st.lists(st.integers(-30, 30), min_size=2, max_size=20, unique=True))
    weights = draw(st.lists(st.integers(0, 9), min_size=len(rewards), max_size=len(rewards)).filter(any))
    return np.array(rewards) / 7, np.array(weights) / sum(weights), draw(st.integers(1, 19)) / 20


@given(two_laws())
def test_the_lower_tail_mean_is_convex_and_the_upper_concave(problem):
    """So the linearisation bounds the functional, also where the quantile sits between two atoms."""
    rewards, q, level = problem
    p = np.full(len(rewards), 1 / len(rewards))
    for functional, sign in ((CVaR, 1), (SQ, -1)):
        hinge = functional(COORDINATE, level).linearise(on_points(rewards))
        gain = value(functional, rewards, level, q) - value(functional, rewards, level, p)
        linear = (q - p) @ hinge.of_rewards(rewards)
        assert sign * (gain - linear) >= -1e-11


@tails
@pytest.mark.parametrize("level", [0.01, 0.3, 0.99])
def test_values_are_tail_means_of_the_rewards(functional, level):
    rewards = np.random.default_rng(1).normal(size=333)
    found = functional(COORDINATE, level).value(on_points(rewards))
    assert found == pytest.approx(value(functional, rewards, level, None), rel=1e-14)


@tails
@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_levels_outside_the_unit_interval_are_refused(functional, level):
    with pytest.raises(ValueError, match="tail level"):
        functional(COORDINATE, level)


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_the_gradient_of_a_hinge_is_that_of_its_formula(side):
    reward = Quadratic([1.0, -2.0], [[2.0, 0.5], [0.5, 1.0]])
    hinge = Hinge(reward, threshold=-0.7, mass=0.05, side=side)
    x = torch.randn(200, 2, generator=generator(0), dtype=torch.float64, requires_grad=True)
    excess = reward.value(x) + 0.7
    formula = (excess.clamp(max=0) if side == "lower" else excess.clamp(min=0)) / 0.05
    (expected,) = torch.autograd.grad(formula.sum(), x)
    torch.testing.assert_close(hinge.gradient(x.detach()), expected)
    np.testing.assert_allclose(hinge.of_rewards(reward(x).numpy()), formula.detach().numpy(), rtol=1e-14)
    active = hinge.active(x.detach())
    assert torch.equal(active, expected.abs().sum(1) > 0)
    assert 0 < int(active.sum()) < 200


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_a_hinge_is_flat_at_its_threshold_and_where_no_sample_reaches(side):
    x = tensor([[1.0], [1.0]])
    hinge = Hinge(COORDINATE, threshold=1.0, mass=0.5, side=side)
    assert not hinge.active(x).any()
    assert torch.equal(hinge.gradient(x), torch.zeros_like(x))


def test_expected_reward():
    law = on_points([1.0, 2.0, 6.0])
    assert ExpectedReward(COORDINATE).value(law) == 3.0
    variation = ExpectedReward(COORDINATE).linearise(law)
    assert torch.equal(variation.gradient(law.samples), torch.ones(3, 1).double())
    assert variation.active(law.samples).all()
    assert not variation.sparse


def test_an_objective_is_a_weighted_difference():
    law = on_points(np.arange(10.0))
    objective = Objective(CVaR(COORDINATE, 0.25), ExpectedReward(COORDINATE), alpha=2.0)
    assert objective.value(law) == pytest.approx((0 + 1 + 0.5 * 2) / 2.5 - 2 * 4.5)
    variation = objective.linearise(law)
    # The quantile at 0.25 is 2: below it the hinge's slope is 1 / 0.25, everywhere else 0.
    expected = tensor([4.0, 4.0] + [0.0] * 8)[:, None] - 2.0
    torch.testing.assert_close(variation.gradient(law.samples), expected)


def test_active_samples_are_those_of_the_utility():
    """A divergence has a gradient everywhere; counting it would hide a hinge that no sample reaches."""
    x = tensor([[0.0], [2.0]])
    hinge = Hinge(COORDINATE, 1.0, 0.5, "lower")
    both = WeightedVariation(((1.0, hinge), (-0.5, RewardVariation(COORDINATE))))
    assert both.active(x).tolist() == [True, False]
    assert both.sparse
    assert not WeightedVariation(((1.0, RewardVariation(COORDINATE)), (-0.5, hinge))).sparse
    torch.testing.assert_close(both.gradient(x), tensor([[2.0 - 0.5], [-0.5]]))


def test_a_negative_weight_of_the_divergence_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        Objective(ExpectedReward(COORDINATE), ExpectedReward(COORDINATE), alpha=-0.1)
