"""The workflow of molecules, by running it at tiny size from an untrained checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from small_molecules import TINY, write_checkpoint
from workflow_copy import Project

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")

pytestmark = pytest.mark.pipeline

TARGETS = ("--configfile", "config/tiny.yaml", "--", "molecules_qm9", "molecules_tail_sweep")
PER_RUN = ("molecules_sample", "molecules_evaluate")


def set_up(folder: Path) -> Project:
    """A project whose only experiments are those on molecules, at tiny size."""
    project = Project.copied_to(folder)
    checkpoint = write_checkpoint(project.folder / "resources" / "tiny.safetensors")
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    own = {"checkpoint": {"path": "resources/tiny.safetensors", "sha256": digest}}
    skip = {
        "molecules_tail_sweep": {"cases": ["pool", "fitted"]},
        "molecules_qm9": {"methods": ["fdc", "tfft", "am_fitted", "tfft_0.9_fitted"]},
    }
    # The cases have pools of their own. With this alpha thresholds can be reached.
    solver = {key: value for key, value in TINY["solver"].items() if key != "pool"}
    molecules = {**TINY, **own, "objective": {"alpha": 50.0}, "solver": solver}
    config = {
        "results": "results/tiny",
        "experiments": ["molecules_qm9", "molecules_tail_sweep"],
        "theory": [],
        "overrides": {"molecules": molecules, "skip": skip},
    }
    (project.folder / "config" / "tiny.yaml").write_text(yaml.safe_dump(config))
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = set_up(tmp_path_factory.mktemp("molecules") / "project")
    run = project.snakemake(*TARGETS)
    if run.returncode != 0:
        pytest.fail(f"the run failed, it ended with:\n{run.stdout[-4000:]}", pytrace=False)
    return project


def test_every_rule_ran(finished: Project) -> None:
    rules = (finished.folder / "workflow" / "rules" / "molecules.smk").read_text()
    named = set(re.findall(r"^rule (\w+):", rules, re.MULTILINE))
    ran = {path.name for path in (finished.folder / "results/tiny/benchmarks").iterdir()}
    assert ran == {*named, "table"}


def test_all_files_of_a_run_are_there(finished: Project) -> None:
    runs = finished.folder / "results" / "tiny" / "runs"
    made = {path.name for path in (runs / "molecules_qm9" / "tfft_0.9" / "seed0").iterdir()}
    assert made == {
        *("threshold.json", "model.safetensors", "history.csv", "samples.npz", "metrics.json"),
        *("molecules.sdf", "energies.npz"),
    }
    for metrics in runs.rglob("metrics.json"):
        (row,) = json.loads(metrics.read_text(), parse_constant=pytest.fail)["rows"].values()
        assert row["molecules"] == TINY["evaluation"]["samples"]


def test_tables_and_figures_are_there(finished: Project) -> None:
    results = finished.folder / "results" / "tiny"
    for name in ("molecules_qm9_energies", "molecules_qm9_molecules", "molecules_tail_sweep"):
        assert (results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (results / "tables" / "molecules_qm9.md").read_text()
    assert "reported (fdc)" in table
    assert "reported (ftfc)" in table
    assert "| rising |" in (results / "tables" / "molecules_tail_sweep.md").read_text()


def test_nothing_is_left_to_do_and_a_change_reruns_what_reads_it(finished: Project) -> None:
    assert finished.planned(*TARGETS) == {}
    change = finished.folder / "change.yaml"
    change.write_text(yaml.safe_dump({"overrides": {"molecules": {"evaluation": {"relaxed": 1}}}}))
    jobs = finished.planned("--configfile", "config/tiny.yaml", change.name, "--", *TARGETS[3:])
    assert finished.planned(*TARGETS) == {}  # and restores the resolved configurations
    assert set(PER_RUN) <= jobs.keys()
    assert not {"molecules_finetune", "molecules_offline", "molecules_data"} & jobs.keys()


def test_a_case_that_would_change_what_it_shares_is_refused(tmp_path: Path) -> None:
    project = set_up(tmp_path / "project")
    file = project.folder / "config" / "experiments" / "molecules_tail_sweep.yaml"
    study = yaml.safe_load(file.read_text())
    study["study"]["cases"][0]["set"]["offline"] = {"samples": 7}
    file.write_text(yaml.safe_dump(study))
    edited = yaml.safe_load((project.folder / "config" / "tiny.yaml").read_text())
    del edited["overrides"]["molecules"]["offline"]
    (project.folder / "config" / "tiny.yaml").write_text(yaml.safe_dump(edited))
    run = project.snakemake(*TARGETS)
    assert run.returncode != 0
    assert "molecules_tail_sweep.yaml: key offline" in run.stdout
    assert "Traceback" not in run.stdout
