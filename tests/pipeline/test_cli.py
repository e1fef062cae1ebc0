"""The command line: every stage in a row, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.experiment import Experiment, dump
from small import tiny

STAGES = (
    *("resolve", "calibrate", "pretrain", "density", "offline", "threshold", "finetune", "sample"),
    *("evaluate", "exact", "resolution", "measure", "table", "compare", "figures", "provenance"),
    *("theory", "theory-report", "costs", "config-reference"),
    *(f"molecules-{stage}" for stage in ("data", "pretrain", "offline", "threshold", "finetune")),
    *("molecules-sample", "molecules-evaluate"),
)


class Folder:
    """A results folder driven by hand, one command a stage."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.config.write_text(dump(experiment))

    def run(self, stage: str, **options: Any) -> int:
        words = [stage, str(self.config)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return main(words)

    def file(self, name: str) -> Path:
        return self.path / name

    def pretrain(self) -> None:
        options = {"seed": 0, "output": self.file("pre.safetensors"), "history": self.file("pre.csv")}
        assert self.run("pretrain", **options) == 0

    def finetune(self, method: str, **more: Any) -> int:
        model, history = self.file(f"{method}.safetensors"), self.file(f"{method}.csv")
        base = self.file("pre.safetensors")
        return self.run(
            "finetune", method=method, seed=0, pretrained=base, output=model, history=history, **more
        )


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path, tiny())
    made.pretrain()
    return made


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([stage, "--help"])
    assert stopped.value.code == 0
    assert f"flowtilt {stage}" in capsys.readouterr().out


def test_all_stages_in_a_row(folder: Folder) -> None:
    pre, density, offline = folder.file("pre.safetensors"), folder.file("density.npz"), folder.file("off.npz")
    threshold = folder.file("threshold.json")
    assert folder.run("density", model=pre, output=density) == 0
    assert folder.run("offline", seed=0, model=pre, output=offline) == 0
    assert folder.run("threshold", method="tfft", offline=offline, output=threshold) == 0
    assert json.loads(threshold.read_text())["offline_active_share"] > 0
    for method, more in (("am", {}), ("fdc", {}), ("tfft", {"threshold": threshold})):
        assert folder.finetune(method, **more) == 0
        samples = folder.file(f"{method}.npz")
        model = folder.file(f"{method}.safetensors")
        assert folder.run("sample", method=method, seed=0, model=model, output=samples) == 0
        metrics = folder.file(f"{method}.json")
        history = folder.file(f"{method}.csv")
        options = {"samples": samples, "density": density, "history": history, "output": metrics}
        assert folder.run("evaluate", method=method, **options) == 0
        row = json.loads(metrics.read_text())["rows"][method]
        assert {"worst_1pct_cost", "mean_cost", "kl", "objective", "active_share"} <= row.keys()
    exact, laws = folder.file("exact.json"), folder.file("laws.npz")
    assert folder.run("exact", density=density, output=exact, laws=laws) == 0
    rows = json.loads(exact.read_text())["rows"]
    assert set(rows) == {"pretrained_exact", "am_exact", "fdc_exact", "tfft_exact"}
    resolution = folder.file("resolution.json")
    words = ["--config", folder.config, "--samples", folder.file("am.npz"), "--density", density]
    assert main(["resolution", *map(str, words), "--output", str(resolution)]) == 0
    resolved = folder.file("resolved.json")
    at_resolution = ["--resolution", resolution, "--resolved-output", resolved, "--resolved-laws", laws]
    words = ["exact", folder.config, "--density", density, "--output", exact, "--laws", laws, *at_resolution]
    assert main([*map(str, words)]) == 0
    assert json.loads(exact.read_text())["rows"] == rows
    assert set(json.loads(resolved.read_text())["rows"]) == {row.replace("exact", "resolved") for row in rows}
    assert main([*map(str, words[:-2])]) == 1
    assert not list(folder.path.glob("*.tmp*"))


def test_the_same_seed_gives_the_same_bytes(folder: Folder) -> None:
    assert folder.finetune("am") == 0
    first = folder.file("am.safetensors").read_bytes()
    assert folder.finetune("am") == 0
    assert folder.file("am.safetensors").read_bytes() == first


