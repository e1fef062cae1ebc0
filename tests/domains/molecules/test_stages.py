"""The stages of molecules by the command line, at tiny size: what they write, and bad input."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file as load_tensors

from by_hand import Driven
from flowtilt import thresholds
from flowtilt.domains.molecules.experiment import narrowing
from flowtilt.domains.molecules.sdf import read_sdf
from flowtilt.domains.molecules.xtb import single_point
from flowtilt.metrics.tails import upper_tail_mean
from flowtilt.pipeline.cli import main
from flowtilt.pipeline.stages import finetune
from flowtilt.resuming import SECONDS
from flowtilt.tilts import Groups
from small_molecules import tiny, write_checkpoint, write_molecules

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")
pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")


class Folder(Driven):
    """A results folder with a checkpoint and a file of molecules."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.checkpoint = write_checkpoint(path / "resources" / "tiny.safetensors")
        self.molecules = write_molecules(path / "data" / "qm9.npz")
        super().__init__(path, tiny(self.checkpoint, **changes), workers=1)

    @property
    def pretrained(self) -> Path:
        return self.shared("model.safetensors")

    def evaluate(self, method: str) -> int:
        return self.run("sample", method) or self.run("evaluate", method)

    def metrics(self, method: str) -> dict[str, float | None]:
        rows = json.loads(self.file(method, "metrics.json").read_text(), parse_constant=pytest.fail)
        row: dict[str, float | None] = rows["rows"][method]
        return row


# An alpha of this size lets the threshold of the few molecules here lie below some of them.
REACHABLE = {"objective": {"alpha": 50.0}}


