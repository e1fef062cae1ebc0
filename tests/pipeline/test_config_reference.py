"""The reference of the configuration: up to date, whole, and true to what the code has."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.functionals.critic import CriticSettings
from flowtilt.functionals.design import FEATURES
from flowtilt.functionals.keys import DIVERGENCE_KEYS, UTILITY_KEYS, Key
from flowtilt.functionals.registry import DIVERGENCES, UTILITIES, Entry
from flowtilt.pipeline import config_reference
from flowtilt.pipeline.cli import main
from flowtilt.pipeline.config import OverridesConfig, WorkflowConfig
from flowtilt.pipeline.config_reference import anchor, chapters, field_texts, reference
from flowtilt.pipeline.configuration import Section
from flowtilt.pipeline.experiment import Skip, load_file
from small import CONFIG

ROOT = CONFIG.parent
COMMITTED = (CONFIG / "README.md").read_text(encoding="utf-8")
COLUMNS = "| key | type and range | default | meaning |"


def tables() -> Iterator[tuple[str, list[list[str]]]]:
    """Every table of keys: the heading that it stands under, and its cells."""
    for part in re.split(r"^##+ ", COMMITTED, flags=re.MULTILINE):
        if COLUMNS in part:
            lines = [line for line in part.splitlines() if line.startswith("| `")]
            yield (
                part.splitlines()[0],
                [[c.strip() for c in re.split(r"(?<!\\)\|", li)[1:-1]] for li in lines],
            )


def test_the_committed_file_is_what_is_written(tmp_path: Path) -> None:
    output = tmp_path / "README.md"
    output.write_text(COMMITTED, encoding="utf-8")
    assert main(["config-reference", "--output", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == COMMITTED, "config/README.md is out of date: run `make docs`"


def test_every_key_has_a_sentence() -> None:
    found = list(tables())
    assert len(found) > 40
    for heading, rows in found:
        assert rows, heading
        for row in rows:
            assert all(row), f"{heading}: {row}"
            assert len(row[3].strip("`. ").split()) > 1, f"{heading}: {row}"


def keys_below(data: Any, kind: type[Section]) -> Iterator[tuple[type[Section], str]]:
    """Every key of some configuration, with the section that it belongs to."""
    loaded = kind.model_validate(data)

    def walk(section: Any) -> Iterator[tuple[type[Section], str]]:
        if isinstance(section, Section):
            for key in type(section).model_fields:
                yield type(section), key
                yield from walk(getattr(section, key))
        elif isinstance(section, dict):
            for inner in section.values():
                yield from walk(inner)

    return walk(loaded)


@pytest.mark.parametrize("file", sorted((CONFIG / "experiments").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_key_of_an_experiment_is_in_the_reference(file: Path) -> None:
    known = {row[0].strip("`") for _, rows in tables() for row in rows}
    for experiment in load_file(file).values():
        for kind, key in keys_below(experiment.model_dump(), type(experiment)):
            assert key in known
            assert field_texts(kind)[key] in COMMITTED.replace("\\|", "|"), f"{kind.__name__}.{key}"


def test_keys_of_the_workflow_are_those_that_it_takes() -> None:
    found = dict(tables())
    rows = found["The workflow: `config.yaml`"]
    for own, kind in (
        (rows, WorkflowConfig),
        (found["`overrides`"], OverridesConfig),
        (found["`overrides.skip`"], Skip),
    ):
        assert [row[0].strip("`") for row in own] == [*kind.model_fields]
    required = {row[0].strip("`") for row in rows if row[2] == "*required*"}
    assert required == {key for key, field in WorkflowConfig.model_fields.items() if field.is_required()}


def test_every_link_has_its_heading() -> None:
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", COMMITTED, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", COMMITTED))
    assert len(links) > 30
    assert links <= anchors


def test_headings_are_unique() -> None:
    headings = re.findall(r"^#+ (.*)$", COMMITTED, re.MULTILINE)
    assert len(headings) == len(set(headings))


# ----------------------------------------------------------------------------- functionals


def nested(entry: Entry, key: str) -> dict[str, Any]:
    """Names and defaults of the fields of a parameter that is a mapping."""
    kinds = {"critic": [CriticSettings], "features": list(FEATURES.values())}[key]
    found: dict[str, Any] = {} if key == "critic" else {"kind": None}
    return found | {f.name: f.default for kind in kinds for f in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("registry", "documented"),
    [(UTILITIES, UTILITY_KEYS), (DIVERGENCES, DIVERGENCE_KEYS)],
    ids=["utilities", "divergences"],
)
def test_functionals_are_those_of_the_registry(registry: Any, documented: Any) -> None:
    assert documented.keys() == registry.keys()
    for name, entry in registry.items():
        own = {field.name: field.default for field in dataclasses.fields(entry.functional)}
        wanted: dict[str, Any] = {}
        for key, parameter in entry.parameters.items():
            if key in ("critic", "features"):
                wanted |= {f"{key}.{inner}": default for inner, default in nested(entry, key).items()}
            else:
                wanted[key] = None if parameter.required else own[key]
        said: dict[str, Key] = documented[name].keys
        assert {key: one.default for key, one in said.items()} == wanted, name


# -------------------------------------------------------------------------- prose and example


def test_the_example_of_a_scale_of_ones_own_works() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", COMMITTED, re.DOTALL)
    overrides = yaml.safe_load(block)["overrides"]
    (experiment,) = load_file(CONFIG / "experiments" / "risk_averse_2d.yaml", overrides).values()
    assert experiment.seeds == [0, 1]
    assert experiment.solver.updates == 400
    (shipped,) = load_file(CONFIG / "experiments" / "risk_averse_2d.yaml").values()
    assert [*shipped.methods] == [*list(experiment.methods)[:2], "fdc", *list(experiment.methods)[2:]]


def test_columns_of_the_reported_values() -> None:
    with (CONFIG / "reported_results.csv").open(newline="") as stream:
        header = next(csv.reader(stream))
    part = COMMITTED.split("## Reported values")[1].split("## Where")[0]
    assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == header


def test_every_file_that_it_names_is_there() -> None:
    for file in re.findall(r"`((?:src|workflow|docs)/[\w./-]+)`", COMMITTED):
        assert (ROOT / file).exists(), file


# ------------------------------------------------------------------------------- bad input


class Undescribed(Section):
    """A section with a key that nobody has described."""

    described: int
    """Says something."""

    nameless: int


def test_a_key_without_a_sentence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = chapters()[0]._replace(kind=Undescribed)
    monkeypatch.setattr(config_reference, "chapters", lambda: (chapter,))
    config_reference._all_sections.cache_clear()
    try:
        with pytest.raises(ValueError, match="key nameless of Undescribed has no description"):
            reference()
    finally:
        config_reference._all_sections.cache_clear()


def test_it_needs_no_torch(tmp_path: Path) -> None:
    words = ["config-reference", "--output", str(tmp_path / "README.md")]
    code = f"import sys; from flowtilt.pipeline.cli import main; main({words!r})"
    code += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
