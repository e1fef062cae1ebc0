import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from closed_forms import (
    PATHS,
    Mixture,
    MixtureFlow,
    Quadratic,
    generator,
    halving_orders,
    pushforward,
    tensor,
)
from flowtilt.functionals.base import Distribution, FiniteDistribution, Objective, WeightedVariation
from flowtilt.functionals.utilities import (
    SQ,
    CVaR,
    DiverseModes,
    Entropy,
    ExpectedReward,
    Hinge,
    InfeasibleBarrier,
    LogBarrier,
    MeanVariance,
    RewardVariation,
)
from flowtilt.metrics.tails import lower_tail_mean, upper_tail_mean
from flowtilt.sampling import OdeSettings
from mode_flow import ModeFlow

COORDINATE = Quadratic([1.0])
TAILS = {CVaR: lower_tail_mean, SQ: upper_tail_mean}
tails = pytest.mark.parametrize("functional", TAILS, ids=["cvar", "sq"])


def on_points(rewards):
    """The uniform distribution on points whose first coordinate is their reward."""
    return Distribution(None, tensor(rewards)[:, None])


def value(functional, rewards, mass, probabilities):
    return TAILS[functional](rewards, mass, probabilities)


@tails
@pytest.mark.parametrize("mass", [0.0137, 0.25, 0.5, 0.87, 0.993])
def test_first_variations_against_finite_differences(functional, mass):
    """The tail mean is linear in the probabilities near a distribution whose quantile lies inside an atom."""
    rng = np.random.default_rng(0)
    n, step = 101, 1e-6
    rewards, p = rng.normal(size=n) * 3, np.full(n, 1 / n)
    hinge = functional(COORDINATE, mass).linearise(on_points(rewards))
    assert (hinge.mass, hinge.tail) == (mass, "lower" if functional is CVaR else "upper")
    for _ in range(20):
        direction = rng.normal(size=n)
        direction -= direction.mean()
        values = [value(functional, rewards, mass, p + sign * step * direction) for sign in (1, -1)]
        slope = (values[0] - values[1]) / (2 * step)
        # Rounding only: values of about 3, known to 1e-15, over a difference of 2e-6 and the mass.
        assert slope == pytest.approx(direction @ hinge.of_rewards(rewards), abs=1e-8 / hinge.mass)


@st.composite
def two_distributions(draw):
    rewards = draw(st.lists(st.integers(-30, 30), min_size=2, max_size=20, unique=True))
    weights = draw(st.lists(st.integers(0, 9), min_size=len(rewards), max_size=len(rewards)).filter(any))
    return np.array(rewards) / 7, np.array(weights) / sum(weights), draw(st.integers(1, 19)) / 20


@given(two_distributions())
def test_the_lower_tail_mean_is_convex_and_the_upper_concave(problem):
    """So the linearisation bounds the functional, also where the quantile sits between two atoms."""
    rewards, q, mass = problem
    p = np.full(len(rewards), 1 / len(rewards))
    for functional, sign in ((CVaR, 1), (SQ, -1)):
        hinge = functional(COORDINATE, mass).linearise(on_points(rewards))
        gain = value(functional, rewards, mass, q) - value(functional, rewards, mass, p)
        linear = (q - p) @ hinge.of_rewards(rewards)
        assert sign * (gain - linear) >= -1e-11


@tails
@pytest.mark.parametrize("mass", [0.01, 0.3, 0.99])
def test_values_are_tail_means_of_the_rewards(functional, mass):
    rewards = np.random.default_rng(1).normal(size=333)
    found = functional(COORDINATE, mass).value(on_points(rewards))
    assert found == pytest.approx(value(functional, rewards, mass, None), rel=1e-14)


