"""A domain of another package: found by its entry point, planned, run and shown by the same workflow."""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml

from workflow_copy import ROOT, Project

TOY = ROOT / "tests" / "toy_domain"
METHODS = ["pretrained", "am", "fdc", "tfft", "best_of_4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the toy's experiment alone has been run."""
    folder = tmp_path_factory.mktemp("toy")
    project = Project.copied_to(folder / "project")
    shutil.copy(TOY / "compass.yaml", project.folder / "config" / "experiments")
    config = {"results": "results", "experiments": ["compass"]}
    (project.folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        packages = installed(folder / "packages")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]))
        done = project.snakemake()
        assert done.returncode == 0, done.stdout[-4000:]
        assert project.planned() == {}
        report = project.snakemake("--report", "report.html")
        assert report.returncode == 0, report.stdout[-4000:]
    return project


def installed(packages: Path) -> Path:
    """The toy as pip installs it: its modules, and the entry points of its pyproject.toml."""
    shutil.copytree(TOY / "circle_domain", packages / "circle_domain")
    project = tomllib.loads((TOY / "pyproject.toml").read_text())["project"]
    data = packages / f"circle_domain-{project['version']}.dist-info"
    data.mkdir()
    (data / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["flowtilt.domains"]
    lines = [f"{name} = {value}" for name, value in points.items()]
    (data / "entry_points.txt").write_text("\n".join(["[flowtilt.domains]", *lines, ""]))
    return packages


def test_methods_raise_what_they_are_for(run: Project) -> None:
    table = pd.read_csv(run.folder / "results" / "tables" / "compass.csv")
    values = table.set_index(["method", "metric"])["value"]
    mean, tail = (values.xs(metric, level="metric") for metric in ("mean_reward", "top_20pct_reward"))
    assert list(mean.index) == METHODS
    assert mean["am"] > mean["pretrained"] + 0.1
    assert min(mean["fdc"], mean["tfft"], mean["best_of_4"]) > mean["pretrained"]
    assert tail[["am", "fdc", "tfft"]].min() > tail["pretrained"]


def test_its_metrics_have_its_words(run: Project) -> None:
    text = (run.folder / "results" / "tables" / "compass.md").read_text()
    assert "mean resultant length" in text
    assert "Angles towards a direction: one seed" in text


def test_it_is_in_what_is_made_of_all_experiments(run: Project) -> None:
    results = run.folder / "results"
    for table in ("comparison", "by_seed"):
        assert set(pd.read_csv(results / "tables" / f"{table}.csv")["method"]) == {*METHODS}
    assert "compass" in (results / "tables" / "costs.md").read_text()
    assert (results / "figures" / "compass.png").read_bytes().startswith(b"\x89PNG")
    assert "Every method of" in (run.folder / "report.html").read_text()


def test_what_trains_nothing_says_what_its_samples_cost(run: Project) -> None:
    tables = run.folder / "results" / "tables"
    assert "| best_of_4 | 160.0 | 40.00 | 4.000 | 0.6363 |" in (tables / "compass.md").read_text()
    costs = pd.read_csv(tables / "costs.csv").set_index("method")
    assert costs.loc["best_of_4", ["sample_passes", "sample_rewards"]].tolist() == [160, 4]
    assert costs.loc["am", ["sample_passes", "sample_rewards"]].tolist() == [40, 0]
    # As many samples as take the passes of am, beyond those of plain ones.
    assert costs.loc["best_of_4", "even"] == costs.loc["am", "passes"] / 120
    assert costs.loc["best_of_4", "keep"] > 0


def test_nothing_of_other_domains_is_run(run: Project) -> None:
    results = run.folder / "results"
    assert {path.name for path in (results / "runs").iterdir()} == {"compass"}
    assert not (results / "resolution.json").exists()


def test_it_is_as_short_as_an_example_must_be() -> None:
    assert sum(len(file.read_text().splitlines()) for file in TOY.rglob("*.py")) <= 250
