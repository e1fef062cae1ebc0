"""The pipeline itself, by running every rule of it once, and on configurations that cannot be used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.pipeline.resources import REPORT
from workflow_copy import PROFILE, ROOT, SHORT, SMOKE, Project, check_metrics

TARGETS = {"all", "tables", "figures", "pretrained_models", "theories"}
RUN = "runs/risk_averse_2d/tfft/seed0"


def rule_texts() -> dict[str, str]:
    """The text of every rule that runs something: of stages, and of what is made of results."""
    files = {name: ROOT / "workflow" / "rules" / f"{name}.smk" for name in ("run", "report")}
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    return {name: text.partition("    rule:\n")[2] for name, text in texts.items()}


def rules_of(project: Project) -> set[str]:
    """Every rule of the workflow that is no target, those of all files as one."""
    whole = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    listed = re.findall(r"^\w+$", project.snakemake("--list-rules").stdout, re.MULTILINE)
    return kinds({*listed} - TARGETS - {*whole["experiments"]})


def kinds(rules: Iterable[str]) -> set[str]:
    """Names of rules, without those of the files that some are made for."""
    return {re.sub(r"^(planar_measure|figures|versions)_\w+", r"\1", rule) for rule in rules}


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
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(path.read_text(encoding="utf-8")), **changes}, sort_keys=False),
        encoding="utf-8",
    )


# ------------------------------------------------------------------------ reading changes nothing


READING = [("--dry-run", "--quiet", "all"), ("--lint",), ("--summary",), ("--list-rules",), ("--unlock",)]


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_reading_the_workflow_writes_nothing(project: Project, arguments: tuple[str, ...]) -> None:
    before = files_of(project)
    run = project.snakemake(*SMOKE, *arguments)
    assert run.returncode == 0, run.stdout
    assert files_of(project) == before
    assert ("--lint" in arguments) == ("good condition" in run.stdout)


def files_of(project: Project) -> set[Path]:
    """Files without Snakemake's own records, and what Python keeps of modules that it has compiled."""
    aside = {".snakemake", "__pycache__"}
    return {path for path in project.folder.rglob("*") if not aside & {*path.parts}}


def test_a_checkout_that_cannot_be_written_is_refused_in_a_sentence(project: Project) -> None:
    """Snakemake itself must make its folder .snakemake there."""
    mount = f"mount --bind {project.folder} {project.folder} && mount -o remount,bind,ro {project.folder}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a folder for reading only")
    dry_run = f"cd {project.folder} && {sys.executable} -m snakemake --cores 1 --dry-run --quiet all"
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{mount} && {dry_run}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert f"{project.folder}/.snakemake: cannot be written" in run.stdout, run.stdout
    assert "copy the project" in run.stdout
    assert "Traceback" not in run.stdout


# --------------------------------------------------------------------------- what rules declare


@pytest.mark.fast
@pytest.mark.parametrize("rule", rule_texts())
def test_rule_declares_what_a_scheduler_needs(rule: str) -> None:
    text = rule_texts()[rule]
    needs = {"run": "stage.stage.needs", "report": "entry.needs"}[rule]
    resources = (f"mem_mb=memory({needs})", f"runtime=minutes({needs})", "gpu=")
    for declared in ("log:", "benchmark:", "threads:", "conda:", *resources):
        assert declared in text, f"rule {rule} does not declare {declared}"
    assert text.count("{params.command}") == 1, f"rule {rule} must call one stage of the command line"


# ------------------------------------------------------------------------------- the smoke run


OTHERWISE = {"images_fetch", "images_pretrain_pipeline", "images_pretrain_alignment", "versions"}
"""Rules of models that are not shipped, which test_images.py runs; and of conda, as test_whole.py does."""


@pytest.mark.fast
def test_every_rule_ran(finished: Project) -> None:
    ran = kinds(path.name for path in (finished.smoke / "benchmarks").iterdir())
    assert ran == rules_of(finished) - OTHERWISE
    assert {"planar_finetune", "molecules_finetune", "images_finetune", *REPORT} <= ran


@pytest.mark.fast
def test_every_declared_output_exists(finished: Project) -> None:
    summary = finished.snakemake(*SHORT, "--summary").stdout
    outputs = [line.split("\t")[0] for line in summary.splitlines() if line.startswith("results/")]
    assert len(outputs) > 50
    for output in outputs:
        assert (finished.folder / output).stat().st_size > 0, output


@pytest.mark.fast
def test_second_run_has_nothing_to_do(finished: Project) -> None:
    before = times(finished.smoke)
    run = finished.snakemake(*SHORT)
    assert run.returncode == 0, run.stdout
    assert "Nothing to be done" in run.stdout
    assert times(finished.smoke) == before