FITTED = {"kind": "weighted_fitting", "bank": 400, "bank_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """With the pretrained model and the offline batch."""
    methods = {
        "tfft": {"mass": 0.2},
        "rising": {"kind": "tfft", "mass": 0.1, "narrowing": 0.5},
        "fdc": {"iterations": 2, "mass": 0.5, "solver": {"pool": 8}},
        "am_fitted": {"kind": "am", "solver": FITTED},
        "tfft_fitted": {"kind": "tfft", "mass": 0.2, "solver": FITTED},
    }
    made = Folder(tmp_path_factory.mktemp("molecules"), methods=methods, **REACHABLE)
    assert made.run("pretrain") == 0
    assert made.run("offline") == 0
    return made


def test_the_shipped_checkpoint_is_taken_as_it_is(folder: Folder) -> None:
    assert folder.pretrained.read_bytes() == folder.checkpoint.read_bytes()
    assert folder.shared("training.json").read_text() == folder.checkpoint.with_suffix(".json").read_text()


def test_the_threshold_leaves_failures_out_and_counts_them(folder: Folder) -> None:
    with np.load(folder.shared("seed0/offline.npz")) as arrays:
        every, sizes = arrays["reward"].astype(float), arrays["context"]
    kept = every[~np.isnan(every)].astype(float)
    assert 0 < len(kept) < len(every) == 40
    assert folder.run("threshold", "tfft") == 0
    row = json.loads(folder.file("tfft", "threshold.json").read_text())
    tail = folder.experiment.tail_of("tfft")
    groups = Groups.of(sizes, np.arange(40), 10)
    assert row["threshold"] == thresholds.threshold(
        every, tail.alpha, tail.mass, "upper", contexts=groups.labels
    )
    assert row["offline_pooled"] == groups.pooled
    assert row["offline_samples"] + row["offline_failed"] == len(every)
    assert row["offline_active_share"] == (kept > row["threshold"]).mean() > 0


def test_a_narrowing_tail_ends_at_the_threshold(folder: Folder) -> None:
    assert folder.run("threshold", "rising") == 0
    row = json.loads(folder.file("rising", "threshold.json").read_text())
    assert [rung["mass"] for rung in row["schedule"]] == pytest.approx([0.5, 0.5 * 0.2 ** (2 / 3), 0.1])
    found = [rung["threshold"] for rung in row["schedule"]]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(row["threshold"])


def test_masses_fall_geometrically_and_then_stay() -> None:
    assert narrowing(0.125, 0.5, 8) == pytest.approx([0.5, 0.5**1.5, 0.25, 0.5**2.5, *[0.125] * 4])
    assert narrowing(0.125, 0.0, 3) == [0.125] * 3
    assert narrowing(0.8, 0.5, 3) == [0.8] * 3


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("method", ["am", "tfft", "rising", "fdc", "am_fitted", "tfft_fitted"])
def test_finetuning_moves_the_model_and_counts_what_it_asked_for(folder: Folder, method: str) -> None:
    if folder.experiment.methods[method].kind == "tfft":
        assert folder.run("threshold", method) == 0
    assert folder.run("finetune", method) == 0
    history = pd.read_csv(folder.file(method, "history.csv"))
    config = folder.experiment.methods[method]
    assert len(history) == folder.experiment.updates_of(method) * (config.iterations or 1)
    batch, pool = folder.experiment.solver.batch, folder.experiment.solver.pool
    sampled = np.full(len(history), batch if method == "am" else pool)
    if method.endswith("_fitted"):  # the bank is drawn before the first update
        sampled = np.where(history["update"] == 0, FITTED["bank"], 0)
    if method == "fdc":  # the distribution's samples are drawn before the first update of each iteration
        sampled = sampled + np.where(history["update"] == 0, folder.experiment.offline.samples, 0)
    assert history["evaluated"].tolist() == sampled.tolist()
    assert (history["failed"] <= history["evaluated"]).all()
    if method in ("tfft", "rising"):  # inactive or failed samples are none that count
        assert (history["active_share"] * pool <= history["evaluated"] - history["failed"]).all()
    assert (history["active_share"] > 0).any()
    before, after = map(load_tensors, (folder.pretrained, folder.file(method, "model.safetensors")))
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed
    assert "size_weights" not in changed


def test_the_same_seed_gives_the_same_bytes(folder: Folder) -> None:
    assert folder.run("finetune", "am") == 0
    first = folder.file("am", "model.safetensors").read_bytes()
    assert folder.run("finetune", "am") == 0
    assert folder.file("am", "model.safetensors").read_bytes() == first


class Stopped(Exception):
    pass


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("method", ["am", "fdc", "am_fitted"])
def test_a_stopped_finetuning_goes_on_exactly_where_it_was(
    method: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energies asked for again after the stop, as for FDC's distribution or a bank, are not counted again."""
    monkeypatch.setenv(SECONDS, "0")
    assert folder.run("finetune", method) == 0
    weights, history = (folder.file(method, name) for name in ("model.safetensors", "history.csv"))
    whole, rows = weights.read_bytes(), pd.read_csv(history)
    weights.unlink()
    done = 0

    def progress(_: dict[str, float]) -> None:
        nonlocal done
        done += 1
        if done in (2, 4):
            raise Stopped

    job, state = replace(folder.job("finetune", method), bar=lambda *_: progress), weights.parent / "state"
    for _ in range(2):
        with pytest.raises(Stopped):
            finetune(job)
        assert state.is_dir()
    finetune(job)
    assert done == len(rows) + 2
    assert not state.exists()
    assert weights.read_bytes() == whole
    again = pd.read_csv(history)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), rows.drop(columns="seconds"))
    assert again["evaluated"].sum() > 0


def test_metrics_of_a_run_are_those_of_its_molecules(folder: Folder) -> None:
    assert folder.run("finetune", "am") == 0
    assert folder.evaluate("am") == 0
    row = folder.metrics("am")
    records = read_sdf(folder.file("am", "molecules.sdf"))
    energies = np.load(folder.file("am", "energies.npz"))
    assert len(records) == len(energies["reward"]) == row["molecules"] == 30
    kept = energies["reward"][~np.isnan(energies["reward"])]
    assert 0 < len(kept) == row["with_energy"]
    assert row["mean_negative_energy"] == pytest.approx(kept.mean())
    assert row["top_0.2pct_negative_energy"] == pytest.approx(kept.max())
    assert row["top_20pct_negative_energy"] == pytest.approx(upper_tail_mean(kept, 0.2))
    assert row["validity_pct"] == pytest.approx(100 * energies["valid"].mean())
    best = int(np.nanargmax(energies["reward"]))
    again = single_point((records[best].molecule, build_settings(folder)))
    # The format keeps coordinates to 1e-4 ångström, on which an energy depends by about a hartree.
    assert -again.energy == pytest.approx(energies["reward"][best], abs=1e-2)
    assert float(records[best].properties["energy_hartree"]) == -energies["reward"][best]
    assert {"active_share", "kl_paid", "training_energies", "inactive_updates"} <= row.keys()


def build_settings(folder: Folder) -> Any:
    from flowtilt.domains.molecules.xtb import XTBSettings

    return XTBSettings(**folder.experiment.reward.calculation)


