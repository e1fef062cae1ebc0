"""YAML as the package reads it: what numbers and words mean, and what is refused for meaning two things."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.yaml_files import YamlError, dump_yaml, parse_yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8e-1", 0.8),
        ("1e3", 1000.0),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5e1", -5.0),
        ("1.0e-05", 1e-5),
        ("+3", 3),
        ("0", 0),
        ("-0", 0),
        ("0o17", 15),
        ("0x1F", 31),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2024-01-31", "2024-01-31"),
        ("'8e-1'", "8e-1"),
        ('"010"', "010"),
        ("1e", "1e"),
        ("e1", "e1"),
        (".", "."),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "-010", "007", "08", "00"])
def test_numbers_that_two_versions_read_differently_are_refused(text: str) -> None:
    with pytest.raises(YamlError, match=rf"key a\.1: {re.escape(text)} in line 3 is .* write -?\d+, or '"):
        parse_yaml(f"a:\n- 1\n- {text}\n")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seeds: 5\nname: a\nseeds: 2\n", "seeds", (1, 3)),
        ("methods:\n  am: {kind: am}\n  am: {kind: fdc}\n", "methods.am", (2, 3)),
        ("a:\n- b: 1\n- c: {d: 1,\n   d: 1}\n", "a.1.c.d", (3, 4)),
        ("a: 1\n'a': 2\n", "a", (1, 2)),
        ("1: a\n'1': b\n", "1", (1, 2)),
        ("x: &x {a: 1}\ny: &y {a: 2}\nz:\n  <<: *x\n  <<: *y\n", "z.<<", (4, 5)),
        ('{"a": 1,\n "a": 2}', "a", (1, 2)),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, key: str, lines: tuple[int, int]) -> None:
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(
        f"key {key}: stands in line {lines[0]} and again in line {lines[1]}; keep one"
    )


def test_a_key_that_stands_twice_in_one_line_is_refused() -> None:
    with pytest.raises(YamlError, match=r"key a\.b: stands in line 1 and again in line 1"):
        parse_yaml("a: {b: 1, b: 1}")


def test_mappings_may_be_merged_into_others() -> None:
    text = "b: &b {x: 1, y: 1}\na: &a {<<: *b, x: 2}\nc: {<<: *a, y: 3}\nd: {<<: [*a, *b], x: 5}\n"
    assert parse_yaml(text) == {
        "b": {"x": 1, "y": 1},
        "a": {"x": 2, "y": 1},
        "c": {"x": 2, "y": 3},
        "d": {"x": 5, "y": 1},
    }


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: 1\n---\na: 2\n", "!!python/object/apply:os.system [ls]", "? [a]\n: 1", "a: " + "9" * 5000],
)
def test_what_is_no_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(YamlError, match="not valid YAML"):
        parse_yaml(text)


TEXTS = [
    "8e-1",
    "1e3",
    "010",
    "0o17",
    "yes",
    "no",
    "1:30",
    "2024-01-31",
    "1_000",
    "null",
    "",
    ".5",
    "<<",
    "ü",
]


@pytest.mark.parametrize(
    "value", [*TEXTS, 0.8, 1e-5, 1e300, 3, -7, True, None, math.inf, [1, "1"], {"1": "on"}]
)
def test_what_is_written_is_read_back(value: Any) -> None:
    written = dump_yaml({"key": value})
    for found in (parse_yaml(written)["key"], yaml.safe_load(written)["key"]):  # and by YAML 1.1
        assert found == value
        assert type(found) is type(value)


def test_every_shipped_file_means_the_same_in_both_versions() -> None:
    files = sorted([*(ROOT / "config").rglob("*.yaml"), *(ROOT / "workflow").rglob("*.yaml")])
    assert len(files) > 15
    for file in files:
        assert parse_yaml(file.read_text(encoding="utf-8")) == yaml.safe_load(
            file.read_text(encoding="utf-8")
        )


def test_yaml_is_read_and_written_in_one_place() -> None:
    """Another reader would have meanings of its own."""
    found = {
        str(file.relative_to(ROOT / "src"))
        for file in (ROOT / "src").rglob("*.py")
        if re.search(r"\bimport yaml\b|\bfrom yaml\b|ruamel", file.read_text(encoding="utf-8"))
    }
    assert found == {"flowtilt/yaml_files.py"}
