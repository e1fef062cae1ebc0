"""What the smoke run leaves of molecules, and what their part of the workflow refuses."""

from __future__ import annotations

import json

import pytest
import yaml

from workflow_copy import SMOKE, Project

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")

MOLECULES = ("molecules_qm9", "molecules_tail_sweep")


@pytest.mark.fast
def test_all_files_of_a_run_are_there(finished: Project) -> None:
    runs = finished.smoke / "runs"
    made = {path.name for path in (runs / "molecules_qm9" / "tfft_0.9" / "seed0").iterdir()}
    assert made == {
        *("threshold.json", "model.safetensors", "history.csv", "samples.npz", "metrics.json"),
        *("molecules.sdf", "energies.npz"),
    }
    overrides = yaml.safe_load((finished.folder / "config" / "smoke.yaml").read_text())["overrides"]
    files = [metrics for name in MOLECULES for metrics in (runs / name).rglob("metrics.json")]
    assert len(files) > len(MOLECULES)
    for metrics in files:
        (row,) = json.loads(metrics.read_text(), parse_constant=pytest.fail)["rows"].values()
        assert row["molecules"] == overrides["molecules"]["evaluation"]["samples"]


@pytest.mark.fast
def test_tables_and_figures_are_there(finished: Project) -> None:
    for name in ("molecules_qm9_energies", "molecules_qm9_molecules", "molecules_tail_sweep"):
        assert (finished.smoke / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (finished.smoke / "tables" / "molecules_qm9.md").read_text()
    assert "reported (fdc)" in table
    assert "reported (ftfc)" in table
    assert "| plain |" in (finished.smoke / "tables" / "molecules_tail_sweep.md").read_text()


def test_a_change_reruns_what_reads_it(finished: Project) -> None:
    change = finished.folder / "change.yaml"
    change.write_text(yaml.safe_dump({"overrides": {"molecules": {"evaluation": {"relaxed": 1}}}}))
    jobs = finished.planned(*SMOKE, change.name, "--", *MOLECULES)
    assert finished.planned(*SMOKE) == {}
    assert {"molecules_sample", "molecules_evaluate"} <= jobs.keys()
    assert not {"molecules_finetune", "molecules_offline", "molecules_data"} & jobs.keys()
