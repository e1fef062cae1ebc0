"""Variables of the environment that hold numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flowtilt.parallel import join_processes
from flowtilt.pipeline.cli import main, prepare_torch
from flowtilt.resuming import SECONDS, Resumption

ROOT = Path(__file__).parents[1]


def seconds() -> float:
    return Resumption(Path("state"), "training").seconds


@pytest.mark.parametrize(
    ("variable", "read", "bad"),
    [
        (SECONDS, seconds, ["abc", "", "-1", "nan", "inf", "-inf", "1 minute"]),
        ("OMP_NUM_THREADS", prepare_torch, ["abc", "", "0", "-2", "1.5", "nan", "inf", "²"]),
        ("WORLD_SIZE", join_processes, ["abc", "", "0", "-2", "2.5"]),
    ],
)
def test_what_is_no_number_is_refused_by_name(
    variable: str, read: Callable[[], object], bad: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in bad:
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=re.escape(f"{variable}={value}: must be a")) as raised:
            read()
        assert "unset it" in str(raised.value)


def test_numbers_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECONDS, raising=False)
    assert seconds() == 60
    for value, expected in (("0", 0.0), ("2.5", 2.5), (" 1e3 ", 1000.0)):
        monkeypatch.setenv(SECONDS, value)
        assert seconds() == expected


def test_a_stage_says_which_variable_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    file = ROOT / "config" / "experiments" / "risk_averse_2d.yaml"
    assert main(["density", str(file), "--seed", "0", "--results", str(tmp_path)]) == 1
    assert "OMP_NUM_THREADS=many" in capsys.readouterr().err


def test_no_other_place_turns_a_variable_into_a_number() -> None:
    pattern = re.compile(r"(?:int|float)\(\s*os\.(?:environ|getenv)")
    for file in (ROOT / "src").rglob("*.py"):
        assert not pattern.search(file.read_text(encoding="utf-8")), file
