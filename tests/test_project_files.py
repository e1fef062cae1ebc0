"""Files about the project: they agree with each other and with the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "type"} <= citation.keys()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(citation["date-released"]))


def test_every_reference_of_the_citation_is_whole() -> None:
    for work in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]:
        assert {"type", "title", "authors", "year"} <= work.keys(), work["title"]
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", work["identifiers"][0]["value"])
        assert work["identifiers"][0]["value"] in (ROOT / "README.md").read_text(), work["title"]


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    dates = dict(heading.split(" - ") for heading in headings[1:])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert dates[PROJECT["version"]] == str(citation["date-released"])
    assert list(dates.values()) == sorted(dates.values(), reverse=True)


def test_every_file_that_the_changelog_links_is_there() -> None:
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / "CHANGELOG.md").read_text())
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_what_the_workflow_catalog_is_told() -> None:
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage.keys() == {"mandatory-flags", "software-stack-deployment", "report"}
    assert usage["mandatory-flags"].keys() == {"desc", "flags"}
    rules = [file.read_text() for file in (ROOT / "workflow" / "rules").glob("*.smk")]
    deployment = usage["software-stack-deployment"]
    assert deployment["conda"] == any("conda:" in text for text in rules)
    assert deployment["apptainer"] == any("container:" in text for text in rules)
    assert deployment["apptainer+conda"] == (deployment["conda"] and deployment["apptainer"])
    assert usage["report"] == any("report(" in text for text in rules)
    # The catalog lists workflows whose README has both words, with instructions for their configuration.
    readme = (ROOT / "README.md").read_text().lower()
    assert "snakemake" in readme
    assert "workflow" in readme
    assert (ROOT / "config" / "README.md").is_file()
