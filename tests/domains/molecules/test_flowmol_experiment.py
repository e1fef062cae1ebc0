"""The stages of molecules with FlowMol as the base model, by a stand-in for its package, and bad input."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import flowmol_stand_in
from flowtilt.domains.molecules.flowmol_weights import convert_pretrained, load_flowmol
from flowtilt.pipeline.cli import main
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import dump
from small_molecules import tiny, write_molecules

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")
pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")

NAME = "qm9_gaussian"
METHODS = {
    "tfft": {"level": 0.8},
    "fdc": {"iterations": 2, "level": 0.5, "solver": {"pool": 8}},
    "am_fitted": {"kind": "am", "solver": {"kind": "weighted_fitting", "bank": 100, "bank_steps": 20}},
}


class Folder:
    """Converted weights, an experiment that begins with them, and its files."""

    def __init__(self, path: Path, **model: Any) -> None:
        self.path = path
        self.weights = path / "models" / "qm9_gaussian.safetensors"
        convert_pretrained(NAME, self.weights)
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        self.experiment = tiny(
            model={"kind": "flowmol", "name": NAME} | model,
            checkpoint={"path": str(self.weights), "sha256": digest},
            methods=METHODS,
            objective={"alpha": 200.0},
            evaluation={"ode_steps": 20},
        )
        self.molecules = write_molecules(path / "qm9.npz")
        (path / "config.yaml").write_text(dump(self.experiment))

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def run(self, stage: str, **options: Any) -> int:
        words = [f"molecules-{stage}", str(self / "config.yaml")]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return main(words)

    def pretrain(self) -> int:
        files = {"output": self / "pre.safetensors", "record": self / "training.json"}
        return self.run("pretrain", molecules=self.molecules, **files)

    def offline(self) -> int:
        files = {"model": self / "pre.safetensors", "output": self / "offline.npz"}
        return self.run("offline", seed=0, workers=1, **files)

    def finetune(self, method: str, **more: Any) -> int:
        files = {
            "pretrained": self / "pre.safetensors",
            "output": self / f"{method}.safetensors",
            "history": self / f"{method}.csv",
        }
        return self.run("finetune", method=method, seed=0, workers=1, **files, **more)


@pytest.fixture(scope="module")
def packages():
    with pytest.MonkeyPatch.context() as patch:
        flowmol_stand_in.install(patch)
        yield


@pytest.fixture(scope="module")
def folder(packages, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """With the pretrained model, the offline batch and a threshold."""
    made = Folder(tmp_path_factory.mktemp("flowmol"))
    assert made.pretrain() == 0
    assert made.offline() == 0
    files = {"offline": made / "offline.npz", "output": made / "tfft.json"}
    assert made.run("threshold", method="tfft", **files) == 0
    return made


def test_the_pretrained_model_is_the_converted_one_with_its_record(folder: Folder) -> None:
    assert (folder / "pre.safetensors").read_bytes() == folder.weights.read_bytes()
    assert (folder / "training.json").read_text() == folder.weights.with_suffix(".json").read_text()


def test_most_molecules_of_the_offline_batch_have_an_energy(folder: Folder) -> None:
    (rewards,) = np.load(folder / "offline.npz").values()
    assert len(rewards) == 40
    assert np.isfinite(rewards).mean() > 0.3


@pytest.mark.parametrize("method", ["am", "tfft", "fdc", "am_fitted"])
@pytest.mark.slow_after(1)
def test_a_method_runs_from_fine_tuning_to_metrics(folder: Folder, method: str) -> None:
    threshold = {"threshold": folder / "tfft.json"} if method == "tfft" else {}
    assert folder.finetune(method, **threshold) == 0
    tuned, *_ = load_flowmol(NAME, folder / f"{method}.safetensors")
    base, *_ = load_flowmol(NAME, folder / "pre.safetensors")
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert any(moved)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in tuned.parameters())

    samples = folder / f"{method}.npz"
    assert (
        folder.run("sample", method=method, seed=0, model=folder / f"{method}.safetensors", output=samples)
        == 0
    )
    drawn = np.load(samples)
    assert drawn["coordinates"].shape == (30, 5, 3)
    assert set(np.unique(drawn["numbers"])) <= {0, 1, 6, 7, 8, 9}
    assert set((drawn["numbers"] > 0).sum(1)) <= {2, 3, 5}
    files = {
        "molecules": folder.molecules,
        "output": folder / f"{method}_metrics.json",
        "sdf": folder / f"{method}.sdf",
        "energies": folder / f"{method}_energies.npz",
        "history": folder / f"{method}.csv",
    }
    assert folder.run("evaluate", method=method, samples=samples, workers=1, **files) == 0
    row = json.loads((folder / f"{method}_metrics.json").read_text())["rows"][method]
    assert row["mean_negative_energy"] > 0
    assert row["training_energies"] > 0


# --- Bad input: one message, before anything is trained ---------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    assert code != 0
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message


def changed(folder: Folder, where: Path, **keys: Any) -> Folder:
    """The same weights, and an experiment with other keys."""
    other = object.__new__(Folder)
    other.path, other.weights, other.molecules = where, folder.weights, folder.molecules
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (where / "config.yaml").write_text(yaml.safe_dump(config | keys))
    return other


def test_another_name(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(folder, tmp_path, model={"kind": "flowmol", "name": "qm9_marginal"})
    fails(capsys, other.pretrain(), "'qm9_gaussian', where key model.name is 'qm9_marginal'")
    assert not (other / "pre.safetensors").exists()


def test_other_weights(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(folder, tmp_path, checkpoint={"path": str(folder.weights), "sha256": 64 * "0"})
    fails(capsys, other.pretrain(), "key checkpoint.sha256", "docs/molecules.md")
    other = changed(folder, tmp_path, checkpoint={"path": "no.safetensors", "sha256": 64 * "0"})
    fails(capsys, other.pretrain(), "key checkpoint.path", "no such file", "docs/molecules.md")


def test_without_the_package(folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flowmol", None)
    fails(capsys, folder.offline(), "key model.kind is flowmol", "Dunni3/FlowMol", "equivariant")


def test_what_does_not_go_with_flowmol_is_refused_in_the_configuration(folder: Folder) -> None:
    digest = {"path": str(folder.weights), "sha256": 64 * "0"}
    with pytest.raises(ConfigError, match=r"checkpoint\.retrain: weights of FlowMol are not trained here"):
        tiny(model={"kind": "flowmol", "name": NAME}, checkpoint=digest | {"retrain": True})
    with pytest.raises(ConfigError, match=r"time_power: must be at least 2"):
        tiny(model={"kind": "flowmol", "name": NAME}, checkpoint=digest, time_power=1.0)