def test_real_molecules_are_valid_and_known(folder: Folder) -> None:
    assert folder.evaluate("data") == 0
    row = folder.metrics("data")
    assert row["validity_pct"] == row["converged_pct"] == 100
    assert row["novelty_pct"] == 0
    assert row["elements_total_variation"] is not None
    assert row["elements_total_variation"] < 0.2
    gain = row["relaxation_energy_mean"]
    assert gain is not None
    assert 0 <= gain < 0.05
    assert "active_share" not in row


def test_methods_of_a_seed_start_from_the_same_noise(folder: Folder) -> None:
    assert folder.evaluate("pretrained") == 0
    folder.file("am", "model.safetensors").parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder.pretrained, folder.file("am", "model.safetensors"))
    assert folder.run("sample", "am") == 0
    a, b = (np.load(folder.file(method, "samples.npz")) for method in ("pretrained", "am"))
    assert all(np.array_equal(a[name], b[name]) for name in ("coordinates", "numbers"))


def test_a_retraining_is_a_switch_and_goes_on_where_it_was(tmp_path: Path) -> None:
    own = Folder(tmp_path, checkpoint={"retrain": True, "path": "nowhere.safetensors"})
    assert own.run("pretrain") == 0
    made = own.pretrained.read_bytes()
    assert len(pd.read_csv(own.shared("history.csv"))) == 3
    record = json.loads(own.shared("training.json").read_text())
    assert record["sha256"] == hashlib.sha256(made).hexdigest()
    assert record["configuration"]["pretrain"]["updates"] == 3
    assert record["data"]["trained_on"] < record["data"]["molecules"] == 60
    (line,) = record["checks"]["lines"]
    assert line["updates"] == 2
    assert 0 <= line["validity"] <= 1
    own.pretrained.unlink()
    assert own.run("pretrain") == 0  # from the state of the finished training
    assert own.pretrained.read_bytes() == made
    assert json.loads(own.shared("training.json").read_text())["checks"] == record["checks"]
    assert load_tensors(own.pretrained)["size_weights"].tolist() == [0, 0, 0, 24, 24, 12]


# ----------------------------------------------------------------------------------- bad input


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    """Check a failed command: non-zero, one message with the words, no traceback."""
    message = capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in message
    for word in words:
        assert word in message, message


def test_a_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Folder(tmp_path)
    own.checkpoint.unlink()
    fails(
        capsys,
        own.run("pretrain"),
        "key checkpoint.path",
        "tiny.safetensors: no such file",
        "retrain to true",
    )
    assert not own.pretrained.exists()


def test_a_checkpoint_without_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Folder(tmp_path)
    own.checkpoint.with_suffix(".json").unlink()
    fails(capsys, own.run("pretrain"), "key checkpoint.path", "tiny.json: no such file")
    assert not own.pretrained.exists()


def test_another_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Folder(tmp_path)
    write_checkpoint(own.checkpoint, seed=1)
    fails(
        capsys, own.run("pretrain"), "key checkpoint.sha256", "has the SHA-256", "restore the file or correct"
    )
    assert not own.pretrained.exists()


def test_a_checkpoint_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Folder(tmp_path)
    own.use(tiny(own.checkpoint, network={"width": 16}))
    fails(capsys, own.run("pretrain"), "tiny.safetensors", "made for another network")


