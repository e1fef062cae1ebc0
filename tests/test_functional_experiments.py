"""The stages of the experiments on functionals, in a row and at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowtilt import thresholds
from flowtilt.cli import main
from flowtilt.configuration import ConfigError
from flowtilt.domains.planar.landscapes import Slope
from flowtilt.experiment import Experiment, dump
from small import tiny

SMALL = {"grid": {"cells": 16}}


class Rough(Slope):
    """A reward that has no gradient to give."""

    differentiable = False


class Folder:
    """A results folder driven by hand, one command a stage."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self.experiment = path, experiment
        self.config = path / "config.yaml"
        self.config.write_text(dump(experiment))
        assert self.run("pretrain", seed=0, output="pre.safetensors", history="pre.csv") == 0
        assert self.run("density", model="pre.safetensors", output="density.npz") == 0

    def file(self, name: str) -> Path:
        return self.path / name

    def run(self, stage: str, **options: Any) -> int:
        words = [stage, str(self.config)]
        for name, value in options.items():
            is_file = Path(str(value)).suffix in (".npz", ".json", ".csv", ".safetensors")
            text = str(self.file(value)) if is_file else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        return main(words)

    def finetune(self, method: str, **more: str) -> int:
        self.run("sample", method="pretrained", seed=0, model="pre.safetensors", output="pre.npz")
        return self.run(
            "finetune",
            method=method,
            seed=0,
            pretrained="pre.safetensors",
            output="m.safetensors",
            history="m.csv",
            **more,
        )

    def row(self, method: str, **more: str) -> dict[str, float]:
        return self.rows(method, **more)[method]

    def rows(self, method: str, **more: str) -> dict[str, dict[str, float]]:
        """The network's row of a run and its solved ones."""
        model = "pre.safetensors" if method == "pretrained" else "m.safetensors"
        files = {"samples": "m.npz", "density": "density.npz", "output": "m.json", "laws": "l.npz"}
        assert self.run("measure", method=method, seed=0, model=model, **files, **more) == 0
        return json.loads(self.file("m.json").read_text())["rows"]

    def solved(self) -> dict[str, dict[str, float]]:
        """The solved rows of all methods, which do not depend on the run's own model."""
        if not self.file("m.safetensors").exists():
            self.file("m.safetensors").write_bytes(self.file("pre.safetensors").read_bytes())
        networks = self.experiment.methods
        found = {name: row for method in networks for name, row in self.rows(method).items()}
        return {name: row for name, row in found.items() if name not in networks}


@pytest.mark.parametrize("solver", ["adjoint_matching", "weighted_fitting"])
def test_transport_in_a_row(tmp_path: Path, solver: str) -> None:
    critic = {"updates": 20}
    fdc = {"iterations": 2, "objective": {"divergence": {"kind": "wasserstein1", "critic": critic}}}
    experiment = tiny(
        "ot_2d",
        **SMALL,
        solver={"kind": solver, "bank": 1000},
        methods={"fdc_dA": fdc},
        evaluation={"transport": {"samples": 100}},
    )
    folder = Folder(tmp_path, experiment)
    for method in ("am", "fdc_dA"):
        assert folder.finetune(method) == 0
        row = folder.row(method, history="m.csv", reference="pre.npz")
        shift = row["horizontal_shift"] / row["vertical_shift"]
        assert row["horizontal_over_vertical_shift"] == pytest.approx(shift)
        # A critic is a lower estimate of the exact distance between the same samples.
        for metric in ("dA", "dB"):
            assert row[f"w1_{metric}_critic"] <= row[f"w1_{metric}"] * (1 + 1e-5)
        assert {"functional", "mean_reward", "kl", "active_share"} <= row.keys()
    assert ("effective_sample_size" in folder.file("m.csv").read_text()) == (solver == "weighted_fitting")
    rows = folder.solved()
    assert set(rows) == {
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


@pytest.mark.parametrize("utility", [{"kind": "cvar", "level": 0.8}, {"kind": "sq", "level": 0.5}])
def test_a_tail_in_a_row(tmp_path: Path, utility: dict[str, Any]) -> None:
    """The threshold of an offline batch, one solve by either solver, and an exact row that is the optimum."""
    weighted = {"kind": "weighted_fitting", "bank": 1000, "learning_rate": 0.004}
    tail = {"utility": utility, "divergence": {"kind": "kl"}, "alpha": 8.0}
    experiment = tiny(
        "ot_2d",
        **SMALL,
        objective=tail,
        methods={
            "am": {"kind": "tfft", "objective": {**tail, "alpha": 9.0}},
            "weighted": {"kind": "tfft", "solver": weighted},
        },
        evaluation={"transport": {"samples": 100}},
    )
    folder = Folder(tmp_path, experiment)
    assert folder.run("offline", seed=0, model="pre.safetensors", output="off.npz") == 0
    rewards = np.load(folder.file("off.npz"))["reward"]
    assert folder.finetune("weighted") == 1  # without a threshold
    for method, alpha in (("am", 9.0), ("weighted", 8.0)):
        assert folder.run("threshold", method=method, offline="off.npz", output="t.json") == 0
        said = json.loads(folder.file("t.json").read_text())
        side = "lower" if utility["kind"] == "cvar" else "upper"
        mass = 0.8 if side == "lower" else 0.5
        assert said["threshold"] == thresholds.threshold(rewards, alpha, mass, side)  # type: ignore[arg-type]
        assert folder.finetune(method, threshold="t.json") == 0
        row = folder.row(method, history="m.csv", threshold="t.json")
        assert {"functional", "threshold", "offline_active_share", "active_share"} <= row.keys()
        assert ("effective_sample_size" in folder.file("m.csv").read_text()) == (method == "weighted")
    rows = folder.solved()
    for method in ("am", "weighted"):
        exact, optimum = rows[f"{method}_exact"], rows[f"{method}_optimum"]
        assert exact["functional"] == optimum["functional"] > exact["functional_before"]


def test_a_method_s_own_solver_decides_what_it_takes_of_a_reward() -> None:
    """A reward without a gradient will do for weighted fitting, and for no other method."""
    from flowtilt.domains.planar.problems import check_problems

    landscape = {"landscape": "test_functional_experiments:Rough"}
    changes = {method: {"solver": {"kind": "weighted_fitting"}} for method in ("am", "fdc_dA", "fdc_dB")}
    check_problems(tiny("ot_2d", **SMALL, reward=landscape, methods=changes))  # type: ignore[arg-type]
    for method in changes:
        one = {**changes, method: {"solver": {"kind": "adjoint_matching"}}}
        with pytest.raises(ConfigError, match="needs the gradient of the reward"):
            check_problems(tiny("ot_2d", **SMALL, reward=landscape, methods=one))  # type: ignore[arg-type]


def test_the_network_row_of_the_pretrained_model_is_its_own_grid_row(tmp_path: Path) -> None:
    folder = Folder(tmp_path, tiny("entropy_2d", **SMALL))
    row, solved = folder.row("pretrained"), folder.solved()
    assert row["functional"] == solved["pretrained_exact"]["functional"]
    assert {"entropy", "entropy_likelihood", "coverage", "outside"} <= row.keys()
    entropies = [solved[f"fdc_alpha_{a}_exact"]["entropy_likelihood"] for a in (0.5, 0.25, 0.1, 0.05, "0.0")]
    assert entropies == sorted(entropies)


def test_coverage_is_the_cell_of_the_lightest_component() -> None:
    """Of a point nearer to (3, 3) than to the origin, and a point that is not."""
    from flowtilt.domains.planar.laws import Cloud, coverage

    points = np.array([[1.6, 1.5], [1.4, 1.5], [3.0, 3.0]])
    cloud = Cloud(points, np.array([0.2, 0.5, 0.3]), np.zeros(3))
    assert coverage(tiny("entropy_2d"), cloud) == pytest.approx(0.5)  # type: ignore[arg-type]
    assert coverage(tiny("ot_2d"), cloud) is None  # type: ignore[arg-type]


def test_stages_refuse_experiments_of_the_other_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path, tiny("entropy_2d", **SMALL))
    assert folder.run("exact", density="density.npz", output="e.json", laws="e.npz") == 1
    assert "key objective must have tail" in capsys.readouterr().err
    folder.config.write_text(dump(tiny()))
    files = {"samples": "m.npz", "density": "density.npz", "output": "m.json", "laws": "l.npz"}
    assert folder.run("measure", method="pretrained", seed=0, model="pre.safetensors", **files) == 1
    assert "key objective must have utility" in capsys.readouterr().err


