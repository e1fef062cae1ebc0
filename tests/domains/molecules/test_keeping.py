"""Methods that train nothing on molecules: sizes as of all other rows, energies as counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from by_hand import Driven
from flowtilt.pipeline.domain import imported
from flowtilt.tilts import Groups, tilted
from small_molecules import tiny, write_checkpoint, write_molecules

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")
pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")

KEPT: dict[str, Any] = {
    "best_of_4": {"kind": "best_of", "n": 4},
    "resampled": {"kind": "resampled"},
    "resampled_tail": {"kind": "resampled", "of": "tfft"},
    "steered": {"kind": "steered", "particles": 3, "every": 2},
}
COUNT, BANK, STEPS = 60, 90, 4


class Folder(Driven):
    """A results folder with the offline batch, and all samples that are kept."""

    def __init__(self, path: Path) -> None:
        checkpoint = write_checkpoint(path / "resources" / "tiny.safetensors")
        write_molecules(path / "data" / "qm9.npz")
        changes = {
            "methods": {**KEPT, "tfft": {"kind": "tfft", "mass": 0.3, "narrowing": 0.5}},
            "objective": {"alpha": 4.0},
            "offline": {"samples": BANK},
            "solver": {"steps": STEPS},
            "evaluation": {"samples": COUNT, "relaxed": 1},
        }
        super().__init__(path, tiny(checkpoint, **changes), workers=1)
        assert self.run("pretrain") == self.run("offline") == self.run("threshold", "tfft") == 0
        assert self.run("sample", "pretrained") == self.run("evaluate", "pretrained") == 0
        for method in KEPT:
            assert self.run("keep", method) == self.run("evaluate", method) == 0

    def row(self, method: str) -> dict[str, float]:
        found: dict[str, float] = json.loads(self.file(method, "metrics.json").read_text())["rows"][method]
        return found

    def energies(self, method: str) -> dict[str, np.ndarray]:
        with np.load(self.file(method, "energies.npz")) as arrays:
            return dict(arrays)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("molecules"))


@pytest.mark.parametrize("method", ["best_of_4", "steered"])
def test_molecules_have_the_sizes_of_all_other_rows(folder: Folder, method: str) -> None:
    np.testing.assert_array_equal(folder.energies(method)["atoms"], folder.energies("pretrained")["atoms"])


@pytest.mark.parametrize("method", ["resampled", "resampled_tail"])
def test_resampled_molecules_have_as_many_of_each_size(folder: Folder, method: str) -> None:
    """And are those of the batch that have an energy, by weights within each size."""
    sizes, number = np.unique(folder.energies("pretrained")["atoms"], return_counts=True)
    found = folder.energies(method)
    assert not np.isnan(found["reward"]).any()
    np.testing.assert_array_equal(np.unique(found["atoms"], return_counts=True), (sizes, number))
    with np.load(folder.shared("seed0/offline.npz")) as arrays:
        rewards, contexts = arrays["reward"].astype(float), arrays["context"]
    known = ~np.isnan(rewards)
    assert set(found["reward"].astype(np.float32)) <= set(rewards[known].astype(np.float32))
    exponents = rewards[known] / 4.0
    if method == "resampled_tail":
        threshold = json.loads(folder.file("tfft", "threshold.json").read_text())["threshold"]
        exponents = np.maximum(rewards[known] - threshold, 0) / 0.3 / 4.0
    groups = Groups.of(contexts[known], np.arange(known.sum()))
    under = tilted(exponents, Groups(groups.labels, number / COUNT))
    row = folder.row(method)
    assert row["kl"] == pytest.approx(under.kl, rel=1e-6)
    assert row["effective_sample_size"] == pytest.approx(under.effective_share * known.sum(), rel=1e-6)
    # Each has its share of the copies, rounded down or up.
    copies = np.array([(found["reward"].astype(np.float32) == np.float32(r)).sum() for r in rewards[known]])
    same = np.array([(rewards[known] == r).sum() for r in rewards[known]])
    assert (np.abs(copies - COUNT * under.probabilities)[same == 1] < 1).all()


def test_the_best_have_more_than_those_they_are_chosen_from(folder: Folder) -> None:
    best, base = folder.row("best_of_4"), folder.row("pretrained")
    assert best["mean_negative_energy"] > base["mean_negative_energy"]
    assert best["converged_pct"] >= base["converged_pct"]


def test_costs_of_a_sample(folder: Folder) -> None:
    plain = 4 * folder.experiment.evaluation.ode_steps
    wanted = {
        "best_of_4": (4 * plain, 4),
        "resampled": (STEPS * BANK / COUNT, BANK / COUNT),
        "steered": (3 * STEPS, 3 * 2),
    }
    for method, (passes, rewards) in wanted.items():
        row = folder.row(method)
        assert (row["sample_passes"], row["sample_rewards"]) == pytest.approx((passes, rewards))
        assert row["plain_passes"] == plain
    assert "sample_passes" not in folder.row("pretrained")


def test_energies_are_those_that_are_counted(folder: Folder) -> None:
    job = folder.job("keep", "steered")
    bench = imported("flowtilt.domains.molecules.bench:MoleculesBench")(job)
    from flowtilt.devices import generator_of
    from flowtilt.pipeline.keeping import _steered

    random = generator_of(folder.experiment.name, "steered", "keep", 0)
    count, context = bench.contexts(random)
    kept = _steered(bench, count, context, random)
    assert bench.reward.evaluated == kept.reward_calls * count
