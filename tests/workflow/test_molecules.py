"""What the short run leaves of molecules."""

from __future__ import annotations

import json

import pytest
import yaml

from workflow_copy import Project

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")


@pytest.mark.fast
def test_all_files_of_a_run_are_there(finished: Project) -> None:
    runs = finished.smoke / "runs" / "molecules_qm9"
    made = {path.name for path in (runs / "tfft_0.9" / "seed0").iterdir()}
    assert made == {
        *("threshold.json", "model.safetensors", "history.csv", "samples.npz", "metrics.json"),
        *("molecules.sdf", "energies.npz"),
    }
    overrides = yaml.safe_load((finished.folder / "config" / "smoke.yaml").read_text())["overrides"]
    files = list(runs.rglob("metrics.json"))
    assert len(files) == 4  # of the data, the pretrained model, a tuned one, and what is kept
    for metrics in files:
        (row,) = json.loads(metrics.read_text(), parse_constant=pytest.fail)["rows"].values()
        assert row["molecules"] == overrides["molecules"]["evaluation"]["samples"]


@pytest.mark.fast
def test_the_table_and_figures_are_there(finished: Project) -> None:
    for name in ("molecules_qm9_energies", "molecules_qm9_molecules"):
        assert (finished.smoke / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (finished.smoke / "tables" / "molecules_qm9.md").read_text()
    assert "| tfft_0.9 |" in table
