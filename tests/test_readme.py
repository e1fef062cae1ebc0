"""The README's worked example, run as it stands at a small size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from by_hand import Folder
from flowtilt.pipeline.cli import main
from flowtilt.pipeline.experiment import load_file, load_resolved
from small import CONFIG, TINY, in_plane

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The one fenced block of a language that contains some words."""
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in b]
    assert len(found) == 1
    return found[0]


def test_the_worked_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_landscapes.py").write_text(block("python", "class Rings"))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "risk_averse_2d.yaml").write_text((CONFIG / "experiments" / "risk_averse_2d.yaml").read_text())
    file = folder / "rings_2d.yaml"
    file.write_text(block("yaml", "rings_2d"))
    (name,) = load_file(file)
    config, results = str(tmp_path / "config.yaml"), tmp_path / "results"
    override = json.dumps(in_plane(**TINY))
    assert main(["resolve", str(file), "--name", name, "--override", override, "--output", config]) == 0
    stages = Folder(results, load_resolved(config))
    stages.pretrain()
    for stage, method in (("offline", ""), ("threshold", "tfft"), ("finetune", "am"), ("finetune", "tfft")):
        assert stages.run(stage, method) == 0
    row = stages.rows()["am"]
    assert row["worst_1pct_cost"] > row["mean_cost"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_linked_file_exists(page: str) -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^):#]+)[^):]*\)", (root / page).read_text()):
        assert (root / target).exists(), target
