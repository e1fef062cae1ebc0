"""The README's worked example, run as it stands at a small size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.experiment import load_file
from small import CONFIG, TINY

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
    config, out = tmp_path / "config.yaml", {n: str(tmp_path / n) for n in ("pre", "am", "npz", "json", "d")}
    resolve = ["resolve", str(file), "--name", name, "--override", json.dumps(TINY)]
    stages = [
        [*resolve, "--output", str(config)],
        ["pretrain", str(config), "--seed", "0", "--output", out["pre"], "--history", out["pre"] + ".csv"],
        ["density", str(config), "--model", out["pre"], "--output", out["d"]],
        [
            *("finetune", str(config), "--method", "am", "--seed", "0", "--pretrained", out["pre"]),
            *("--output", out["am"], "--history", out["am"] + ".csv"),
        ],
        [
            *("sample", str(config), "--method", "am", "--seed", "0", "--model", out["am"]),
            *("--output", out["npz"]),
        ],
        [
            *("evaluate", str(config), "--method", "am", "--samples", out["npz"]),
            *("--density", out["d"], "--output", out["json"]),
        ],
    ]
    for words in stages:
        assert main(words) == 0
    row = json.loads(Path(out["json"]).read_text(encoding="utf-8"))["rows"]["am"]
    assert row["worst_1pct_cost"] > row["mean_cost"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_linked_file_exists(page: str) -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^):#]+)[^):]*\)", (root / page).read_text()):
        assert (root / target).exists(), target
