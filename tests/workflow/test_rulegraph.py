"""The committed picture of the rules is the one of today's workflow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workflow_copy import ROOT, Project


@pytest.mark.fast
def test_the_committed_picture_is_up_to_date(project: Project, tmp_path: Path) -> None:
    dot = subprocess.run(
        [sys.executable, "-m", "snakemake", "--quiet", "all", "--rulegraph"],
        cwd=project.folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    picture = tmp_path / "rulegraph.svg"
    script = project.folder / "workflow" / "scripts" / "rulegraph.py"
    subprocess.run([sys.executable, str(script), str(picture)], input=dot, text=True, check=True, timeout=60)
    assert picture.read_text() == (ROOT / "docs" / "rulegraph.svg").read_text(), "run `make docs`"
