"""The pipeline itself, by running it: at smoke size, and on configurations that cannot be used."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from environments import MOLECULES
from workflow_copy import PROFILE, ROOT, SMOKE, Project

TARGETS = {"all", "tables", "figures", "pretrained_models", "theories"}
RUN = "runs/risk_averse_2d/tfft/seed0"


def rule_texts() -> dict[str, str]:
    """The text of every rule that runs something; of one made for several files, without their names."""
    found = {}
    for file in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        if file.stem == "molecules" and not MOLECULES:
            continue
        for text in re.split(r"^(?=rule |for name in )", file.read_text(), flags=re.MULTILINE)[1:]:
            name = re.match(r"rule (\w+):", text) or re.search(r'f"(\w+)_{name}"', text)
            assert name is not None, text
            found[name[1]] = text
    return found


def kinds(rules: Iterable[str]) -> set[str]:
    """Names of rules, as :func:`rule_texts` has them."""
    return {re.sub(r"^measure_\w+", "measure", rule) for rule in rules}


def times(folder: Path) -> dict[Path, int]:
    """When each file of the runs, tables and figures was last written."""
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for part in ("runs", "tables", "figures", "resolution.json", "provenance.json")
        for path in [folder / part, *(folder / part).rglob("*")]
        if path.is_file()
    }


def edit(path: Path, **changes: Any) -> None:
    """Change top-level keys of a YAML file."""
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}, sort_keys=False))


# --------------------------------------------------------------------------- what rules declare


@pytest.mark.fast
@pytest.mark.parametrize("rule", rule_texts())
def test_rule_declares_what_a_scheduler_needs(rule: str) -> None:
    text = rule_texts()[rule]
    for declared in ("log:", "benchmark:", "threads:", "mem_mb=", "runtime=", "gpu=", "conda:"):
        assert declared in text, f"rule {rule} does not declare {declared}"
    assert text.count("flowtilt ") == 1, f"rule {rule} must call one stage of the command line"


def test_lint_finds_nothing() -> None:
    run = Project(ROOT).snakemake("--lint")
    assert run.returncode == 0, run.stdout
    assert "good condition" in run.stdout


# ------------------------------------------------------------------------------- the smoke run


OTHERWISE = {"fetch_checkpoint", "images_pretrain"}
"""Rules of models that are not shipped; test_images.py runs them."""


@pytest.mark.fast
def test_every_rule_ran(finished: Project) -> None:
    rules = kinds(finished.snakemake("--list-rules").stdout.split()) & {*rule_texts(), *TARGETS}
    assert rules == {*rule_texts(), *TARGETS}
    ran = {path.name for path in (finished.smoke / "benchmarks").iterdir()}
    assert ran == rules - TARGETS - OTHERWISE


@pytest.mark.fast
def test_every_declared_output_exists(finished: Project) -> None:
    summary = finished.snakemake(*SMOKE, "--summary").stdout
    outputs = [line.split("\t")[0] for line in summary.splitlines() if line.startswith("results/")]
    assert len(outputs) > 50
    for output in outputs:
        assert (finished.folder / output).stat().st_size > 0, output


@pytest.mark.fast
def test_second_run_has_nothing_to_do(finished: Project) -> None:
    before = times(finished.smoke)
    run = finished.snakemake(*SMOKE)
    assert run.returncode == 0, run.stdout
    assert "Nothing to be done" in run.stdout
    assert times(finished.smoke) == before


@pytest.mark.fast
def test_deleted_intermediate_reruns_only_what_depends_on_it(finished: Project) -> None:
    before = times(finished.smoke)
    metrics = (finished.smoke / RUN / "metrics.json").read_bytes()
    (finished.smoke / RUN / "samples.npz").unlink()
    run = finished.snakemake(*SMOKE)
    assert run.returncode == 0, run.stdout

    after = times(finished.smoke)
    assert after.keys() == before.keys()
    rerun = {str(path) for path in after if after[path] != before[path]}
    measured_together = [
        f"runs/risk_averse_2d/{method}/seed0" for method in ("pretrained", "am", "fdc", "tfft")
    ]
    assert rerun == {
        *(f"{run}/{file}" for run in measured_together for file in ("samples.npz", "metrics.json")),
        *(f"tables/{name}.{ext}" for name in ("risk_averse_2d", "costs") for ext in ("csv", "md", "tex")),
        "tables/comparison.csv",
        "tables/by_seed.csv",
        *(f"figures/risk_averse_2d_{kind}.png" for kind in ("landscape", "densities", "histograms")),
        "provenance.json",
    }
    assert (finished.smoke / RUN / "metrics.json").read_bytes() == metrics


def test_same_seed_gives_the_same_metrics_anywhere(finished: Project) -> None:
    target = f"results/again/{RUN}/metrics.json"
    run = finished.snakemake(*SMOKE, "--config", "results=results/again", "--", target)
    assert run.returncode == 0, run.stdout
    again = finished.folder / "results" / "again" / RUN
    assert (again / "metrics.json").read_bytes() == (finished.smoke / RUN / "metrics.json").read_bytes()
    assert not list((finished.folder / "results" / "again").glob("runs/novelty_2d/*"))


def test_one_core_gives_the_values_of_two(finished: Project, project: Project) -> None:
    run = project.snakemake(*SMOKE, "--cores", "1", "--", "risk_averse_2d")
    assert run.returncode == 0, run.stdout
    files = [*project.smoke.glob("runs/risk_averse_2d/*/*/metrics.json"), *project.smoke.glob("tables/risk*")]
    assert len(files) > 8
    for file in files:
        assert file.read_bytes() == (finished.smoke / file.relative_to(project.smoke)).read_bytes(), file


@pytest.mark.fast
def test_metrics_have_one_row_a_method_and_no_nan(finished: Project) -> None:
    files = list((finished.smoke / "runs").rglob("metrics.json"))
    assert files
    for file in files:
        rows = json.loads(file.read_text(), parse_constant=pytest.fail)["rows"]
        method = file.parent.parent.name
        if method in ("exact", "resolved"):
            assert all(row.endswith(f"_{method}") for row in rows)
        else:  # on a functional, with the rows that its own problem has on the grid
            solved = [f"{method}_exact", f"{method}_optimum"]
            assert list(rows) in ([method], [method, *solved[:1]], [method, *solved])


@pytest.mark.parametrize(
    ("override", "rerun", "kept"),
    [
        ({"objective": {"alpha": 3.0}}, {"threshold", "finetune", "exact"}, {"pretrain", "density"}),
        ({"grid": {"cells": 120}}, {"measure", "exact"}, {"pretrain", "finetune"}),
        ({"title": "Another title"}, {"table"}, {"pretrain", "finetune", "measure", "exact"}),
    ],
)
def test_changed_key_reruns_only_the_stages_that_read_it(
    finished: Project, override: dict[str, Any], rerun: set[str], kept: set[str]
) -> None:
    change = finished.folder / "change.yaml"
    change.write_text(yaml.safe_dump({"overrides": override}))
    jobs = finished.planned(*SMOKE, change.name)
    assert finished.planned(*SMOKE) == {}  # and restores the resolved configurations
    assert rerun <= kinds(jobs)
    assert not kept & kinds(jobs)


def test_committed_tables_do_not_pass_for_a_finished_run(finished: Project, project: Project) -> None:
    for part in ("tables", "figures"):
        shutil.copytree(finished.smoke / part, project.smoke / part)
    shutil.copy(finished.smoke / "provenance.json", project.smoke)
    everything = kinds(finished.snakemake("--list-rules").stdout.split()) & {*rule_texts()}
    assert kinds(project.planned(*SMOKE)) == everything - OTHERWISE


def test_experiment_is_a_target_of_its_own(project: Project) -> None:
    jobs = project.planned(*SMOKE, "--", "novelty_2d")
    assert jobs["table"] == jobs["experiment_figures"] == 1
    assert kinds(jobs) - rule_texts().keys() == {"novelty_2d"}
    assert not jobs.keys() & {"compare", "study_figure", "provenance"}


# ----------------------------------------------------------------------------------- bad input


def assert_refused(project: Project, *words: str) -> None:
    """Snakemake stops before any job, and says what is wrong without a traceback."""
    run = project.snakemake(*SMOKE)
    assert run.returncode != 0
    for word in words:
        assert word in run.stdout, run.stdout
    assert "Traceback" not in run.stdout
    assert not (project.folder / "results").exists()


def test_an_old_snakemake_is_refused(project: Project) -> None:
    """Here it is one that says so of itself; what it cannot read must not stand in the Snakefile."""
    assert "pathvars" not in (ROOT / "Snakefile").read_text()
    program = (
        "import sys, snakemake.common; snakemake.common.__version__ = '9.3.0'\n"
        "from snakemake.cli import main; main(sys.argv[1:])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *PROFILE, "--cores", "1", "--dry-run"],
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "Expecting Snakemake version 9.17 or higher" in run.stdout, run.stdout


def test_unknown_experiment_is_refused(project: Project) -> None:
    edit(project.folder / "config" / "config.yaml", experiments=["risk_averse_2d", "risk_averse_3d"])
    assert_refused(project, "config/config.yaml", "key experiments", "risk_averse_3d", "novelty_2d")


def test_unknown_key_of_the_configuration_is_refused(project: Project) -> None:
    edit(project.folder / "config" / "config.yaml", experimens=["risk_averse_2d"])
    assert_refused(project, "config/config.yaml", "experimens", "known keys", "experiments")


def test_study_that_cannot_measure_the_resolution_is_refused(project: Project) -> None:
    edit(project.folder / "config" / "config.yaml", resolution="iterations_2d")
    assert_refused(project, "config/config.yaml", "key resolution", "iterations_2d")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"seeds": 0}, "seeds"),
        ({"objective": {"alpha": 0}}, "objective.alpha"),
        ({"solvr": {"updates": 3}}, "solvr"),
    ],
)
def test_bad_override_is_refused(project: Project, overrides: dict[str, Any], key: str) -> None:
    edit(project.folder / "config" / "smoke.yaml", overrides=overrides)
    assert_refused(project, "config/smoke.yaml", "key overrides", f"key {key}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"theory_overrides": {"mirror_descent": {"iterations": 0}}},
            ("mirror_descent.yaml", "key iterations"),
        ),
        (
            {"theory_overrides": {"mirrors": {}}},
            ("key theory_overrides.mirrors", "mirror_descent, threshold"),
        ),
        ({"theory": ["mirrors"], "theory_overrides": {}}, ("config/theory/mirrors.yaml: no such file",)),
    ],
)
def test_bad_study_of_the_theory_is_refused(
    project: Project, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    edit(project.folder / "config" / "smoke.yaml", **changes)
    assert_refused(project, "config/smoke.yaml", *words)


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        ("objective", {"level": 1.0}, "objective.level"),
        ("objective", {"alpha": -1.0}, "objective.alpha"),
        ("solver", {"update": 3}, "solver.update"),
        ("methods", {"amm": {"kind": "adjoint"}}, "methods.amm.kind"),
    ],
)
def test_bad_experiment_is_refused(project: Project, section: str, changes: dict[str, Any], key: str) -> None:
    file = project.folder / "config" / "experiments" / "novelty_2d.yaml"
    edit(file, **{section: {**yaml.safe_load(file.read_text())[section], **changes}})
    assert_refused(project, "config/experiments/novelty_2d.yaml", f"key {key}")


def test_no_seeds_are_refused(project: Project) -> None:
    edit(project.folder / "config" / "experiments" / "resolution_2d.yaml", seeds=0)
    edit(project.folder / "config" / "smoke.yaml", overrides={})
    assert_refused(project, "config/experiments/resolution_2d.yaml", "key seeds")


def test_unknown_parent_of_a_case_is_refused(project: Project) -> None:
    file = project.folder / "config" / "experiments" / "iterations_2d.yaml"
    study = yaml.safe_load(file.read_text())["study"]
    study["cases"][0]["of"] = "risk_2d"
    edit(file, study=study)
    assert_refused(project, "risk_2d", "risk_averse_2d")


def test_functional_of_a_module_that_is_not_there_is_refused(project: Project) -> None:
    objective = {"objective": {"utility": {"kind": "my_functionals:ENTROPIC_RISK", "theta": 0.1}}}
    file = project.folder / "config" / "experiments" / "hierarchy_2d.yaml"
    study = yaml.safe_load(file.read_text())["study"]
    study["cases"].append({"label": "entropic_risk", "of": "ot_2d", "set": objective})
    edit(file, study=study)
    assert_refused(
        project,
        "config/experiments/hierarchy_2d.yaml: experiment hierarchy_2d/entropic_risk",
        "key objective.utility: utility my_functionals:ENTROPIC_RISK: cannot load",
        "PYTHONPATH",
    )
