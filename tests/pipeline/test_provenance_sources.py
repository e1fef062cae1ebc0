"""Which sources made a record: a commit only where it is of these sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowtilt.pipeline.report import provenance
from flowtilt.pipeline.report.measurements import ResultsError
from flowtilt.pipeline.report.provenance import commit, versions, write_provenance

GIT = ["git", "-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run([*GIT, *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


def repository(folder: Path) -> str:
    """A repository with one file of its own; its commit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.txt").write_text("x", encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", "own.txt")
    git(folder, "commit", "-qm", "own")
    return git(folder, "rev-parse", "HEAD")


def unpacked(folder: Path) -> Path:
    """A copy of the sources, as they are unpacked into a folder."""
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(provenance.SOURCES, folder / "src/flowtilt", ignore=leave)
    return folder


def recorded(project: Path, where: Path, **environment: str) -> dict:
    """What the sources of a folder say of themselves, run elsewhere."""
    code = "import json; from flowtilt.pipeline.report.provenance import commit; print(json.dumps(commit()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(project / "src"), **environment},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout)


def edit(project: Path) -> None:
    with (project / "src/flowtilt/seeding.py").open("a", encoding="utf-8") as stream:
        stream.write("# edited\n")


def test_a_foreign_repository_around_the_sources_is_not_their_commit(tmp_path: Path) -> None:
    repository(tmp_path / "outer")
    project = unpacked(tmp_path / "outer" / "vendor")
    first = recorded(project, tmp_path / "outer")
    assert (first["hash"], first["modified"]) == (None, None)
    assert "not tracked" in first["reason"]
    edit(project)
    assert recorded(project, project)["sources"] != first["sources"]


def test_sources_of_a_repository_have_its_commit_wherever_they_run(tmp_path: Path) -> None:
    project = unpacked(tmp_path / "project")
    repository(project)
    git(project, "add", "src")
    git(project, "commit", "-qm", "sources")
    head = git(project, "rev-parse", "HEAD")
    foreign = tmp_path / "foreign"
    other = repository(foreign)
    for where in (project, foreign):
        found = recorded(project, where)
        assert (found["hash"], found["modified"]) == (head, False)
        assert "reason" not in found
    assert recorded(project, foreign, GIT_DIR=str(foreign / ".git"))["hash"] == head != other
    before = found["sources"]
    edit(project)
    found = recorded(project, foreign)
    assert (found["hash"], found["modified"]) == (head, True)
    assert found["sources"] != before


def test_a_repository_that_tracks_unpacked_sources_has_their_commit(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    repository(outer)
    project = unpacked(outer / "vendor")
    git(outer, "add", "vendor")
    git(outer, "commit", "-qm", "vendored")
    assert recorded(project, tmp_path)["hash"] == git(outer, "rev-parse", "HEAD")
    (project / "src/flowtilt/new.py").write_text("", encoding="utf-8")
    assert recorded(project, tmp_path)["modified"] is True


def test_without_git_the_sources_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = commit()
    assert found["hash"] is found["modified"] is None
    assert "git" in found["reason"]
    assert len(found["sources"]) == 64


def test_a_package_that_is_not_there_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found["torch"][0].isdigit()
    assert found["no-such-package"] == "not in this environment"
    assert None not in found.values()


def test_versions_of_other_environments_stand_where_this_one_lacks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "packages", lambda: ["torch", "tblite-of-another"])
    core, molecules = tmp_path / "core.json", tmp_path / "molecules.json"
    provenance.write_versions(core)
    molecules.write_text('{"torch": "9.9", "tblite-of-another": "0.8.0"}', encoding="utf-8")
    output = tmp_path / "provenance.json"
    write_provenance("a" * 64, tmp_path, output, environments=[core, molecules], snakemake="9.17.0")
    record = json.loads(output.read_text(encoding="utf-8"))
    own = versions()["torch"]
    assert record["versions"]["torch"] == own != "9.9"
    assert record["versions"]["tblite-of-another"] == "0.8.0"
    assert record["versions"]["snakemake"] == "9.17.0"
    assert record["environments"]["molecules"] == {"torch": "9.9", "tblite-of-another": "0.8.0"}
    assert "tblite-of-another" not in record["environments"]["core"]
    molecules.write_text("[]", encoding="utf-8")
    with pytest.raises(ResultsError, match=r"molecules\.json: not the versions of an environment"):
        write_provenance("a" * 64, tmp_path, output, environments=[molecules])


def test_the_version_of_flowtilt_is_that_of_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not that of a package which is installed beside them."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "7.7"\n', encoding="utf-8")
    monkeypatch.setattr(provenance, "SOURCES", tmp_path / "src")
    assert versions()["flowtilt"] == "7.7"