def test_a_continued_fdc_is_the_same_as_an_uninterrupted_one(tmp_path: Path) -> None:
    both = {
        "half": {"kind": "fdc", "iterations": 1, "step": 0.25},
        "rest": {"kind": "fdc", "iterations": 2, "step": 0.25, "continue_from": "half"},
    }
    folder = Folder(tmp_path, tiny(methods=both))
    folder.pretrain()
    assert folder.finetune("half") == 0
    assert folder.finetune("rest", start=folder.file("half.safetensors")) == 0
    assert folder.finetune("fdc") == 0
    rest, whole = folder.file("rest.safetensors"), folder.file("fdc.safetensors")
    assert rest.read_bytes() == whole.read_bytes()


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Check a failed command: non-zero, one message with the words, no traceback."""
    message = capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in message
    for word in words:
        assert word in message
    return message


def test_missing_checkpoint(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.file("pre.safetensors").unlink()
    fails(capsys, folder.finetune("am"), "pre.safetensors", "no such checkpoint", "run the stage")
    assert not folder.file("am.safetensors").exists()


def test_truncated_checkpoint(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.file("pre.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    fails(capsys, folder.finetune("am"), "pre.safetensors", "not a complete safetensors file", "delete it")


def test_checkpoint_of_another_network(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.config.write_text(dump(tiny(network={"widths": [16, 32]})))
    fails(capsys, folder.finetune("am"), "pre.safetensors", "section network", "(16,)", "(32,)")


def test_a_failed_run_leaves_the_earlier_result(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder.finetune("am") == 0
    before = folder.file("am.safetensors").read_bytes()
    folder.file("pre.safetensors").write_bytes(b"")
    fails(capsys, folder.finetune("am"), "pre.safetensors")
    assert folder.file("am.safetensors").read_bytes() == before


def test_unknown_method_and_wrong_kind(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, folder.finetune("ppo"), "unknown method 'ppo'", "it has pretrained, am, fdc, tfft")
    fails(capsys, folder.finetune("pretrained"), "'pretrained' is not fine-tuned")
    fails(capsys, folder.finetune("tfft"), "needs --threshold")


def test_bad_level_and_alpha_reach_the_user_whole(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = yaml.safe_load(folder.config.read_text())
    data["objective"]["level"] = 1.5
    folder.config.write_text(yaml.safe_dump(data))
    fails(capsys, folder.finetune("am"), str(folder.config), "objective.level", "less than 1")


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
    folder.file(f"{name}.py").write_text(
        "import torch\n"
        "from flowtilt.domains.planar.landscapes import Stripes\n"
        f"class Bad(Stripes):\n    def value(self, x, context=None):\n        return {body}\n"
    )
    monkeypatch.syspath_prepend(str(folder.path))
    folder.config.write_text(dump(tiny(reward={"landscape": f"{name}:Bad"})))
    fails(capsys, folder.finetune("am"), "reward Bad", *words)
    assert not folder.file("am.safetensors").exists()


def test_unknown_landscape_module(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.config.write_text(dump(tiny(reward={"landscape": "no_such_module:Hills"})))
    fails(capsys, folder.finetune("am"), "reward.landscape", "no_such_module", "PYTHONPATH")


def test_a_loss_that_is_not_finite_names_its_step(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.config.write_text(dump(tiny(solver={"learning_rate": 1e30, "updates": 50})))
    fails(capsys, folder.finetune("am"), "at update", "of 50", "lower learning_rate")
    assert not folder.file("am.safetensors").exists()


def test_files_of_other_stages_are_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    threshold = folder.file("threshold.json")
    threshold.write_text('{"threshold": null}')
    fails(capsys, folder.finetune("tfft", threshold=threshold), "threshold.json", "not a threshold file")
    samples = folder.file("samples.npz")
    np.savez(samples, x=np.zeros((3, 2)))
    density = folder.file("density.npz")
    assert folder.run("density", model=folder.file("pre.safetensors"), output=density) == 0
    options = {"samples": samples, "density": density, "output": folder.file("m.json")}
    fails(capsys, folder.run("evaluate", method="am", **options), "samples.npz", "not a complete file")


def test_the_log_file_holds_the_traceback(folder: Folder) -> None:
    folder.file("pre.safetensors").unlink()
    log = folder.file("run.log")
    assert folder.finetune("am", log=log) == 1
    assert "Traceback" in log.read_text()


def test_handlers_of_the_root_logger_repeat_nothing(tmp_path: Path) -> None:
    """As libraries set them up: each message once, and the advice is the last line, also in the log file."""
    code = "import logging; logging.basicConfig(level=logging.DEBUG)"
    code += "; from flowtilt.pipeline.cli import run; raise SystemExit(run())"
    words = ["page", tmp_path / "no.csv", "--output", tmp_path / "no.html", "--log", tmp_path / "log"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("page: ")
    assert len(done.stderr.splitlines()) == 1
    log = (tmp_path / "log").read_text()
    assert "Traceback" in log
    assert log.splitlines()[-1].endswith(done.stderr.strip())


def test_a_log_file_that_cannot_be_written_is_an_error_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["page", "no.csv", "--output", "no.html", "--log", str(tmp_path / "file" / "log")]) == 1
    assert str(tmp_path / "file") in caplog.text
