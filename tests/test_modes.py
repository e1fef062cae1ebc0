"""Precision and mode of a model: samplers and solvers follow the one and leave the other alone."""

import copy

import pytest
import torch
from torch import nn

from closed_forms import PATHS, generator
from flowtilt.control import adjoint_matching, weighted_fitting
from flowtilt.control.adjoint_matching import AdjointMatchingSettings
from flowtilt.control.endpoints import likelihood_ratio_gradient
from flowtilt.control.weighted_fitting import WeightedFittingSettings
from flowtilt.domains.molecules.model import MoleculeFlow
from flowtilt.domains.molecules.sections import MoleculeNetworkConfig, UnitsConfig
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import Distribution, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import Entropy, ExpectedReward, RewardVariation
from flowtilt.model import FlowModel, evaluating
from flowtilt.rewards import Reward
from flowtilt.sampling import (
    OdeSettings,
    log_likelihood,
    memoryless_steps,
    sample_ode,
    sample_sde,
    sample_with_log_density,
)

AM = AdjointMatchingSettings(updates=3, batch=16, pool=16, steps=5)
RATIO = AdjointMatchingSettings(updates=3, batch=16, pool=16, steps=5, endpoint_gradient="likelihood_ratio")
POSTERIOR = AdjointMatchingSettings(updates=3, batch=16, pool=16, steps=5, adjoint="posterior_mean")
SHORT = OdeSettings(steps=3)
FITTED = WeightedFittingSettings(bank=200, updates=3, batch=16, steps=3, minimum_ess=1, warning_ess=1)


class Rise(Reward):
    def value(self, x, context=None):
        return x.flatten(1)[:, 0]


def planar(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PlanarFlow(PATHS["linear"], (8, 8), "silu", "velocity").to(dtype)


class Dropping(FlowModel):
    """A network with dropout and the statistics of its batches."""

    has_likelihood = True

    def __init__(self):
        super().__init__()
        self.path = PATHS["linear"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(3, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 2)
            )
        self.still = nn.Dropout(0.5).eval()  # a part that its owner has in evaluation mode

    def prior(self, count, generator, context=None):
        return self.standard_normal(count, 2, generator=generator)

    def velocity(self, x, t, context=None):
        return self.still(self.layers(torch.cat([x, t.expand(len(x))[:, None]], 1)))


def fdc(flow):
    objective = Objective(ExpectedReward(Rise()), KL(flow, 0.8), 0.5)
    ascent = ascend(
        flow,
        objective,
        range(2),
        MirrorAscent(1.0, 32, 5),
        lambda base, tilt, weight, random, slot: adjoint_matching.solve(base, tilt, weight, AM, random),
        generator,
    )
    return weights(ascent.model)


def weights(model):
    return torch.cat([t.double().flatten() for t in model.state_dict().values()])


def solved(module, settings):
    def run(flow):
        return weights(module.solve(flow, RewardVariation(Rise()), 1.0, settings, generator(0)).model)

    return run


X = torch.randn(8, 2, generator=generator(3))
USES = {
    "sde": lambda flow: sample_sde(flow, 9, 4, generator(0)),
    "ode": lambda flow: sample_ode(flow, 9, generator(0), settings=SHORT),
    "with density": lambda flow: sample_with_log_density(flow, 9, generator(0), settings=SHORT)[1],
    "likelihood": lambda flow: log_likelihood(flow, X.to(next(flow.parameters()).dtype), settings=SHORT),
    "ratio": lambda flow: likelihood_ratio_gradient(
        flow, RewardVariation(Rise()), sample_sde(flow, 9, 4, generator(0)), memoryless_steps(flow, 4)
    )[0],
    "am": solved(adjoint_matching, AM),
    "am by ratio": solved(adjoint_matching, RATIO),
    "am by posterior mean": solved(adjoint_matching, POSTERIOR),
    "weighted fitting": solved(weighted_fitting, FITTED),
    "fdc": fdc,
    "entropy": lambda flow: (
        Entropy().linearise(Distribution(flow, X)).gradient(X.to(next(flow.parameters()).dtype))
    ),
    "kl": lambda flow: (
        KL(copy.deepcopy(flow)).linearise(Distribution(flow, X)).gradient(X.to(next(flow.parameters()).dtype))
    ),
}
uses = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())


@uses
def test_states_have_the_precision_of_the_model(use):
    found, single = use(planar(torch.float64)), use(planar())
    assert found.dtype == torch.float64
    assert bool(torch.isfinite(found).all())
    assert found.shape == single.shape


def test_molecules_have_the_precision_of_the_model():
    settings = MoleculeNetworkConfig(layers=2, width=8, vectors=4, pair_width=4, heads=2, radial=4)
    flow = MoleculeFlow(settings, UnitsConfig(), torch.tensor([0.0, 0.0, 1.0, 1.0])).double()
    mask = flow.context_of(torch.tensor([2, 3, 3]))
    for x in (sample_sde(flow, 3, 3, generator(0), mask), sample_ode(flow, 3, generator(0), mask)):
        assert x.dtype == torch.float64
        assert bool(torch.isfinite(x).all())


@uses
def test_a_model_in_training_mode_is_evaluated_and_left_as_it_was(use):
    """The same numbers as in evaluation mode; the modes and the statistics of batches are those of before."""
    flow = Dropping().train()
    flow.still.eval()
    modes = [module.training for module in flow.modules()]
    assert set(modes) == {True, False}
    before = weights(flow)
    torch.manual_seed(0)
    found, expected = use(flow), use(Dropping().eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [module.training for module in flow.modules()] == modes
    assert torch.equal(weights(flow), before)


@pytest.mark.parametrize("module", [adjoint_matching, weighted_fitting])
def test_a_solution_has_the_mode_of_its_base(module):
    for training in (True, False):
        flow = Dropping().train(training)
        settings = AM if module is adjoint_matching else FITTED
        solution = module.solve(flow, RewardVariation(Rise()), 1.0, settings, generator(0))
        assert [m.training for m in solution.model.modules()] == [m.training for m in flow.modules()]


def test_the_mode_is_restored_after_an_error():
    class Breaking(Dropping):
        def velocity(self, x, t, context=None):
            raise RuntimeError("broken")

    flow = Breaking().train()
    modes = [module.training for module in flow.modules()]
    with pytest.raises(RuntimeError, match="broken"):
        sample_ode(flow, 3, generator(0))
    with evaluating(flow):
        assert not any(module.training for module in flow.modules())
    assert [module.training for module in flow.modules()] == modes