def test_methods_of_one_step_share_their_noise(tmp_path: Path) -> None:
    """With alpha 0.5 given twice the two methods are one: they end in the same weights."""
    same = {"kind": "fdc", "iterations": 1, "step_weight": 2.0}
    methods = {"a": same, "b": {**same, "objective": {"alpha": 0.5}}}
    folder = Folder(tmp_path, tiny("entropy_2d", **SMALL, methods=methods))
    assert folder.finetune("a") == 0
    first = folder.file("m.safetensors").read_bytes()
    assert folder.finetune("b") == 0
    assert folder.file("m.safetensors").read_bytes() == first


@pytest.mark.parametrize("solver", ["adjoint_matching", "weighted_fitting"])
def test_modes_in_a_row(tmp_path: Path, solver: str) -> None:
    """Every stage of a model with modes, by either solver; what is solved keeps them equally likely."""
    reward = {"landscape": "slope", "height": 35.0, "middle": 1.0, "softness": 4.0}
    # Modes far enough apart that the small network of a few updates has learned which is which.
    data = {"means": [[-1.5, 0.0], [1.5, 0.0]]}
    pretrain = {"updates": 150, "batch": 256, "learning_rate": 0.01}
    changes = {"reward": reward, "data": data, "pretrain": pretrain, "solver": {"kind": solver, "bank": 500}}
    experiment = tiny("modes_2d", **SMALL, **changes, methods={"fdc": {"iterations": 2}})
    folder = Folder(tmp_path, experiment)
    assert np.load(folder.file("density.npz"))["log_density"].shape == (2, 16, 16)
    assert folder.run("offline", seed=0, model="pre.safetensors", output="off.npz") == 0
    assert np.load(folder.file("off.npz"))["x"].shape == (500, 2)

    row = folder.row("pretrained")
    samples = np.load(folder.file("m.npz"))
    left, right = (samples["x"][samples["mode"] == k, 0].mean() for k in (0, 1))
    assert left < -0.5 < 0.5 < right
    # The samples' own log-densities, given their modes, against the gridded ones: as coarse as the grid.
    assert abs(row["kl"]) < 0.1
    solved = folder.solved()
    assert row["functional"] == solved["pretrained_exact"]["functional"]

    assert folder.finetune("fdc") == 0
    row = folder.row("fdc", history="m.csv")
    assert {"functional", "grid_mass", "mean_reward", "kl", "active_share"} <= row.keys()
    laws = np.load(folder.file("l.npz"))
    assert laws["fdc_optimum"].shape == (16, 16)
    assert float(laws["fdc_optimum"].sum()) == pytest.approx(1, abs=1e-6)
    rows = folder.solved()
    exact, optimum = rows["fdc_exact"], rows["fdc_optimum"]
    assert exact["functional_before"] < exact["functional"] <= optimum["functional"] + 1e-9
    assert optimum["slack"] < 1e-5