def test_flowmol_without_its_package(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(folder.config.read_text())
    other = tmp_path / "flowmol.yaml"
    other.write_text(yaml.safe_dump({**config, "model": {"kind": "flowmol", "name": "qm9_gaussian"}}))
    code = main(["offline", str(other), "--seed", "0", "--results", str(folder.path)])
    fails(capsys, code, "key model.kind is flowmol", "Dunni3/FlowMol", "equivariant")


def test_wrong_kinds(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, folder.run("finetune", "pretrained"), "'pretrained' has no finetune; those that have: am, ")
    fails(capsys, folder.run("finetune", "data"), "'data' has no finetune")
    fails(capsys, folder.run("threshold", "am"), "'am' has no threshold; those that have: tfft, tfft_0.9, ")
    fails(capsys, folder.run("finetune", "ppo"), "unknown method 'ppo'; it has am, ")
    fails(capsys, folder.run("finetune"), "the stage finetune is of a method; give it --method, one of: am, ")
    words = ["sample", str(folder.config), "--results", str(folder.path), "--method", "data"]
    fails(capsys, main(words), "the stage sample is of a seed; give it --seed")


def test_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"rising": {"kind": "tfft", "mass": 0.1, "narrowing": 0.5}}
    own = Folder(tmp_path, methods=methods, **REACHABLE)
    fails(capsys, own.run("offline"), "pretrained/model.safetensors: no such checkpoint", "run the stage")
    fails(capsys, own.run("threshold", "tfft"), "offline.npz: no such file")
    fails(capsys, own.run("sample", "am"), "am/seed0/model.safetensors: no such checkpoint")
    fails(capsys, own.run("evaluate", "am"), "am/seed0/samples.npz: no such file")
    assert own.run("pretrain") == 0
    said = "tfft/seed0/threshold.json: no such file", "run the threshold stage first"
    fails(capsys, own.run("finetune", "tfft"), *said)
    own.molecules.unlink()
    fails(capsys, own.run("sample", "data"), "data/qm9.npz: no such file")
    without = own.file("rising", "threshold.json")
    without.parent.mkdir(parents=True)
    without.write_text(json.dumps({"threshold": 1.0, "offline_active_share": 0.1}))
    fails(capsys, own.run("finetune", "rising"), "threshold.json: has no schedule")


def test_an_offline_batch_without_energies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Folder(tmp_path)
    batch = own.shared("seed0/offline.npz")
    batch.parent.mkdir(parents=True)
    np.savez(batch, reward=np.full(5, math.nan), context=np.zeros(5, dtype=int))
    fails(capsys, own.run("threshold", "tfft"), "offline.npz: no sample of the batch has a reward")


def test_a_damaged_file_of_molecules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Folder(tmp_path)
    own.molecules.write_bytes(own.molecules.read_bytes()[:200])
    fails(capsys, own.run("sample", "data"), "qm9.npz: not a whole file of molecules", "delete it")


def test_a_stage_of_the_plane_refuses_molecules(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, folder.run("density"), "molecules has no stage density; it has data, pretrain, ")


def test_the_papers_keys_go_through_the_stages(tmp_path: Path) -> None:
    """Adapters, failures that count, a tail that narrows from the mean, and steps without a divergence."""
    linear = {"mass": 0.2, "narrowing": 0.7, "narrowing_from": 1.0, "narrowing_by": "linear"}
    adapter = {"adapter": {"rank": 2, "alpha": 2.0}}
    methods = {
        "am": adapter | {"alpha": 20.0},
        "tfft": linear,
        "fdc": {"iterations": 2, "mass": 0.5, "alpha": 0.0, "step": None, "step_weight": [20.0, 30.0]},
    }
    late = {"adjoint": "lean", "adjoint_from": 0.4, "loss_steps": [[1.0, 1]], "annealing": "none"}
    changes = {"reward": {"failed": -500.0}, "solver": late | {"active_batch": 1}, "methods": methods}
    folder = Folder(tmp_path, **changes, **REACHABLE)
    assert folder.run("pretrain") == folder.run("offline") == 0
    rewards = np.load(folder.path / "runs/molecules_qm9/pretrained/seed0/offline.npz")["reward"]
    assert np.isfinite(rewards).all()
    assert (rewards == -500).any()
    assert (rewards > 0).any()
    assert folder.run("threshold", "tfft") == 0
    schedule = json.loads(folder.file("tfft", "threshold.json").read_text())["schedule"]
    assert schedule[0] == {"mass": 1.0, "threshold": -500.0}
    for method in methods:
        assert folder.run("finetune", method) == 0
        history = pd.read_csv(folder.file(method, "history.csv"))
        assert (history["failed_share"] == 0).all()
    # The mean is raised by all that were drawn, of a batch and not of a pool.
    evaluated = pd.read_csv(folder.file("tfft", "history.csv"))["evaluated"]
    assert evaluated.tolist() == [4, 8, 8]
    before, after = map(load_tensors, (folder.pretrained, folder.file("am", "model.safetensors")))
    base = {name.replace(".linear.", "."): tensor for name, tensor in after.items()}
    assert all(tensor.equal(base[name]) for name, tensor in before.items())
    assert any(bool(tensor.any()) for name, tensor in after.items() if name.endswith(".up"))
    assert folder.evaluate("am") == 0
    assert not np.isin(np.load(folder.file("am", "energies.npz"))["reward"], [-500.0]).any()
