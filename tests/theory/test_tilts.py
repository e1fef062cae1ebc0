"""The study of control solvers on tilts in closed form: its closed forms, its model, and its errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import closed_forms
from flowtilt.control.base import Solution, TrainingDiverged
from flowtilt.interpolants import Linear
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.theory.config import TiltStudyConfig, load_theory
from flowtilt.pipeline.theory.mixture_flow import MixtureFlow
from flowtilt.pipeline.theory.tilts import COSTS, ERRORS, solved, study
from flowtilt.theory.gaussian_mixtures import GaussianMixture, QuadraticReward, weight_at
from small import CONFIG

FILE = CONFIG / "theory" / "tilts.yaml"
REWARD = QuadraticReward(np.array([1.0, 0.5]), np.array([[0.06, 0.02], [0.02, 0.1]]))
ARRAYS = (
    [0.7, 0.3],
    [[0.0, -1.5], [0.4, 1.5]],
    [[[0.25, 0.0], [0.0, 0.3]], [[0.2, 0.05], [0.05, 0.25]]],
)
BASE = GaussianMixture.of(*ARRAYS)
OTHER = GaussianMixture.of([1, 3], [[0.5, 0.2], [-1.0, 0.0]], ARRAYS[2])


def on_a_grid() -> tuple[np.ndarray, np.ndarray]:
    """Cell centres (n, 2), and the log of the mixture's density times a cell's area, (n,)."""
    axis = np.linspace(-7, 7, 561)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = closed_forms.Mixture.of(*ARRAYS).log_density(torch.tensor(points)).numpy()
    return points, density + 2 * math.log(axis[1] - axis[0])


@pytest.mark.parametrize("weight", [2.0, 0.4])
def test_a_tilt_is_that_of_quadrature(weight: float) -> None:
    points, logs = on_a_grid()
    rewards = points @ REWARD.linear - 0.5 * ((points @ REWARD.curvature) * points).sum(1)
    exponents = logs + rewards / weight
    log_z = np.logaddexp.reduce(exponents)
    q = np.exp(exponents - log_z)
    tilt, found_log_z = BASE.tilted(REWARD, weight)
    assert found_log_z == pytest.approx(log_z, abs=1e-9)
    mean = q @ points
    np.testing.assert_allclose(tilt.mean, mean, atol=1e-9)
    np.testing.assert_allclose(tilt.covariance, (q * (points - mean).T) @ (points - mean), atol=1e-9)
    assert tilt.expected(REWARD) == pytest.approx(q @ rewards, abs=1e-9)
    assert BASE.paid(REWARD, weight) == pytest.approx(q @ (rewards / weight) - log_z, abs=1e-9)
    theirs = closed_forms.Mixture.of(*ARRAYS).tilted(
        closed_forms.Quadratic(REWARD.linear, REWARD.curvature), weight
    )
    np.testing.assert_allclose(tilt.weights, theirs.weights.numpy(), atol=1e-12)
    np.testing.assert_allclose(tilt.covariances, theirs.covariances.numpy(), atol=1e-12)


@pytest.mark.parametrize("nats", [0.5, 10.0])
def test_contexts_pay_the_nats_on_average(nats: float) -> None:
    weight = weight_at([BASE, OTHER], REWARD, nats)
    assert np.mean([each.paid(REWARD, weight) for each in (BASE, OTHER)]) == pytest.approx(nats, rel=1e-9)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.9])
def test_the_flow_is_the_exact_one_of_each_context(time: float) -> None:
    flow = MixtureFlow(Linear(), [BASE, OTHER])
    x, context = torch.randn(50, 2, dtype=torch.float64), torch.arange(50) % 2
    t = torch.tensor(time, dtype=torch.float64)
    for own in (flow.velocity(x, t, context), flow.velocity(x, t.expand(50), context)):
        for k, base in enumerate((BASE, OTHER)):
            distribution = closed_forms.Mixture.of(base.weights, base.means, base.covariances)
            exact = closed_forms.MixtureFlow(Linear(), distribution).velocity(x, t)
            torch.testing.assert_close(own[context == k], exact[context == k], rtol=1e-9, atol=1e-9)
    for found, base in zip(flow.mixtures(), (BASE, OTHER), strict=True):
        np.testing.assert_allclose(found.covariances, base.covariances, atol=1e-12)


def test_errors_are_none_at_the_tilt_and_whole_at_the_base() -> None:
    weight, exact = 0.5, [base.tilted(REWARD, 0.5)[0] for base in (BASE, OTHER)]
    row = [{"network_passes": 7.0, "effective_sample_size": 3.0}] * 2

    def arrived(*problem: Any) -> tuple[Solution, int]:
        return Solution(MixtureFlow(Linear(), exact), row), 5

    def stayed(base: MixtureFlow, *problem: Any) -> tuple[Solution, int]:
        return Solution(copy.deepcopy(base), row, {"stages": 2.0}), 5

    def diverged(*problem: Any) -> tuple[Solution, int]:
        raise TrainingDiverged("it did")

    found = solved([BASE, OTHER], REWARD, weight, arrived, torch.Generator())
    assert [found[key] for key in ERRORS] == pytest.approx([0, 0, 0], abs=1e-12)
    assert [found[key] for key in COSTS] == [1, 5, 2, 7]
    assert found["effective_samples"] == 3
    found = solved([BASE, OTHER], REWARD, weight, stayed, torch.Generator())
    assert found["mean_error"] == pytest.approx(1)
    assert found["stages"] == 2
    found = solved([BASE, OTHER], REWARD, weight, diverged, torch.Generator())
    assert found["mean_error"] is None
    assert found["ended"] == "it did"


def test_annealed_fitting_gets_where_one_bank_of_the_same_size_does_not() -> None:
    """In contexts, at 5 nats; a stage keeps 6,000 effective samples of a bank, one bank alone a handful."""
    changes = {
        "nats": [5],
        "adjoint": {"updates": 1, "batch": 2, "steps": 2},
        "fitting": {"bank": 20_000, "updates": 100, "batch": 512, "learning_rate": 0.05},
    }
    config = load_theory(FILE, changes)
    assert isinstance(config, TiltStudyConfig)
    problem = {"gaussian_in_contexts": config.problems["gaussian_in_contexts"]}
    rows = study(config.model_copy(update={"problems": problem}))["tilts"]
    _, weighted, annealed = rows
    assert [row["solver"] for row in (weighted, annealed)] == ["weighted_fitting", "annealed_fitting"]
    assert annealed["mean_error"] < 0.1 < 0.2 < weighted["mean_error"]
    assert weighted["effective_samples"] < 200 < 5000 < annealed["effective_samples"]
    assert annealed["samples"] == 20_000 * (annealed["stages"] + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"curvature": [[0.0, 1.0], [0.0, 0.0]]}, "curvature must be symmetric"),
        ({"curvature": [[-1.0, 0.0], [0.0, 0.0]]}, "without negative eigenvalues"),
        ({"contexts": []}, "contexts"),
        (
            {"contexts": [{"weights": [1], "means": [[0, 0]], "covariances": [[[1, 2], [2, 1]]]}]},
            "contexts.0: .*covariances must be symmetric and positive definite",
        ),
        (
            {"contexts": [{"weights": [1, 1], "means": [[0, 0]], "covariances": [[[1, 0], [0, 1]]]}]},
            "contexts.0: .*one entry per component",
        ),
    ],
)
def test_bad_tilts_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_theory(FILE, {"problems": {"gaussian": change}})
    assert "problems.gaussian" in str(caught.value)
