"""Mirror ascent: what it hands to the solver, and how its iterations chain."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtilt.control.adjoint_matching import Solution
from flowtilt.domains.planar.build import build_model, build_reward
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import FirstVariation, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import CVaR, ExpectedReward
from flowtilt.metrics.tails import quantile
from flowtilt.model import FlowModel
from flowtilt.sampling import sample_sde
from small import tiny

SETTINGS = MirrorAscent(step_weight=8.0, law_samples=400, law_steps=8)


def seeded(k: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + k)


class Recorder:
    """A solver that moves the weights by a known amount and notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[FlowModel, FirstVariation, float]] = []

    def __call__(
        self, base: FlowModel, tilt: FirstVariation, weight: float, generator: torch.Generator
    ) -> Solution:
        self.calls.append((base, tilt, weight))
        moved = build_model(tiny())
        moved.load_state_dict({name: value + 0.01 for name, value in base.state_dict().items()})
        return Solution(moved.requires_grad_(False), [{"update": 0, "loss": float(len(self.calls))}])


def setting() -> tuple[FlowModel, Objective]:
    base = build_model(tiny()).requires_grad_(False)
    return base, Objective(CVaR(build_reward(tiny()), 0.1), KL(base, 0.9), alpha=2.0)


def test_each_iteration_starts_from_the_last_under_the_step_weight() -> None:
    base, objective = setting()
    solver = Recorder()
    result = ascend(base, objective, range(3), SETTINGS, solver, seeded)
    assert [weight for _, _, weight in solver.calls] == [8.0] * 3
    assert solver.calls[0][0] is base
    for k, (model, _, _) in enumerate(solver.calls):
        for moved, first in zip(model.state_dict().values(), base.state_dict().values(), strict=True):
            torch.testing.assert_close(moved, first + 0.01 * k)
    assert [row["iteration"] for row in result.history] == [1, 2, 3]
    assert [row["loss"] for row in result.history] == [1.0, 2.0, 3.0]


def test_the_hinge_is_at_the_quantile_of_the_current_law() -> None:
    base, objective = setting()
    solver = Recorder()
    ascend(base, objective, range(2), SETTINGS, solver, seeded)
    reward = build_reward(tiny())
    for k, (model, tilt, _) in enumerate(solver.calls):
        x = sample_sde(model, 400, 8, seeded(k))[-1]
        hinge = tilt.parts[0][1]  # type: ignore[attr-defined]
        assert hinge.threshold == quantile(reward(x).double().numpy(), 0.1)


def test_the_gradient_is_that_of_the_utility_less_the_weighted_score_difference() -> None:
    base, _ = setting()
    reward = build_reward(tiny())
    objective = Objective(ExpectedReward(reward), KL(base, 0.9), alpha=2.0)
    solver = Recorder()
    ascend(base, objective, range(2), SETTINGS, solver, seeded)
    x, t = torch.randn(50, 2, generator=seeded(9)), torch.tensor(0.9)

    def scores(model: FlowModel) -> Tensor:
        return model.score(x, t)

    first, second = (tilt for _, tilt, _ in solver.calls)
    torch.testing.assert_close(first.gradient(x), reward.gradient(x))  # p_0 is the reference itself
    moved = solver.calls[1][0]
    expected = reward.gradient(x) - 2.0 * (scores(moved) - scores(base))
    torch.testing.assert_close(second.gradient(x), expected, rtol=1e-4, atol=1e-4)


def test_continuing_uses_the_same_randomness() -> None:
    base, objective = setting()
    drawn: list[int] = []

    def noted(k: int) -> torch.Generator:
        drawn.append(k)
        return seeded(k)

    whole, halves = Recorder(), Recorder()

    ascend(base, objective, range(3), SETTINGS, whole, noted)
    middle = ascend(base, objective, range(1), SETTINGS, halves, noted).model
    ascend(middle, objective, range(1, 3), SETTINGS, halves, noted)
    assert drawn == [0, 1, 2, 0, 1, 2]
    for (_, one, _), (_, other, _) in zip(whole.calls, halves.calls, strict=True):
        assert one.parts[0][1].threshold == other.parts[0][1].threshold  # type: ignore[attr-defined]