@tails
@pytest.mark.parametrize("mass", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_masses_outside_the_unit_interval_are_refused(functional, mass):
    with pytest.raises(ValueError, match="mass of a tail"):
        functional(COORDINATE, mass)


@pytest.mark.parametrize("tail", ["lower", "upper"])
def test_the_gradient_of_a_hinge_is_that_of_its_formula(tail):
    reward = Quadratic([1.0, -2.0], [[2.0, 0.5], [0.5, 1.0]])
    hinge = Hinge(reward, threshold=-0.7, mass=0.05, tail=tail)
    x = torch.randn(200, 2, generator=generator(0), dtype=torch.float64, requires_grad=True)
    excess = reward.value(x) + 0.7
    formula = (excess.clamp(max=0) if tail == "lower" else excess.clamp(min=0)) / 0.05
    (expected,) = torch.autograd.grad(formula.sum(), x)
    torch.testing.assert_close(hinge.gradient(x.detach()), expected)
    np.testing.assert_allclose(hinge.of_rewards(reward(x).numpy()), formula.detach().numpy(), rtol=1e-14)
    active = hinge.active(x.detach())
    assert torch.equal(active, expected.abs().sum(1) > 0)
    assert 0 < int(active.sum()) < 200


@pytest.mark.parametrize("tail", ["lower", "upper"])
def test_a_hinge_is_flat_at_its_threshold_and_where_no_sample_reaches(tail):
    x = tensor([[1.0], [1.0]])
    hinge = Hinge(COORDINATE, threshold=1.0, mass=0.5, tail=tail)
    assert not hinge.active(x).any()
    assert torch.equal(hinge.gradient(x), torch.zeros_like(x))


def test_expected_reward():
    distribution = on_points([1.0, 2.0, 6.0])
    assert ExpectedReward(COORDINATE).value(distribution) == 3.0
    variation = ExpectedReward(COORDINATE).linearise(distribution)
    assert torch.equal(variation.gradient(distribution.samples), torch.ones(3, 1).double())
    assert variation.active(distribution.samples).all()
    assert not variation.sparse


def test_an_objective_is_a_weighted_difference():
    distribution = on_points(np.arange(10.0))
    objective = Objective(CVaR(COORDINATE, 0.25), ExpectedReward(COORDINATE), alpha=2.0)
    assert objective.value(distribution) == pytest.approx((0 + 1 + 0.5 * 2) / 2.5 - 2 * 4.5)
    variation = objective.linearise(distribution)
    # The quantile at 0.25 is 2: below it the hinge's slope is 1 / 0.25, everywhere else 0.
    expected = tensor([4.0, 4.0] + [0.0] * 8)[:, None] - 2.0
    torch.testing.assert_close(variation.gradient(distribution.samples), expected)


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


BENT = Quadratic([1.0, -2.0], [[2.0, 0.5], [0.5, 1.0]])
CLOUD = torch.randn(60, 2, generator=generator(4), dtype=torch.float64)


def differentiated(formula, x):
    """Gradient of a formula by autograd."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(formula(x).sum(), x)
    return gradient


@pytest.mark.parametrize("risk", [0.7, -0.2])
def test_mean_variance(risk):
    functional, distribution = MeanVariance(BENT, risk), Distribution(None, CLOUD)
    rewards = BENT.value(CLOUD)
    mean = rewards.mean()
    assert functional.value(distribution) == pytest.approx(
        float(mean - risk * rewards.var(correction=0)), rel=1e-13
    )

    def formula(x):
        return BENT.value(x) - risk * (BENT.value(x) ** 2 - 2 * mean * BENT.value(x))

    variation = functional.linearise(distribution)
    torch.testing.assert_close(variation.value(CLOUD), formula(CLOUD))
    torch.testing.assert_close(variation.gradient(CLOUD), differentiated(formula, CLOUD))
    with pytest.raises(ValueError, match="must be finite, got risk=nan"):
        MeanVariance(BENT, float("nan"))


def test_log_barrier():
    cost = Quadratic([0.2, 0.1], [[-0.3, 0.0], [0.0, -0.1]])
    functional, distribution = LogBarrier(BENT, cost, bound=1.0, strength=0.3), Distribution(None, CLOUD)
    slack = 1.0 - float(cost(CLOUD).mean())
    expected = float(BENT(CLOUD).mean()) + 0.3 * np.log(slack)
    assert functional.value(distribution) == pytest.approx(expected, rel=1e-13)

    def formula(x):
        return BENT.value(x) - 0.3 / slack * cost.value(x)

    variation = functional.linearise(distribution)
    torch.testing.assert_close(variation.value(CLOUD), formula(CLOUD))
    torch.testing.assert_close(variation.gradient(CLOUD), differentiated(formula, CLOUD))
    # Away from the cost: the paper's sign would move towards it.
    towards = (variation.gradient(CLOUD) - BENT.gradient(CLOUD)) * cost.gradient(CLOUD)
    assert float(towards.sum(1).max()) <= 0


def test_an_infeasible_barrier_names_cost_and_bound():
    functional = LogBarrier(COORDINATE, COORDINATE, bound=1.5)
    distribution = on_points([1.0, 2.0, 3.0])
    uniform = np.log(np.full(3, 1 / 3))
    finite = FiniteDistribution(distribution.samples, uniform, uniform)
    for call, at in (
        (functional.value, distribution),
        (functional.linearise, distribution),
        (functional.finite_value, finite),
        (functional.finite_variation, finite),
    ):
        with pytest.raises(InfeasibleBarrier, match=r"cost is 2 and must be below the bound 1\.5; raise"):
            call(at)
    with pytest.raises(ValueError, match="strength of a log barrier must be positive and finite, got 0"):
        LogBarrier(COORDINATE, COORDINATE, bound=1.0, strength=0.0)
    with pytest.raises(ValueError, match="bound of a log barrier must be finite, got inf"):
        LogBarrier(COORDINATE, COORDINATE, bound=float("inf"))


P = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@paths
def test_the_value_of_entropy_against_the_closed_form(path):
    distribution, count = pushforward(path, P, 0.0, 1.0), 2000
    x = distribution.sample(count, generator(0))
    surprise = -distribution.log_density(x)
    value = Entropy().value(Distribution(MixtureFlow(path, P), x))
    # On these samples: the log-likelihoods' error of less than 1e-3. Over samples: four standard errors.
    assert value == pytest.approx(float(surprise.mean()), abs=1e-3)
    exact = 1 + np.log(2 * np.pi) + 0.5 * float(torch.logdet(distribution.covariance))
    assert value == pytest.approx(exact, abs=4 * float(surprise.std()) / count**0.5 + 1e-3)


@paths
def test_the_gradient_of_entropy_is_minus_the_score(path):
    """``S^-1 (x - m)`` of the data; the distance falls with 1 - t."""
    x = P.sample(100, generator(0))
    exact = (x - P.mean) @ torch.linalg.inv(P.covariance)
    errors = []
    for gap in (0.01, 0.002, 0.001, 0.0005):
        found = Entropy(1 - gap).linearise(Distribution(MixtureFlow(path, P), x)).gradient(x)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert Entropy().score_time == 0.99
    assert errors[0] < 0.03
    assert halving_orders(errors[1:]) == pytest.approx([1, 1], abs=0.15)


MODES = [P, Mixture.gaussian([-0.8, 0.4], [[0.5, -0.1], [-0.1, 0.9]])]


def log_ratio(x, modes):
    """``log p_z - log mean_k p_k`` by exact densities."""
    logs = torch.stack([distribution.log_density(x) for distribution in MODES])
    return logs[modes, torch.arange(len(x))] - torch.logsumexp(logs, 0) + np.log(2)


@pytest.mark.slow
def test_diverse_modes_against_exact_densities():
    model = ModeFlow(PATHS["linear"], MODES)
    modes = torch.arange(60) % 2
    expected = differentiated(lambda x: log_ratio(x, modes), CLOUD)
    errors = []
    for margin in (1e-4, 1e-6):
        functional = DiverseModes(2, 1 - margin, OdeSettings(margin=margin))
        variation = functional.linearise(Distribution(model, CLOUD, modes))
        values, gradient = variation.value(CLOUD, modes), variation.gradient(CLOUD, modes)
        errors.append([float((values - log_ratio(CLOUD, modes)).abs().max())])
        errors[-1].append(float((gradient - expected).abs().max()))
        value = functional.value(Distribution(model, CLOUD, modes))
        assert value == pytest.approx(float(log_ratio(CLOUD, modes).mean()), abs=errors[-1][0])
    # Of first order in the distance kept from both ends of time, and nothing else.
    assert max(errors[1]) < 1e-4
    assert errors[0] == pytest.approx([100 * e for e in errors[1]], rel=0.05)


def test_distant_modes_tell_everything_and_equal_ones_nothing():
    far = ModeFlow(PATHS["linear"], [Mixture.gaussian([s, 0.0], np.eye(2)) for s in (-9.0, 9.0)])
    modes = torch.arange(20) % 2
    x = torch.stack(
        [distribution.sample(20, generator(k)) for k, distribution in enumerate(far.distributions)]
    )[modes, torch.arange(20)]
    assert DiverseModes(2).value(Distribution(far, x, modes)) == pytest.approx(np.log(2), abs=1e-6)
    same = ModeFlow(PATHS["linear"], [P, P])
    assert DiverseModes(2).value(Distribution(same, x, modes)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("context", "shown"),
    [
        (None, "NoneType"),
        (torch.zeros(60), "torch.float32"),
        (torch.zeros(59, dtype=torch.long), r"\(59,\)"),
        (torch.full((60,), 2), "from 2 to 2"),
        (torch.full((60,), -1), "from -1 to -1"),
    ],
)
def test_diverse_modes_need_a_mode_for_each_sample(context, shown):
    model = ModeFlow(PATHS["linear"], MODES)
    with pytest.raises(ValueError, match=f"one integer from 0 to 1 for each sample, got .*{shown}"):
        DiverseModes(2).linearise(Distribution(model, CLOUD, context))


def test_diverse_modes_of_a_finite_distribution_are_the_mutual_information():
    """``sum p(x, z) log p(x, z) / (p(x) p(z))`` over a table."""
    table = np.random.default_rng(0).dirichlet(np.ones(15)).reshape(3, 5)
    points = tensor(np.tile(np.arange(5.0), 3))[:, None]
    distribution = FiniteDistribution(points, np.log(table.ravel()), np.zeros(15), np.repeat(np.arange(3), 5))
    ratio = np.log(table / (table.sum(0) * table.sum(1, keepdims=True)))
    assert DiverseModes(3).finite_value(distribution) == pytest.approx(
        float((table * ratio).sum()), rel=1e-12
    )
    np.testing.assert_allclose(DiverseModes(3).finite_variation(distribution), ratio.ravel(), atol=1e-13)
    with pytest.raises(ValueError, match="modes from 0 to 2"):
        DiverseModes(2).finite_value(distribution)
    with pytest.raises(ValueError, match="give it modes"):
        DiverseModes(2).finite_value(FiniteDistribution(points, distribution.log_p, distribution.log_p))


def test_fewer_than_two_modes_are_refused():
    with pytest.raises(ValueError, match="modes must be a whole number of at least 2, got 1"):
        DiverseModes(1)
