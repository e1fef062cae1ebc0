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
from by_hand import Driven
from flowtilt.domains.molecules.flowmol_weights import convert_pretrained, load_flowmol
from flowtilt.pipeline.configuration import ConfigError
from small_molecules import tiny, write_molecules

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")
pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")

NAME = "qm9_gaussian"
METHODS = {
    "tfft": {"mass": 0.2},
    "steered": {"every": 2},
    "fdc": {"iterations": 2, "mass": 0.5, "solver": {"pool": 8}},
    "am_fitted": {"kind": "am", "solver": {"kind": "weighted_fitting", "bank": 100, "bank_steps": 20}},
}


class Folder(Driven):
    """A results folder with molecules, and an experiment that begins with converted weights."""

    def __init__(self, path: Path, weights: Path, **keys: Any) -> None:
        self.weights = weights
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        experiment = tiny(
            model={"kind": "flowmol", "name": NAME},
            checkpoint={"path": str(weights), "sha256": digest},
            methods=METHODS,
            objective={"alpha": 200.0},
            evaluation={"ode_steps": 20},
        )
        write_molecules(path / "data" / "qm9.npz")
        super().__init__(path, experiment, workers=1)
        if keys:
            self.config.write_text(yaml.safe_dump(yaml.safe_load(self.config.read_text()) | keys))

    @property
    def pretrained(self) -> Path:
        return self.shared("model.safetensors")


@pytest.fixture(scope="module")
def packages():
    with pytest.MonkeyPatch.context() as patch:
        flowmol_stand_in.install(patch)
        yield


@pytest.fixture(scope="module")
def folder(packages, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """With the pretrained model, the offline batch and a threshold."""
    weights = tmp_path_factory.mktemp("models") / f"{NAME}.safetensors"
    convert_pretrained(NAME, weights)
    made = Folder(tmp_path_factory.mktemp("flowmol"), weights)
    for stage, method in (("pretrain", ""), ("offline", ""), ("threshold", "tfft")):
        assert made.run(stage, method) == 0
    return made


def test_the_pretrained_model_is_the_converted_one_with_its_record(folder: Folder) -> None:
    assert folder.pretrained.read_bytes() == folder.weights.read_bytes()
    assert folder.shared("training.json").read_text() == folder.weights.with_suffix(".json").read_text()


def test_most_molecules_of_the_offline_batch_have_an_energy(folder: Folder) -> None:
    rewards = np.load(folder.shared("seed0/offline.npz"))["reward"]
    assert len(rewards) == 40
    assert np.isfinite(rewards).mean() > 0.3


@pytest.mark.parametrize("method", ["am", "tfft", "fdc", "am_fitted"])
@pytest.mark.slow_after(1)
def test_a_method_runs_from_fine_tuning_to_metrics(folder: Folder, method: str) -> None:
    assert folder.run("finetune", method) == 0
    tuned, *_ = load_flowmol(NAME, folder.file(method, "model.safetensors"))
    base, *_ = load_flowmol(NAME, folder.pretrained)
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert any(moved)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in tuned.parameters())

    assert folder.run("sample", method) == 0
    drawn = np.load(folder.file(method, "samples.npz"))
    assert drawn["coordinates"].shape == (30, 5, 3)
    assert set(np.unique(drawn["numbers"])) <= {0, 1, 6, 7, 8, 9}
    assert set((drawn["numbers"] > 0).sum(1)) <= {2, 3, 5}
    assert folder.run("evaluate", method) == 0
    row = json.loads(folder.file(method, "metrics.json").read_text())["rows"][method]
    assert row["mean_negative_energy"] > 0
    assert row["training_energies"] > 0


@pytest.mark.parametrize("method", ["best_of_4", "steered", "resampled"])
def test_what_trains_nothing_keeps_molecules_of_it(folder: Folder, method: str) -> None:
    """By the posterior mean of paths that differ by columns, where particles are steered."""
    assert folder.run("keep", method) == 0
    drawn = np.load(folder.file(method, "kept_samples.npz"))
    assert drawn["coordinates"].shape == (30, 5, 3)
    assert np.isfinite(drawn["coordinates"]).all()
    assert set((drawn["numbers"] > 0).sum(1)) <= {2, 3, 5}
    kept = json.loads(folder.file(method, "kept.json").read_text())
    assert np.isfinite(kept["kl"])
    if method == "steered":  # four particles; halfway, and at the end
        assert kept["sample_rewards"] == 4 * 2


# --- Bad input: one message, before anything is trained ---------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    assert code != 0
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message


def test_another_name(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Folder(tmp_path, folder.weights, model={"kind": "flowmol", "name": "qm9_marginal"})
    fails(capsys, other.run("pretrain"), "'qm9_gaussian', where key model.name is 'qm9_marginal'")
    assert not other.pretrained.exists()


def test_other_weights(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Folder(tmp_path, folder.weights, checkpoint={"path": str(folder.weights), "sha256": 64 * "0"})
    fails(capsys, other.run("pretrain"), "key checkpoint.sha256", "docs/molecules.md")
    other = Folder(tmp_path, folder.weights, checkpoint={"path": "no.safetensors", "sha256": 64 * "0"})
    fails(capsys, other.run("pretrain"), "key checkpoint.path", "no such file", "docs/molecules.md")


def test_without_the_package(folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flowmol", None)
    fails(capsys, folder.run("offline"), "key model.kind is flowmol", "Dunni3/FlowMol", "equivariant")


def test_what_does_not_go_with_flowmol_is_refused_in_the_configuration(folder: Folder) -> None:
    digest = {"path": str(folder.weights), "sha256": 64 * "0"}
    with pytest.raises(ConfigError, match=r"checkpoint\.retrain: weights of FlowMol are not trained here"):
        tiny(model={"kind": "flowmol", "name": NAME}, checkpoint=digest | {"retrain": True})
    with pytest.raises(ConfigError, match=r"time_power: must be at least 2"):
        tiny(model={"kind": "flowmol", "name": NAME}, checkpoint=digest, time_power=1.0)
