"""The whole smoke configuration, `make quick`: all experiments and studies, each job in its environment."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import yaml

from environments import FILES, MOLECULES, StandInConda, rules
from flowtilt.pipeline.report.provenance import packages
from workflow_copy import ROOT, SMOKE, Project, check_metrics, environments_of

NOT_RUN = {"images_fetch", "images_pretrain_pipeline", "images_pretrain_alignment"}
"""Rules of models that are not shipped; test_images.py runs them."""

ENVIRONMENTS = {file.stem for file in FILES} - (set() if MOLECULES else {"molecules"})


def listed(project: Project, key: str) -> list[str]:
    """What the configuration lists under a key."""
    return yaml.safe_load((project.folder / "config" / "config.yaml").read_text(encoding="utf-8"))[key]


# ------------------------------------------------------------------------------------ what is made


def test_every_rule_ran_and_nothing_is_left(whole: Project) -> None:
    wanted = {re.sub(r"^figures_\w+", "figures", rule) for rule in rules()} - NOT_RUN | {"versions"}
    if not MOLECULES:
        wanted -= {rule for rule in wanted if rule.startswith("molecules_")}
    ran = {path.name for path in (whole.smoke / "benchmarks").iterdir()}
    assert {re.sub(r"^(planar_measure)_\w+", r"\1", rule) for rule in ran} == wanted
    again = whole.deploy(StandInConda(whole.folder / "conda"), *SMOKE, "--dry-run")
    assert again.returncode == 0, again.stdout
    assert "Nothing to be done" in again.stdout


def test_every_experiment_and_study_has_its_table_and_figures(whole: Project) -> None:
    names = [*listed(whole, "experiments"), *(f"theory_{name}" for name in listed(whole, "theory"))]
    assert len(names) > 10
    for name in names:
        for file in (*(f"tables/{name}.{kind}" for kind in ("csv", "md", "tex")), f"pages/{name}.html"):
            assert (whole.smoke / file).stat().st_size > 0, file
        figures = list((whole.smoke / "figures").glob(f"{name}*.png"))
        assert figures, name
        for figure in figures:
            assert figure.read_bytes().startswith(b"\x89PNG"), figure
    if MOLECULES:
        assert "reported (ftfc)" in (whole.smoke / "tables" / "molecules_qm9.md").read_text()
        assert "| plain |" in (whole.smoke / "tables" / "molecules_tail_sweep.md").read_text()
    assert "Vendi score" in (whole.smoke / "tables" / "text_to_image_entropy.md").read_text()


def test_metrics_have_one_row_a_method_and_no_nan(whole: Project) -> None:
    assert check_metrics(whole.smoke) == {*listed(whole, "experiments")}


def test_the_values_are_those_of_the_short_run(whole: Project, finished: Project) -> None:
    """Beside other experiments, in other environments, and in another folder."""
    short = yaml.safe_load((finished.folder / "config" / "short.yaml").read_text(encoding="utf-8"))
    # A table without the methods that the short run leaves out is another one.
    alike = {*short["experiments"]} - {*short["overrides"]["skip"]}
    tables = [*alike, *(f"theory_{name}" for name in short["theory"])]
    made = [*finished.smoke.rglob("metrics.json"), *finished.smoke.glob("theory/*")]
    made += [file for name in tables for file in finished.smoke.glob(f"tables/{name}.*")]
    assert {"metrics.json", *(f"{name}.csv" for name in tables)} <= {file.name for file in made}
    for file in made:
        same = whole.smoke / file.relative_to(finished.smoke)
        if file.name == "metrics.json":  # rows of methods, and tails of their masses, that are left out
            rows, more = (json.loads(one.read_text(encoding="utf-8"))["rows"] for one in (file, same))
            assert rows == {row: {name: more[row][name] for name in rows[row]} for row in rows}, file
        else:
            assert file.read_bytes() == same.read_bytes(), file


# -------------------------------------------------------------------------------- the environments


def test_environments_are_made_of_their_files(whole: Project) -> None:
    created = [call for call in StandInConda(whole.folder / "conda").calls() if call[:2] == ["env", "create"]]
    assert len(created) == len(ENVIRONMENTS)
    made = environments_of(whole)
    assert made.keys() == ENVIRONMENTS
    # Snakemake gives conda a copy of each file, beside the environment: the same bytes, and a prefix.
    options = [dict(pairwise(call)) for call in created]
    assert {one["--prefix"] for one in options} == {str(prefix) for prefix in made.values()}
    assert {Path(one["--file"]).read_text(encoding="utf-8") for one in options} == {
        file.read_text(encoding="utf-8") for file in FILES if file.stem in ENVIRONMENTS
    }
    for prefix in made.values():  # the package is none of what they hold
        command = [prefix / "bin" / "python", "-I", "-c", "import flowtilt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "No module named 'flowtilt'" in done.stderr


def test_every_job_ran_inside_of_an_environment(whole: Project) -> None:
    activated = StandInConda(whole.folder / "conda").activations.read_text(encoding="utf-8").splitlines()
    assert len(activated) >= len(list((whole.smoke / "benchmarks").rglob("*.tsv")))
    assert {*activated} == {str(prefix) for prefix in environments_of(whole).values()}


def test_versions_of_every_environment_are_recorded(whole: Project) -> None:
    """Of packages that no environment but a domain's has, and of Snakemake, which none has."""
    record = json.loads((whole.smoke / "provenance.json").read_text(encoding="utf-8"))
    assert record["versions"].keys() == {"python", *packages()}
    assert record["versions"] == {name: installed(name) for name in record["versions"]}
    assert record["environments"].keys() == ENVIRONMENTS
    assert "rdkit" not in record["environments"]["core"]
    if MOLECULES:
        assert record["environments"]["molecules"]["rdkit"] == installed("rdkit")


def installed(package: str) -> str:
    """The version that is installed here; all environments are links to it."""
    if package == "flowtilt":
        return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    return platform.python_version() if package == "python" else version(package)
