"""Deployment by conda, as far as it goes without one: what Snakemake asks of it, and jobs in what it made."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

from environments import FILES, StandInConda, make_environment, rules
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.provenance import packages
from workflow_copy import PROFILE, ROOT, SMOKE, Project

DEPLOY = ("--software-deployment-method", "conda")


@pytest.fixture
def conda(tmp_path: Path) -> StandInConda:
    return StandInConda.in_folder(tmp_path / "conda")


def deploy(project: Project, conda: StandInConda | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Snakemake with the deployment method, and with a conda on the PATH or none."""
    shown = [str(conda.bin)] if conda else []
    held = [part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "conda").exists()]
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *PROFILE, "--cores", "2", *DEPLOY, *SMOKE, *arguments],
        cwd=project.folder,
        env={**os.environ, "PATH": os.pathsep.join([*shown, *held])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


def calls(conda: StandInConda) -> list[list[str]]:
    return [json.loads(line) for line in conda.record.read_text().splitlines()]


def made(project: Project) -> dict[str, Path]:
    """The environments that Snakemake had made, by the name of their file."""
    names = {file.read_text(): file.stem for file in FILES}
    copies = (project.folder / ".snakemake" / "conda").glob("*.yaml")
    return {names[copy.read_text()]: copy.with_suffix("") for copy in copies}


# ------------------------------------------------------------------------------------ planning


def test_a_dry_run_plans_every_environment_and_makes_none(project: Project, conda: StandInConda) -> None:
    run = deploy(project, conda, "--dry-run")
    assert run.returncode == 0, run.stdout
    for file in FILES:
        assert f"Conda environment envs/{file.name} will be created" in run.stdout
    assert not [call for call in calls(conda) if call[:2] == ["env", "create"]]


def test_environments_are_made_alone(project: Project, conda: StandInConda) -> None:
    run = deploy(project, conda, "--conda-create-envs-only")
    assert run.returncode == 0, run.stdout
    created = [dict(pairwise(call)) for call in calls(conda) if call[:2] == ["env", "create"]]
    assert len(created) == len(FILES)
    # Snakemake gives conda a copy of each file, beside the environment: the same bytes, and a prefix.
    assert {Path(options["--file"]).read_text(encoding="utf-8") for options in created} == {
        file.read_text() for file in FILES
    }
    assert {options["--prefix"] for options in created} == {str(prefix) for prefix in made(project).values()}
    assert made(project).keys() == {file.stem for file in FILES}
    assert not (project.smoke / "runs").exists()


# ---------------------------------------------------------------------------------------- jobs


def test_jobs_run_inside_of_their_environments(project: Project, conda: StandInConda) -> None:
    outputs = {"core": "results/smoke/theory/mirror_descent.json", "molecules": "results/smoke/data/qm9.npz"}
    run = deploy(project, conda, "--", *outputs.values())
    assert run.returncode == 0, run.stdout
    environments = made(project)
    assert environments.keys() == outputs.keys()
    for name, output in outputs.items():
        assert (project.folder / output).stat().st_size > 0
        assert f"Activating conda environment: {environments[name].relative_to(project.folder)}" in run.stdout
    activated = conda.activations.read_text().splitlines()[-len(outputs) :]
    assert {*activated} == {str(prefix) for prefix in environments.values()}


def test_versions_of_every_environment_are_recorded(finished: Project, conda: StandInConda) -> None:
    """Of packages that no environment but a domain's has, and of Snakemake, which none has."""
    run = deploy(finished, conda, "--rerun-triggers", "mtime", "--", "results/smoke/provenance.json")
    assert run.returncode == 0, run.stdout
    assert "4 of 4 steps" in run.stdout  # versions in three environments, and nothing else before
    record = json.loads((finished.smoke / "provenance.json").read_text())
    assert record["versions"].keys() == {"python", *packages()}
    assert record["versions"] == {name: installed(name) for name in record["versions"]}
    assert record["environments"].keys() == {file.stem for file in FILES}
    assert "rdkit" not in record["environments"]["core"]
    assert record["environments"]["molecules"]["rdkit"] == installed("rdkit")


def installed(package: str) -> str:
    """The version that is installed here; all environments are links to it."""
    if package == "flowtilt":
        return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    return platform.python_version() if package == "python" else version(package)


# ------------------------------------------------------------------------------ every rule's job


KINDS = {
    "planar_measure": ("risk_averse_2d", "ot_2d", "entropy_2d"),
    "table": (
        *("risk_averse_2d", "resolution_2d", "ot_2d", "hierarchy_2d", "solvers_2d"),
        *("molecules", "text_to_image"),
    ),
    "figures_planar": ("risk_averse_2d", "ot_2d", "resolution_2d", "hierarchy_2d", "solvers_2d"),
    "figures_molecules": ("molecules_qm9", "molecules_tail_sweep"),
}
"""Files whose jobs import other modules than those of other files do, by rule."""

NOT_RUN = {"images_fetch", "images_pretrain_pipeline", "images_pretrain_alignment"}
"""Rules of models that are not shipped; the smoke configuration has no jobs of them."""


def kind_of(rule: str) -> str:
    """Name of a rule without its file's; figures go by their domain, whose environment they are drawn in."""
    if (figures := re.match(r"figures_(\w+)", rule)) is not None:
        cases = load_file(ROOT / "config" / "experiments" / f"{figures[1]}.yaml")
        return f"figures_{next(iter(cases.values())).domain}"
    return re.sub(r"^(planar_measure)_\w+", r"\1", rule)


@pytest.fixture(scope="module")
def commands(finished: Project) -> dict[str, list[str]]:
    """The shell commands of every rule's jobs, by the rule's name."""
    run = finished.snakemake(*SMOKE, "--forceall", "--dry-run", "--printshellcmds")
    assert run.returncode == 0, run.stdout
    found: dict[str, list[str]] = {rule: [] for rule in rules()}
    for block in re.split(r"^ *(?:local)?rule ", run.stdout, flags=re.MULTILINE)[1:]:
        rule = kind_of(block.split(":")[0])
        command = re.search(r"^ *Shell command: (.*)$", block, re.MULTILINE)
        if rule in found and command is not None:
            found[rule].append(command[1])
    return found


@pytest.fixture(scope="module")
def jobs(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A copy of the finished project, and an environment for each file."""
    folder = tmp_path_factory.mktemp("jobs")
    project = Project(folder / "project")
    shutil.copytree(finished.folder, project.folder, ignore=shutil.ignore_patterns(".snakemake"))
    prefixes = {file.stem: folder / file.stem for file in FILES}
    for file in FILES:
        make_environment(file, prefixes[file.stem])
    return project.folder, prefixes


@pytest.mark.parametrize(
    ("rule", "of"),
    [(rule, file) for rule in rules() if rule not in NOT_RUN for file in KINDS.get(rule, ("",))],
)
def test_every_rules_job_runs_with_what_its_environment_holds(
    rule: str, of: str, commands: dict[str, list[str]], jobs: tuple[Path, dict[str, Path]]
) -> None:
    folder, prefixes = jobs
    stage, environment = rules()[rule]
    # A name alone may also stand in the overrides that every command has.
    command = next(line for line in commands[rule] if f"/{of}" in line).split(" > ")[0]
    command = re.sub(r"^export PATH=\S+; ", "", command)
    assert shlex.split(command)[1:3] == ["flowtilt", stage]
    held = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    places = [folder / "workflow" / "bin", prefixes[environment] / "bin", "/usr/bin", "/bin"]
    run = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**held, "PATH": os.pathsep.join(map(str, places))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--conda-create-envs-only",)])
def test_without_conda_snakemake_says_so(project: Project, arguments: tuple[str, ...]) -> None:
    """What to do instead, `flowtilt doctor` says."""
    run = deploy(project, None, *arguments)
    assert run.returncode != 0
    assert "Is conda installed and accessible?" in run.stdout
    assert "Traceback" not in run.stdout
    assert not (project.smoke / "configs").exists()
