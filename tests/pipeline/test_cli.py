"""The command line: every stage in a row, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from by_hand import Folder
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.pipeline.cli import _parser, main
from small import tiny

OWN = (
    *("doctor", "resolve", "check", "table", "figures", "compare", "costs", "theory", "theory-report"),
    *("provenance", "versions", "page", "overview", "config-reference"),
)
OF_DOMAINS = (
    *("pretrain", "density", "offline", "threshold", "finetune", "keep", "measure", "resolution", "exact"),
    *("data", "sample", "evaluate", "fetch", "model", "pretrain-pipeline", "pretrain-alignment"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path, tiny())
    assert made.run("pretrain") == 0
    return made


def test_stages_are_those_of_the_domains_and_its_own() -> None:
    (subcommands,) = (action for action in _parser([])._actions if isinstance(action.choices, dict))
    assert {*subcommands.choices} == {*OWN, *OF_DOMAINS}
    assert len(subcommands.choices) == len(OWN) + len(OF_DOMAINS)


@pytest.mark.parametrize("stage", [*OWN, *OF_DOMAINS])
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([stage, "--help"])
    assert stopped.value.code == 0
    assert f"flowtilt {stage}" in capsys.readouterr().out


def test_all_stages_in_a_row(folder: Folder) -> None:
    for stage in ("density", "offline"):
        assert folder.run(stage) == 0
    tuned = [method for method, config in folder.experiment.methods.items() if config.tuned]
    kept = [method for method, config in folder.experiment.methods.items() if config.keeps]
    assert tuned == ["am", "fdc", "tfft", "am_annealed", "tfft_annealed"]
    for method in ("tfft", "tfft_annealed"):
        assert folder.run("threshold", method) == 0
    assert json.loads(folder.file("tfft", "threshold.json").read_text())["offline_active_share"] > 0
    for method in tuned:
        assert folder.finetune(method) == 0
    rows = folder.rows()
    for method in tuned:
        assert {"worst_1pct_cost", "mean_cost", "kl", "objective", "active_share"} <= rows[method].keys()
    for method in kept:
        assert {"worst_1pct_cost", "mean_cost", "kl", "objective", "sample_passes"} <= rows[method].keys()
    assert folder.run("exact") == 1  # without a resolution
    assert folder.run("resolution") == 0
    assert folder.run("exact") == 0
    exact = solved(folder, "exact")
    assert set(exact) == {"pretrained_exact", *(f"{method}_exact" for method in [*tuned, *kept])}
    assert exact["am_annealed_exact"] == exact["am_exact"]  # networks differ, and what they aim at does not
    resolved = solved(folder, "resolved")
    assert set(resolved) == {"pretrained_resolved", *(f"{method}_resolved" for method in tuned)}
    width = folder.path / "resolution.json"
    found = json.loads(width.read_text())
    width.write_text(json.dumps({**found, "width": 2 * found["width"] + 0.2}))
    assert folder.run("exact") == 0
    assert solved(folder, "exact") == exact
    assert solved(folder, "resolved") != resolved
    assert not list(folder.path.rglob("*.tmp*"))


def solved(folder: Folder, solution: str) -> dict[str, dict[str, float]]:
    """The rows that are solved on the grid."""
    rows: dict[str, dict[str, float]] = json.loads(folder.file(solution, "metrics.json").read_text())["rows"]
    return rows


def test_the_same_seed_gives_the_same_bytes(folder: Folder) -> None:
    assert folder.finetune("am") == 0
    first = folder.file("am", "model.safetensors").read_bytes()
    assert folder.finetune("am") == 0
    assert folder.file("am", "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("how", "solver"),
    [
        ({"step": 0.25}, "adjoint_matching"),
        ({"by": "exponents"}, "adjoint_matching"),
        ({"by": "exponents"}, "weighted_fitting"),
        ({"by": "exponents", "step": 0.25}, "annealed_fitting"),
    ],
)
def test_a_continued_fdc_is_the_same_as_an_uninterrupted_one(
    tmp_path: Path, how: dict[str, Any], solver: str
) -> None:
    """By exponents too, which the file of the earlier model has; by every solver."""
    own = {"kind": "fdc", **how, "solver": {"kind": solver, "bank": 500}}
    methods = {
        "half": {**own, "iterations": 1},
        "rest": {**own, "iterations": 2, "continue_from": "half"},
        "fdc": {"step": None, "by": None, **own, "iterations": 2},
    }
    folder = Folder(tmp_path, tiny(methods=methods))
    assert folder.run("pretrain") == 0
    assert folder.finetune("half") == 0
    assert folder.finetune("rest") == 0
    assert folder.finetune("fdc") == 0
    rest, whole = (folder.file(method, "model.safetensors").read_bytes() for method in ("rest", "fdc"))
    assert rest == whole


def test_the_offline_batch_is_the_bank_of_all_that_starts_from_the_pretrained_model(tmp_path: Path) -> None:
    """Its rewards are what first stages, weighted fits and FDC's first step have seen, and they draw none."""
    fitted = {"bank": 400, "bank_steps": 3, "share": 0.5}
    annealed = {"kind": "annealed_fitting", "stages": 1, **fitted}
    methods = {
        "am": {"solver": {"kind": "weighted_fitting", **fitted, "minimum_ess": 1}},
        "tfft": {"solver": annealed},
        "am_annealed": {"solver": {**annealed, "minimum_ess": 1}},
        "fdc": {"iterations": 1, "updates": None, "solver": annealed},
    }
    folder = Folder(tmp_path, tiny(methods=methods, objective={"alpha": 20.0}))
    assert folder.run("pretrain") == 0
    assert folder.run("offline") == 0
    rewards = np.load(folder.base / "offline.npz")["reward"].astype(np.float64)
    rows = {}
    for method in ("am", "tfft", "am_annealed", "fdc"):
        if method == "tfft":
            assert folder.run("threshold", method) == 0
        assert folder.finetune(method) == 0
        rows[method] = pd.read_csv(folder.file(method, "history.csv"))
    for method in ("tfft", "am_annealed"):
        assert rows[method]["mean_before"][0] == pytest.approx(rewards.mean(), rel=1e-6)
    assert rows["fdc"]["utility"][0] == pytest.approx(lower_tail_mean(rewards, 0.01), rel=1e-6)
    own = json.loads(folder.file("tfft", "threshold.json").read_text())["threshold"]
    assert rows["tfft"]["parameter"][0] == pytest.approx(own, rel=1e-6)  # of the same batch
    # Nothing has gone through the network but the updates' own samples, 16 each.
    for method in ("am", "tfft", "am_annealed"):
        per_update = rows[method]["network_passes"].diff().dropna().unique()
        assert rows[method]["network_passes"][0] == per_update[0] <= 16 * 4


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Check a failed command: non-zero, one message with the words, no traceback."""
    message = capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in message
    for word in words:
        assert word in message
    return message


def test_missing_checkpoint(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.model.unlink()
    fails(
        capsys,
        folder.finetune("am"),
        "pretrained/seed0/model.safetensors",
        "no such checkpoint",
        "run the stage",
    )
    assert not folder.file("am", "model.safetensors").exists()


def test_truncated_checkpoint(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.model
    file.write_bytes(file.read_bytes()[:-100])
    fails(
        capsys,
        folder.finetune("am"),
        "pretrained/seed0/model.safetensors",
        "not a complete safetensors file",
        "delete it",
    )


def test_checkpoint_of_another_network(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write(tiny(network={"widths": [16, 32]}))
    fails(
        capsys,
        folder.finetune("am"),
        "pretrained/seed0/model.safetensors",
        "section network",
        "(16,)",
        "(32,)",
    )


def test_a_failed_run_leaves_the_earlier_result(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder.finetune("am") == 0
    before = folder.file("am", "model.safetensors").read_bytes()
    folder.model.write_bytes(b"")
    fails(capsys, folder.finetune("am"), "pretrained/seed0/model.safetensors")
    assert folder.file("am", "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "method", "words"),
    [
        ("finetune", "ppo", "unknown method 'ppo'; it has am, fdc, tfft"),
        ("finetune", "", "the stage finetune is of a method; give it --method, one of: am, fdc, tfft"),
        ("finetune", "pretrained", "method 'pretrained' has no finetune; those that have: am, fdc, tfft"),
        ("threshold", "am", "method 'am' has no threshold; those that have: tfft"),
        ("evaluate", "am", "planar has no stage evaluate; it has pretrain, density, offline, threshold"),
    ],
)
def test_a_run_that_a_stage_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, method: str, words: str
) -> None:
    fails(capsys, Folder(tmp_path, tiny()).run(stage, method), "experiment risk_averse_2d: ", words)


def test_a_stage_of_a_seed_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Folder(tmp_path, tiny()).config
    words = ["pretrain", str(config), "--results", str(tmp_path)]
    fails(capsys, main(words), "the stage pretrain is of a seed; give it --seed")


def test_a_threshold_that_is_not_there(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, folder.finetune("tfft"), "threshold.json", "run the threshold stage first")


def test_bad_level_and_alpha_reach_the_user_whole(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = yaml.safe_load(folder.config.read_text())
    data["objective"]["mass"] = 1.5
    folder.config.write_text(yaml.safe_dump(data))
    fails(capsys, folder.finetune("am"), str(folder.config), "objective.mass", "less than 1")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("torch.full((len(x),), float('nan'))", ["not finite on", "make it finite"]),
        ("x", ["returned shape", "one number a sample"]),
    ],
)
def test_bad_rewards(
    body: str,
    words: list[str],
    folder: Folder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"bad_{abs(hash(body))}"
    (folder.path / f"{name}.py").write_text(
        "import torch\n"
        "from flowtilt.domains.planar.landscapes import Stripes\n"
        f"class Bad(Stripes):\n    def value(self, x, context=None):\n        return {body}\n"
    )
    monkeypatch.syspath_prepend(str(folder.path))
    folder.write(tiny(reward={"landscape": f"{name}:Bad"}))
    fails(capsys, folder.finetune("am"), "reward Bad", *words)
    assert not folder.file("am", "model.safetensors").exists()


def test_unknown_landscape_module(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write(tiny(reward={"landscape": "no_such_module:Hills"}))
    fails(capsys, folder.finetune("am"), "reward.landscape", "no_such_module", "PYTHONPATH")


def test_a_loss_that_is_not_finite_names_its_step(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write(tiny(solver={"learning_rate": 1e30, "updates": 50}))
    fails(capsys, folder.finetune("am"), "at update", "of 50", "lower learning_rate")
    assert not folder.file("am", "model.safetensors").exists()


def test_files_of_other_stages_are_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    threshold = folder.file("tfft", "threshold.json")
    threshold.parent.mkdir(parents=True)
    threshold.write_text('{"threshold": null}')
    fails(capsys, folder.finetune("tfft"), "threshold.json", "not a threshold file")
    assert folder.run("density") == 0
    samples = folder.file("am", "samples.npz")
    samples.parent.mkdir(parents=True)
    np.savez(samples, y=np.zeros((3, 2)))
    fails(capsys, folder.run("resolution"), "samples.npz", "not a complete file")


def test_handlers_of_the_root_logger_repeat_nothing(tmp_path: Path) -> None:
    """As libraries set them up: each message once."""
    code = "import logging; logging.basicConfig(level=logging.DEBUG)"
    code += "; from flowtilt.pipeline.cli import run; raise SystemExit(run())"
    words = ["page", tmp_path / "no.csv", "--output", tmp_path / "no.html"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("page: ")
    assert len(done.stderr.splitlines()) == 1