@pytest.mark.fast
def test_deleted_intermediate_reruns_only_what_depends_on_it(finished: Project) -> None:
    before = times(finished.smoke)
    metrics = (finished.smoke / RUN / "metrics.json").read_bytes()
    (finished.smoke / RUN / "samples.npz").unlink()
    run = finished.snakemake(*SHORT)
    assert run.returncode == 0, run.stdout

    after = times(finished.smoke)
    assert after.keys() == before.keys()
    rerun = {str(path) for path in after if after[path] != before[path]}
    measured_together = [
        f"runs/risk_averse_2d/{method}/seed0" for method in ("pretrained", "am", "fdc", "tfft", "best_of_4")
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


@pytest.mark.fast
def test_metrics_have_one_row_a_method_and_no_nan(finished: Project) -> None:
    assert check_metrics(finished.smoke) >= {"risk_averse_2d", "molecules_qm9", "text_to_image_left_tail"}


@pytest.mark.parametrize(
    ("override", "rerun", "kept"),
    [
        (
            {"objective": {"alpha": 3.0}},
            {"planar_threshold", "planar_finetune", "planar_exact"},
            {"planar_pretrain", "planar_density"},
        ),
        (
            {"title": "Another title"},
            {"table"},
            {"planar_pretrain", "planar_finetune", "planar_measure", "planar_exact"},
        ),
    ],
)
def test_changed_key_reruns_only_the_stages_that_read_it(
    finished: Project, override: dict[str, Any], rerun: set[str], kept: set[str]
) -> None:
    """Which stages read which keys, tests/pipeline says."""
    change = finished.folder / "change.yaml"
    change.write_text(yaml.safe_dump({"overrides": {"planar": override}}))
    jobs = finished.planned(*SHORT, change.name)
    assert rerun <= kinds(jobs)
    assert not kept & kinds(jobs)


def test_committed_tables_do_not_pass_for_a_finished_run(finished: Project, project: Project) -> None:
    for part in ("tables", "figures"):
        shutil.copytree(finished.smoke / part, project.smoke / part)
    shutil.copy(finished.smoke / "provenance.json", project.smoke)
    assert kinds(project.planned(*SHORT)) - {"all"} == rules_of(finished) - OTHERWISE


def test_experiment_is_a_target_of_its_own(project: Project) -> None:
    jobs = project.planned(*SMOKE, "--", "novelty_2d")
    assert jobs["table"] == jobs["figures_novelty_2d"] == 1
    assert kinds(jobs) - rules_of(project) == {"novelty_2d"}
    assert not jobs.keys() & {"compare", "figures_resolution_2d", "provenance"}


# ----------------------------------------------------------------------------------- bad input


def assert_refused(project: Project, *words: str) -> None:
    """Snakemake stops before any job, and says what is wrong without a traceback."""
    run = project.snakemake(*SMOKE)
    assert run.returncode != 0
    for word in words:
        assert word in run.stdout, run.stdout
    assert "Traceback" not in run.stdout
    assert not list((project.folder / "results").rglob("runs"))


def test_an_old_snakemake_is_refused(project: Project) -> None:
    """Here it is one that says so of itself; what it cannot read must not stand in the Snakefile."""
    assert "pathvars" not in (ROOT / "workflow" / "Snakefile").read_text()
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


def test_a_refusal_of_the_plan_is_one_sentence(project: Project) -> None:
    """What else is refused, and in which words, tests/pipeline says."""
    edit(project.folder / "config" / "config.yaml", experiments=["risk_averse_2d", "risk_averse_3d"])
    assert_refused(project, "config/config.yaml: key experiments: unknown", "risk_averse_3d", "novelty_2d")


def test_a_key_that_stands_twice_is_refused(project: Project) -> None:
    file = project.folder / "config" / "smoke.yaml"
    file.write_text(file.read_text() + "\nresults: results/another\n")
    assert_refused(project, "config/smoke.yaml: key results: stands in line 2 and again in line")


def test_numbers_of_the_command_line_are_numbers(project: Project) -> None:
    """As they are in files: Snakemake reads text from within a value, and YAML 1.1's numbers from files."""
    given = (
        "overrides={planar: {seeds: 1, objective: {mass: 8e-1, alpha: -1e0}}}",
        "experiments=[risk_averse_2d]",
    )
    run = project.snakemake("--dry-run", "--config", *given)
    assert run.returncode != 0
    assert "key objective.alpha: Input should be greater than 0 (got -1.0)" in run.stdout


def test_functional_of_a_module_that_is_not_there_is_refused(project: Project) -> None:
    """It takes torch to tell, so that it is told as a run begins, before its first job."""
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
