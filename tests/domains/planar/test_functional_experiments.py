"""The stages of the experiments on functionals, in a row and at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from by_hand import pretrained
from flowtilt import thresholds
from flowtilt.domains.planar.build import build_data, build_model, build_slope
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.files import read_density
from flowtilt.domains.planar.grid import Grid, finite_distribution
from flowtilt.domains.planar.optimum import mirror_iterates
from flowtilt.domains.planar.problems import build_objective
from flowtilt.metrics.transport import sliced_wasserstein
from flowtilt.pipeline.configuration import ConfigError, merge
from flowtilt.pipeline.experiment import load_file
from small import CONFIG, TINY, in_plane, tiny

SMALL = {"grid": {"cells": 16}}


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["adjoint_matching", "weighted_fitting"])
def test_transport_in_a_row(tmp_path: Path, solver: str) -> None:
    critic = {"updates": 20}
    fdc = {"iterations": 2, "objective": {"divergence": {"kind": "wasserstein1", "critic": critic}}}
    experiment = tiny(
        "ot_2d",
        **SMALL,
        solver={"kind": solver, "bank": 1000},
        methods={"fdc_dA": fdc},
        # However short its training, a critic is a lower estimate.
        evaluation={"transport": {"samples": 100, "critic_updates": 50}},
    )
    folder = pretrained(tmp_path, experiment)
    for method in ("am", "fdc_dA"):
        assert folder.finetune(method) == 0
    rows = folder.rows()
    for method in ("am", "fdc_dA"):
        row = rows[method]
        shift = row["horizontal_shift"] / row["vertical_shift"]
        assert row["horizontal_over_vertical_shift"] == pytest.approx(shift)
        # A critic is a lower estimate of the exact distance between the same samples.
        for metric in ("dA", "dB"):
            assert row[f"w1_{metric}_critic"] <= row[f"w1_{metric}"] * (1 + 1e-5)
        assert {"functional", "mean_reward", "kl", "active_share"} <= row.keys()
    history = folder.file("fdc_dA", "history.csv").read_text()
    assert ("effective_sample_size" in history) == (solver == "weighted_fitting")
    assert rows.keys() - experiment.methods.keys() == {
        *(f"{m}_exact" for m in experiment.methods),
        *(f"{m}_optimum" for m in experiment.methods if m != "pretrained"),
    }
    for method in ("am", "fdc_dA", "fdc_dB"):
        before, exact, optimum = (
            rows[f"{method}_exact"]["functional_before"],
            rows[f"{method}_exact"]["functional"],
            rows[f"{method}_optimum"]["functional"],
        )
        assert before < exact <= optimum + 1e-9
    # One exact step of am is its optimum.
    assert rows["am_exact"]["functional"] == pytest.approx(rows["am_optimum"]["functional"], rel=1e-5)


@pytest.mark.parametrize("utility", [{"kind": "cvar", "mass": 0.8}, {"kind": "sq", "mass": 0.5}])
def test_a_tail_in_a_row(tmp_path: Path, utility: dict[str, Any]) -> None:
    """The threshold of an offline batch, one solve by either solver, and an exact row that is the optimum."""
    weighted = {"kind": "weighted_fitting", "bank": 1000, "learning_rate": 0.004}
    problem = {"utility": utility, "divergence": {"kind": "kl"}, "alpha": 8.0}
    experiment = tiny(
        "ot_2d",
        **SMALL,
        objective=problem,
        methods={
            "am": {"kind": "tfft", "objective": {**problem, "alpha": 9.0}},
            "weighted": {"kind": "tfft", "solver": weighted},
        },
        evaluation={"transport": None},
    )
    of_the_tail = {m: experiment.methods[m] for m in ("pretrained", "am", "weighted")}
    experiment = experiment.model_copy(update={"methods": of_the_tail})
    folder = pretrained(tmp_path, experiment)
    offline = folder.base / "offline.npz"
    assert folder.run("offline") == 0
    rewards = np.load(offline)["reward"]
    assert folder.finetune("weighted") == 1  # without a threshold
    for method, alpha in (("am", 9.0), ("weighted", 8.0)):
        file = folder.file(method, "threshold.json")
        assert folder.run("threshold", method) == 0
        said = json.loads(file.read_text())
        tail = "lower" if utility["kind"] == "cvar" else "upper"
        mass = 0.8 if tail == "lower" else 0.5
        assert said["threshold"] == thresholds.threshold(rewards, alpha, mass, tail)  # type: ignore[arg-type]
        assert folder.finetune(method) == 0
        history = folder.file(method, "history.csv").read_text()
        assert ("effective_sample_size" in history) == (method == "weighted")
    rows = folder.rows()
    for method in ("am", "weighted"):
        assert {"functional", "threshold", "offline_active_share", "active_share"} <= rows[method].keys()
    for method in ("am", "weighted"):
        exact, optimum = rows[f"{method}_exact"], rows[f"{method}_optimum"]
        assert exact["functional"] == optimum["functional"] > exact["functional_before"]


def test_a_method_s_own_solver_decides_what_it_takes_of_a_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward without a gradient will do for weighted fitting, and for no other method."""
    from flowtilt.domains.planar.problems import check_problems

    (tmp_path / "rough_rewards.py").write_text(
        "from flowtilt.domains.planar.landscapes import Slope\n"
        "class Rough(Slope):\n    differentiable = False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    landscape = {"landscape": "rough_rewards:Rough"}
    changes = {method: {"solver": {"kind": "weighted_fitting"}} for method in ("am", "fdc_dA", "fdc_dB")}
    check_problems(tiny("ot_2d", **SMALL, reward=landscape, methods=changes))  # type: ignore[arg-type]
    for method in changes:
        one = {**changes, method: {"solver": {"kind": "adjoint_matching"}}}
        with pytest.raises(ConfigError, match="needs the gradient of the reward"):
            check_problems(tiny("ot_2d", **SMALL, reward=landscape, methods=one))  # type: ignore[arg-type]


def test_the_network_row_of_the_pretrained_model_is_its_own_grid_row(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, tiny("entropy_2d", **SMALL))
    solved = folder.rows()
    row = solved["pretrained"]
    assert row["functional"] == solved["pretrained_exact"]["functional"]
    # A network of twenty updates is off by more than the floor's depth.
    assert row["kl"] == 0 < row["floored_mass"] == solved["pretrained_exact"]["floored_mass"] < 1
    assert {"entropy", "entropy_likelihood", "coverage", "outside"} <= row.keys()
    entropies = [solved[f"fdc_alpha_{a}_exact"]["entropy_likelihood"] for a in (0.5, 0.25, 0.1, 0.05, "0.0")]
    assert entropies == sorted(entropies)


def test_coverage_is_the_cell_of_the_lightest_component() -> None:
    """Of a point nearer to (3, 3) than to the origin, and a point that is not."""
    from flowtilt.domains.planar.distributions import Cloud, coverage

    points = np.array([[1.6, 1.5], [1.4, 1.5], [3.0, 3.0]])
    cloud = Cloud(points, np.array([0.2, 0.5, 0.3]), np.zeros(3))
    assert coverage(tiny("entropy_2d"), cloud) == pytest.approx(0.5)  # type: ignore[arg-type]
    assert coverage(tiny("ot_2d"), cloud) is None  # type: ignore[arg-type]


def test_a_stage_for_tails_refuses_other_functionals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrained(tmp_path, tiny("entropy_2d", **SMALL))
    assert folder.run("exact") == 1
    assert "the stage exact is not for experiments of its kind" in capsys.readouterr().err


def test_runs_on_tails_are_measured_together_too(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, tiny())
    assert folder.finetune("am") == 0
    tuned = {m: folder.experiment.methods[m] for m in ("am", "pretrained")}  # in any order
    folder.write(folder.experiment.model_copy(update={"methods": tuned}))
    assert folder.run("measure") == 0
    (row,) = json.loads(folder.file("am", "metrics.json").read_text())["rows"].values()
    assert {"worst_1pct_cost", "kl", "floored_mass", "active_share", "dominance_violation"} <= row.keys()


def test_methods_of_one_step_share_their_noise(tmp_path: Path) -> None:
    """With alpha 0.5 given twice the two methods are one: they end in the same weights."""
    same = {"kind": "fdc", "iterations": 1, "step_weight": 2.0}
    methods = {"a": same, "b": {**same, "objective": {"alpha": 0.5}}}
    folder = pretrained(tmp_path, tiny("entropy_2d", **SMALL, methods=methods))
    assert folder.finetune("a") == 0
    assert folder.finetune("b") == 0
    first, second = (folder.file(method, "model.safetensors").read_bytes() for method in "ab")
    assert first == second


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("solver", ["adjoint_matching", "weighted_fitting"])
def test_modes_in_a_row(tmp_path: Path, solver: str) -> None:
    """Every stage of a model with modes, by either solver; what is solved keeps them equally likely."""
    reward = {"landscape": "slope", "height": 35.0, "middle": 1.0, "softness": 4.0}
    # Modes far enough apart that the small network of a few updates has learned which is which.
    data = {"means": [[-1.5, 0.0], [1.5, 0.0]]}
    pretrain = {"updates": 150, "batch": 256, "learning_rate": 0.01}
    changes = {"reward": reward, "data": data, "pretrain": pretrain, "solver": {"kind": solver, "bank": 500}}
    experiment = tiny("modes_2d", **SMALL, **changes, methods={"fdc": {"iterations": 2}})
    folder = pretrained(tmp_path, experiment)
    assert np.load(folder.base / "density.npz")["log_density"].shape == (2, 16, 16)
    offline = folder.base / "offline.npz"
    assert folder.run("offline") == 0
    assert np.load(offline)["x"].shape == (500, 2)
    assert folder.finetune("fdc") == 0
    rows = folder.rows()

    samples = np.load(folder.file("pretrained", "samples.npz"))
    left, right = (samples["x"][samples["mode"] == k, 0].mean() for k in (0, 1))
    assert left < -0.5 < 0.5 < right
    # The samples' own log-densities, given their modes, against the gridded ones: as coarse as the grid.
    gridded = read_density(folder.base / "density.npz")
    own = samples["log_density"]
    known = ~gridded.floored_at(samples["x"][: len(own)], samples["mode"][: len(own)])
    away = own - gridded.at(samples["x"][: len(own)], samples["mode"][: len(own)])
    assert abs(away[known].mean()) < 0.1
    assert rows["pretrained"]["kl"] == 0
    assert rows["pretrained"]["functional"] == rows["pretrained_exact"]["functional"]
    assert {"functional", "grid_mass", "mean_reward", "kl", "active_share"} <= rows["fdc"].keys()
    distributions = np.load(folder.file("fdc", "distributions.npz"))
    assert distributions["fdc_optimum"].shape == (16, 16)
    assert float(distributions["fdc_optimum"].sum()) == pytest.approx(1, abs=1e-6)
    exact, optimum = rows["fdc_exact"], rows["fdc_optimum"]
    assert exact["functional_before"] < exact["functional"] <= optimum["functional"] + 1e-9
    assert optimum["slack"] < 1e-5


# ------------------------------------------------------------------------- the released script


def test_the_script_s_problem_is_in_its_own_units_and_on_the_models_of_ot_2d() -> None:
    ((script,), (other,)) = (
        load_file(CONFIG / "experiments" / f"{name}.yaml").values() for name in ("ot_script_2d", "ot_2d")
    )
    assert isinstance(script, FunctionalExperiment)
    assert script.starts_from == other.name
    for key in ("path", "network", "data", "pretrain"):
        assert getattr(script, key) == getattr(other, key)
    reward, y = build_slope(script), 4 * torch.randn(50, 2, dtype=torch.float64)
    assert reward is not None
    torch.testing.assert_close(reward(y), (17.5 + 3.125 * y).norm(dim=1), rtol=1e-12, atol=1e-12)
    unit = np.diff([5.0, 30.0]) / (2 * script.grid.extent)
    np.testing.assert_allclose(script.objective.divergence.parameters["weights"], unit**2 * np.array([1, 7]))


def test_exact_steps_of_the_script_s_weight_are_finite_and_bend_along_x() -> None:
    """The first does not feel the kink of W1: variance times slope over the weight, along both axes."""
    (script,) = load_file(CONFIG / "experiments" / "ot_script_2d.yaml").values()
    assert isinstance(script, FunctionalExperiment)
    grid = Grid(script.grid.extent, 16)
    start = finite_distribution(grid, build_data(script).log_density(grid.points))
    objective = build_objective(script, "fdc", build_model(script))
    steps = mirror_iterates(objective, start, 40.0, 4)
    values = [objective.finite_value(p) for p in (start, *steps)]
    assert values == sorted(values)
    shifts = [p.p @ grid.flat_points.numpy() for p in steps]
    np.testing.assert_allclose(shifts[0], 3.125 / np.sqrt(2) / 40, rtol=0.02)
    assert shifts[-1][0] > 3 * abs(shifts[-1][1])
    assert 0.1 < shifts[-1][0] < 4 * shifts[0][0]


# ------------------------------------------------------------------------------------- rings


def test_samples_on_two_rings_are_held_against_the_optimum_on_the_grid(tmp_path: Path) -> None:
    """An optimum has no distance from itself; am's own problem is another than the experiment's."""
    file, skip = CONFIG / "experiments" / "two_rings_2d.yaml", {"two_rings_2d": {"methods": OTHERS}}
    (experiment,) = load_file(file, {**in_plane(**merge(TINY, SMALL)), "skip": skip}).values()
    folder = pretrained(tmp_path, experiment)
    assert folder.run("offline") == folder.run("threshold", "tfft") == folder.finetune("tfft") == 0
    rows = folder.rows()
    assert rows["tfft_optimum"]["sliced_w2"] == rows["tfft_exact"]["sliced_w2"] == 0
    assert rows["am_optimum"]["sliced_w2_own"] == 0 < rows["am_optimum"]["sliced_w2"]
    assert "sliced_w2_own" not in rows["tfft"]
    assert rows["pretrained_exact"]["sliced_w2"] > 0
    x = np.load(folder.file("am", "samples.npz"))["x"]
    cells = np.load(folder.file("tfft", "distributions.npz"))
    points = np.stack(np.meshgrid(cells["axis"], cells["axis"], indexing="ij"), -1).reshape(-1, 2)
    weights = cells["tfft_optimum"].astype(float).ravel()
    found = sliced_wasserstein(x, points, None, weights / weights.sum(), 60)
    assert rows["am"]["sliced_w2"] == pytest.approx(found, rel=1e-4)


OTHERS = [
    *("am_weighted", "am_annealed", "tfft_weighted", "tfft_annealed"),
    *("fdc", "fdc_weighted", "fdc_annealed"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": {"height": 1.0}}, "rings has no height; remove it"),
        ({"reward": {"radius": None}}, "rings needs radius; add it"),
        ({"reward": {"landscape": "ring"}}, "must be slope, rings, cone or module:Class"),
    ],
)
def test_rings_that_cannot_be_used_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny("two_rings_2d", **changes)


def test_the_optimum_of_the_experiment_is_that_of_its_pretrained_method() -> None:
    file, skip = CONFIG / "experiments" / "two_rings_2d.yaml", {"two_rings_2d": {"methods": ["pretrained"]}}
    with pytest.raises(ConfigError, match=r"add methods\.pretrained"):
        load_file(file, {"skip": skip})
