import pytest
import torch

from closed_forms import Quadratic, generator
from flowtilt.functionals.base import Distribution
from flowtilt.functionals.utilities import CVaR, ExpectedReward, Hinge, RewardVariation
from flowtilt.rewards import Reward, RewardError


class Returning(Reward):
    """A reward that returns what a function of the batch makes of it."""

    def __init__(self, function):
        self.function = function

    def value(self, x, context=None):
        return self.function(x)


BAD = {
    "nan": (
        lambda x: torch.where(x[:, 0] > 0, torch.nan, x[:, 0]),
        "Returning is not finite on 2 of 3 samples",
    ),
    "infinite": (lambda x: 1 / (x[:, 0] - x[0, 0]), "is not finite on 1 of 3 samples"),
    "column": (lambda x: x[:, :1], r"returned shape \(3, 1\) for a batch of 3"),
    "scalar": (lambda x: x.sum(), r"returned shape \(\) for a batch of 3"),
    "short": (lambda x: x[:2, 0], r"returned shape \(2,\).*must return shape \(3,\)"),
}
X = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [3.0, 1.0]])


@pytest.mark.parametrize(("function", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize(
    "use",
    [
        lambda reward: reward(X),
        lambda reward: reward.gradient(X),
        lambda reward: RewardVariation(reward).gradient(X),
        lambda reward: Hinge(reward, 0.0, 0.1, "lower").active(X),
        lambda reward: Hinge(reward, 0.0, 0.1, "lower").gradient(X),
    ],
    ids=["value", "gradient", "variation", "active", "hinge"],
)
def test_a_reward_that_is_not_one_finite_number_a_sample_is_named(function, message, use):
    with pytest.raises(RewardError, match=message):
        use(Returning(function))


def test_the_first_bad_sample_is_shown():
    with pytest.raises(RewardError, match=r"first at \[1\.0, 2\.0\]"):
        Returning(BAD["nan"][0])(X)


@pytest.mark.parametrize("functional", [ExpectedReward, lambda r: CVaR(r, 0.1)])
def test_functionals_pass_the_error_on(functional):
    with pytest.raises(RewardError, match="not finite"):
        functional(Returning(BAD["nan"][0])).value(Distribution(None, X))


def test_values_carry_no_graph_and_gradients_are_those_of_the_formula():
    reward = Quadratic([1.0, -2.0], [[2.0, 0.5], [0.5, 1.0]])
    x = torch.randn(20, 2, generator=generator(0), dtype=torch.float64, requires_grad=True)
    assert not reward(x).requires_grad
    with torch.no_grad():  # gradients are available inside sampling, which records none
        gradient = reward.gradient(x)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, (reward.linear - x @ reward.curvature).detach())


def test_a_reward_constant_in_x_has_the_gradient_zero():
    assert torch.equal(Returning(lambda x: 0 * x[:, 0] + 1).gradient(X), torch.zeros_like(X))


def test_a_finite_reward_with_an_infinite_gradient_is_named():
    kinked = Returning(lambda x: (x[:, 0] + 1).sqrt())
    with pytest.raises(RewardError, match=r"gradient that is not finite on 1 of 3 .* at \[-1\.0, 0\.0\]"):
        kinked.gradient(X)


class Failing(Returning):
    """One whose evaluations may fail."""

    may_fail = True


def test_a_reward_that_may_fail_is_nan_there_with_the_gradient_zero():
    reward = Failing(BAD["nan"][0])
    assert reward(X).isnan().tolist() == [True, False, True]
    assert reward.gradient(X).tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    through_nan = Failing(lambda x: x[:, 0] * torch.tensor([torch.nan, 1.0, 1.0]))
    assert through_nan.gradient(X).tolist() == [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("kind", ["infinite", "column", "scalar", "short"])
def test_a_reward_that_may_fail_is_still_one_number_a_sample_and_not_infinite(kind):
    function, message = BAD[kind]
    with pytest.raises(RewardError, match=message.replace("Returning", "Failing")):
        Failing(function).gradient(X)


def test_a_hinge_on_a_reward_that_may_fail_is_inactive_there():
    hinge = Hinge(Failing(BAD["nan"][0]), 0.0, 0.1, "lower")
    assert hinge.active(X).tolist() == [False, True, False]
    assert hinge.gradient(X).tolist() == [[0.0, 0.0], [10.0, 0.0], [0.0, 0.0]]
