"""What FTFC's protocols for molecules ask: narrowing from the mean, weights of steps, failures, adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from closed_forms import Mixture, MixtureFlow, Quadratic
from flowtilt.checkpoints import CheckpointError, save_weights
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.control.base import Solution
from flowtilt.domains.molecules.adapters import LowRank, load_adapted
from flowtilt.domains.molecules.bench import MoleculesBench
from flowtilt.domains.molecules.build import build_model
from flowtilt.domains.molecules.energies import Energies, XTBReward
from flowtilt.domains.molecules.sections import MoleculeAdapterConfig
from flowtilt.fdc import ExponentAscent, MirrorAscent, ascend, ascend_by_exponents
from flowtilt.functionals.base import Objective, WeightedVariation
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import ExpectedReward, Hinge, RewardVariation
from flowtilt.interpolants import Linear
from flowtilt.model import FlowModel
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Job, Run
from flowtilt.pipeline.stages import tilt_of
from flowtilt.pipeline.thresholds import threshold
from flowtilt.rewards import Reward
from small_molecules import tiny, write_checkpoint

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
ADAPTER = MoleculeAdapterConfig(rank=3, alpha=6.0)


# --- A tail that narrows from the mean ----------------------------------------------------------


def test_the_level_rises_from_0_to_0_998_over_the_first_120_updates() -> None:
    narrowing = {"narrowing": 0.5, "narrowing_from": 1.0, "narrowing_by": "linear"}
    experiment = tiny(solver={"updates": 240}, methods={"tfft": narrowing})
    levels = 1 - np.array(experiment.masses_of("tfft"))
    np.testing.assert_allclose(levels[:121], 0.998 * np.arange(121) / 120, atol=1e-12)
    assert set(np.round(levels[120:], 12)) == {0.998}
    # By default as before: from one half, by the same factor in each update.
    usual = tiny(solver={"updates": 240}).masses_of("tfft")
    assert usual[0] == 0.5
    assert usual[60] == pytest.approx((0.5 * 0.002) ** 0.5)


class Bench:
    """What :func:`tilt_of` looks at."""

    def __init__(self, job: Job) -> None:
        self.job, self.experiment, self.reward = job, job.experiment, Quadratic([1.0, 0.0])


def test_at_mass_1_the_mean_is_raised_and_below_it_the_tail_at_its_own_threshold(tmp_path: Path) -> None:
    narrowing = {"narrowing": 0.5, "narrowing_from": 1.0, "narrowing_by": "linear"}
    experiment = tiny(solver={"updates": 4}, methods={"tfft": narrowing | {"mass": 0.2}})
    rewards = np.random.default_rng(0).normal(25.0, 4.0, 400)
    batch, output = tmp_path / "offline.npz", tmp_path / "threshold.json"
    np.savez(batch, reward=rewards, context=np.zeros(400, dtype=np.int64))
    job = Job(
        Run(str(tmp_path), experiment, "tfft", 0), [experiment], {"offline": batch}, {"threshold": output}
    )
    threshold(job)
    rungs = json.loads(output.read_text())["schedule"]
    assert [rung["mass"] for rung in rungs] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert rungs[0]["threshold"] == rewards.min()
    tilt, _ = tilt_of(Bench(job), output)  # type: ignore[arg-type]
    assert callable(tilt)
    assert isinstance(tilt(0.0), RewardVariation)
    second = tilt(0.25)
    assert isinstance(second, Hinge)
    assert (second.mass, second.threshold) == (rungs[1]["mass"], rungs[1]["threshold"])


# --- Weights of steps ---------------------------------------------------------------------------


def weights_taken(run: Any) -> list[float]:
    taken: list[float] = []

    def solver(base: FlowModel, tilt: Any, kl_weight: float, *more: Any, **named: Any) -> Solution:
        taken.append(kl_weight)
        return Solution(base)

    run(solver)
    return taken


def test_each_step_has_its_own_weight() -> None:
    """FDC's three stages on GEOM, by scores and by exponents."""
    flow, weights = MixtureFlow(Linear(), GAUSSIAN), (1.2, 3.1, 5.0)
    objective = Objective(ExpectedReward(Quadratic([1.0, 0.0])), KL(flow, score_time=0.98), 1.0)

    def random(k: int) -> torch.Generator:
        return torch.Generator().manual_seed(k)

    def by_scores(solver: Any) -> None:
        ascend(flow, objective, range(3), MirrorAscent(weights, 64, 4), solver, random)

    def by_exponents(solver: Any) -> None:
        settings = ExponentAscent(400, 4, minimum_ess=1.0, step_weight=weights)
        ascend_by_exponents(flow, objective.utility, 1.0, 3, settings, solver, random)

    assert weights_taken(by_scores) == list(weights)
    assert weights_taken(by_exponents) == list(weights)
    for wrong in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="step_weight"):
            MirrorAscent(wrong, 64, 4)


