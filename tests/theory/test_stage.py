"""The stages of the theory: files in, files out, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.theory.config import load_theory
from small import CONFIG

SMOKE = yaml.safe_load((CONFIG / "smoke.yaml").read_text())["theory_overrides"]
NAMES = ("mirror_descent", "threshold", "tilts")


def file_of(name: str) -> Path:
    return CONFIG / "theory" / f"{name}.yaml"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow_after(1)
def test_a_study_ends_in_a_table_and_a_figure(name: str, tmp_path: Path) -> None:
    result, prefix, figure = tmp_path / "result.json", tmp_path / "tables" / "t", tmp_path / "f.png"
    words = ["theory", str(file_of(name)), "--override", json.dumps(SMOKE[name]), "--output", str(result)]
    assert main(words) == 0
    tables = json.loads(result.read_text(), parse_constant=pytest.fail)["tables"]
    words = ["theory-report", str(result), "--output-prefix", str(prefix), "--figure", str(figure)]
    assert main(words) == 0
    frame = pd.read_csv(f"{prefix}.csv")
    assert frame["part"].value_counts().to_dict() == {part: len(rows) for part, rows in tables.items()}
    for extension, words_in_it in ((".md", "| --- |"), (".tex", r"\toprule")):
        text = Path(f"{prefix}{extension}").read_text(encoding="utf-8")
        assert words_in_it in text
        assert "nan" not in text
        assert "violated" not in text
    with Image.open(figure) as image:
        assert min(image.size) > 500
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow_after(1)
def test_the_same_configuration_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    small = {
        "mirror_descent": {"iterations": 4, "grid": {"cells": 6}},
        "threshold": {
            "batches": {"sizes": [20, 40, 80], "rewards": 200, "fewest": 3, "fit_from": 20},
            "descent": {"batch": 20, "updates": 20},
            "shift": {"deltas": [0.1]},
        },
        "tilts": SMOKE["tilts"],
    }
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file in files:
        words = ["theory", str(file_of(name)), "--override", json.dumps(small[name])]
        assert main([*words, "--output", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_studies_start_without_torch() -> None:
    code = "import sys, flowtilt.pipeline.theory.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("mirror_descent", {"iterations": 1}, "key iterations"),
        ("mirror_descent", {"grid": {"cell": 9}}, "key grid.cell: unknown"),
        ("mirror_descent", {"problems": {"entropy": {"alpha": 0}}}, "problems.entropy.alpha"),
        ("mirror_descent", {"problems": {"entropy": {"ridge": 1}}}, "entropy has no ridge; remove it"),
        ("mirror_descent", {"problems": {"new": {"utility": "entropy", "alpha": 1}}}, "needs weight; add it"),
        ("mirror_descent", {"problems": {"entropy": {"multiples": [0.5]}}}, "problems.entropy.multiples"),
        ("mirror_descent", {"kind": "mirrors"}, "key kind: must be one of mirror_descent, threshold, tilts"),
        ("mirror_descent", {"name": "other"}, "key name: must be the file's own"),
        ("threshold", {"batches": {"sizes": [100, 100, 200]}}, "sizes must rise"),
        ("threshold", {"batches": {"fit_from": 10**6}}, "fit_from (1000000) leaves fewer than three"),
        ("threshold", {"problems": {"gaussian": {"mass": 1.0}}}, "problems.gaussian.mass"),
        ("threshold", {"problems": {"gaussian": {"distribution": {"means": []}}}}, "one entry per component"),
        ("threshold", {"shift": {"deltas": [-0.1]}}, "shift.deltas"),
    ],
)
def test_bad_configurations_name_file_and_key(name: str, override: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_theory(file_of(name), override)
    assert words in str(caught.value)
    assert str(file_of(name)) in str(caught.value)


def test_infeasible_barrier_ends_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override = {"grid": {"cells": 8}, "problems": {"log_barrier": {"budget": 0.1}}}
    output = tmp_path / "result.json"
    words = ["theory", str(file_of("mirror_descent")), "--override", json.dumps(override)]
    assert main([*words, "--output", str(output)]) == 1
    said = capsys.readouterr().err
    assert "problem log_barrier" in said
    assert "raise the budget" in said
    assert str(file_of("mirror_descent")) in said
    assert not output.exists()


@pytest.mark.parametrize("damage", ["missing", "{", "{}", '{"kind": "threshold", "title": "", "tables": {}}'])
def test_bad_results_are_explained(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    if damage != "missing":
        result.write_text(damage)
    words = ["theory-report", str(result), "--output-prefix", str(tmp_path / "t")]
    assert main([*words, "--figure", str(tmp_path / "f.png")]) == 1
    assert str(result) in capsys.readouterr().err
    assert not (tmp_path / "f.png").exists()