def climb_of(**fdc: Any) -> Any:
    experiment = tiny(methods={"fdc": fdc})

    class Climbing(MoleculesBench):
        flow = build_model(experiment.flow)
        reward = Quadratic([1.0, 0.0])  # type: ignore[assignment]
        offline = None

    return Climbing(Job(Run("results", experiment, "fdc", 0), [experiment], {}, {})).climb()


def test_the_keys_of_fdc_reach_its_ascent() -> None:
    """On QM9: no divergence at all, steps of 0.01 hartree. On GEOM: three weights, scores at t = 0.98."""
    qm9 = climb_of(alpha=0.0, step=None, step_weight=0.01)
    assert qm9.settings.step_weight == (0.01,)
    assert qm9.objective.alpha == 0
    geom = climb_of(step=None, step_weight=[1.2, 3.1, 5.0], iterations=3, score_time=0.98, alpha=1.0)
    assert geom.settings.step_weight == (1.2, 3.1, 5.0)
    assert geom.objective.divergence.score_time == 0.98
    usual = climb_of()
    assert usual.settings.step_weight == 10.0 / 0.25
    # Without a divergence its scores are never asked for.
    variation = WeightedVariation(((1.0, RewardVariation(Quadratic([2.0, 0.0]))), (-0.0, None)))  # type: ignore[arg-type]
    assert variation.gradient(torch.zeros(1, 2, dtype=torch.float64)).tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("fdc", {"step": None}, "an fdc method needs step"),
        ("fdc", {"step_weight": 0.01}, "step and step_weight both say"),
        ("fdc", {"step": None, "step_weight": [1.0, 2.0]}, "one for each of the 10 iterations, got 2"),
        ("fdc", {"alpha": 0.0}, "alpha must be positive"),
        ("am", {"alpha": 0.0}, "alpha must be positive"),
        ("am", {"step_weight": 1.0}, "step_weight belongs to fdc, not to am"),
        ("am", {"score_time": 0.9}, "score_time belongs to fdc, not to am"),
        ("pretrained", {"adapter": {"rank": 2, "alpha": 2.0}}, "adapter belongs to"),
        ("tfft", {"threshold": 30.0}, "threshold is of one problem"),
        ("tfft_0.9", {"narrowing": None, "narrowing_from": 1.0}, "add narrowing"),
        ("am", {"solver": {"endpoint_percentile": 85.0}}, "endpoint_percentile: is of images"),
    ],
)
def test_keys_that_do_not_fit_are_refused(method: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny(methods={method: changes})


def test_a_method_has_its_own_kl_weight() -> None:
    experiment = tiny(methods={"am": {"alpha": 0.0045}, "tfft": {"alpha": 1.0}})
    assert experiment.reward_weight_of("am") == 0.0045
    assert experiment.tail_of("tfft").alpha == 1.0
    assert experiment.reward_weight_of("am_lean") == experiment.objective.alpha


# --- Failed energies ----------------------------------------------------------------------------


class Known(XTBReward):
    """Energies that were computed: the second one failed."""

    def _computed(self, coordinates: torch.Tensor, numbers: torch.Tensor) -> Energies:
        gradient = np.ones((2, 1, 3))
        gradient[1] = 0
        return Energies(np.array([-28.0, math.nan]), gradient, (None, None))


def test_a_failed_energy_counts_as_a_value_with_no_gradient() -> None:
    x = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)

    def decode(x: torch.Tensor, context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return x[..., :3], torch.ones(2, 1, dtype=torch.long)

    def separated(x: torch.Tensor, context: Any) -> torch.Tensor:
        return 5 * x[..., 3].sum(1)

    counted = Known(decode, separated=separated, failed_value=-500.0)  # type: ignore[arg-type]
    left_out = Known(decode, separated=separated)  # type: ignore[arg-type]
    assert counted(x).tolist() == [28.0, -500.0]
    assert left_out(x)[0] == 28.0
    assert bool(left_out(x)[1].isnan())
    assert not counted.failed(x).any()
    assert left_out.failed(x).tolist() == [False, True]
    expected = [[[-1.0, -1.0, -1.0, -5.0]], [[0.0, 0.0, 0.0, 0.0]]]
    assert counted.gradient(x).tolist() == left_out.gradient(x).tolist() == expected
    # Of an upper tail such a molecule is no part; the mean is pulled by it.
    assert Hinge(counted, 20.0, 0.2, "upper").active(x).tolist() == [True, False]


def test_the_key_of_failed_energies_is_of_training_alone() -> None:
    reward = tiny(reward={"failed": -500.0}).reward
    assert reward.failed == -500.0
    assert reward.calculation == tiny().reward.calculation


# --- Adapters -----------------------------------------------------------------------------------


def adapted(tmp_path: Path, adapter: MoleculeAdapterConfig | None = ADAPTER) -> Any:
    experiment = tiny()
    weights = write_checkpoint(tmp_path / "base.safetensors")
    return load_adapted(build_model(experiment.flow), weights, adapter)


def states(flow: Any, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    mask = flow.draw_context(count, random)
    return flow.prior(count, random, mask), mask


def test_new_adapters_change_nothing_and_are_all_that_is_tuned(tmp_path: Path) -> None:
    plain, flow = adapted(tmp_path, None), adapted(tmp_path)
    x, mask = states(plain)
    t = torch.tensor(0.6)
    assert torch.equal(plain.velocity(x, t, mask), flow.velocity(x, t, mask))
    linears = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    assert sum(isinstance(m, LowRank) for m in flow.modules()) == len(linears)
    expected = sum(3 * (m.in_features + m.out_features) for m in linears)
    assert sum(p.numel() for p in flow.tunable()) == expected
    assert len(plain.tunable()) == len(list(plain.parameters()))


class Level(Reward):
    def value(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
        return x.square().flatten(1).sum(1)


def test_a_fine_tuning_changes_adapters_alone_and_its_checkpoint_holds_all(tmp_path: Path) -> None:
    flow = adapted(tmp_path)
    settings = AdjointMatchingSettings(updates=3, batch=4, pool=4, steps=4, learning_rate=0.01)
    tilt = RewardVariation(Level())
    tuned = solve(flow, tilt, 10.0, settings, torch.Generator().manual_seed(1)).model
    for name, tensor in tuned.weights().items():
        moved = not torch.equal(tensor, flow.weights()[name])
        assert moved == name.endswith((".up", ".down")), name
    file = tmp_path / "tuned.safetensors"
    save_weights(tuned, file)
    again = load_adapted(build_model(tiny().flow), file, ADAPTER)
    x, mask = states(flow)
    t = torch.tensor(0.6)
    assert torch.equal(again.velocity(x, t, mask), tuned.velocity(x, t, mask))
    assert not torch.allclose(again.velocity(x, t, mask), flow.velocity(x, t, mask))
    # The weights with the product added are the same network without adapters.
    merged = build_model(tiny().flow)
    own = dict(merged.named_modules())
    with torch.no_grad():
        for name, tensor in again.named_parameters():
            if ".linear." not in name and not name.endswith((".up", ".down")):
                dict(merged.named_parameters())[name].copy_(tensor)
        for name, module in again.named_modules():
            if isinstance(module, LowRank):
                own[name].weight.copy_(module.linear.weight + 2.0 * module.up @ module.down)
                if module.linear.bias is not None:
                    own[name].bias.copy_(module.linear.bias)
    torch.testing.assert_close(merged.velocity(x, t, mask), again.velocity(x, t, mask), rtol=1e-4, atol=1e-5)


def test_an_adapted_flow_stays_equivariant(tmp_path: Path) -> None:
    flow = adapted(tmp_path)
    with torch.no_grad():
        for parameter in flow.tunable():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    flow = flow.double()
    x, mask = states(flow)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=x.dtype))
    turned = torch.cat([x[..., :3] @ turn, x[..., 3:]], dim=2)
    t = torch.tensor(0.5, dtype=torch.float64)
    one, other = flow.velocity(x, t, mask), flow.velocity(turned, t, mask)
    torch.testing.assert_close(other[..., :3], one[..., :3] @ turn, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(other[..., 3:], one[..., 3:], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("adapter", [None, MoleculeAdapterConfig(rank=3, alpha=3.0)])
def test_a_fine_tuned_checkpoint_of_other_adapters_is_refused(
    adapter: MoleculeAdapterConfig | None, tmp_path: Path
) -> None:
    save_weights(adapted(tmp_path), tmp_path / "tuned.safetensors")
    with pytest.raises(CheckpointError, match="made for another network: its adapter is"):
        load_adapted(build_model(tiny().flow), tmp_path / "tuned.safetensors", adapter)
