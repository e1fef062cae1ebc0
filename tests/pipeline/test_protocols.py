"""The papers' protocols: what docs/protocols.md says, and what config/paper.yaml plans."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.pipeline.checks import read_plan
from flowtilt.pipeline.configuration import ConfigError, merge
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.plan import Plan
from small import CONFIG
from workflow_copy import ROOT

PAGE = (ROOT / "docs" / "protocols.md").read_text()
ROW = re.compile(r"^\|[^|]+\| `([a-z0-9_.]+)` \| `([^`]+)` \|[^|]+\|$", re.MULTILINE)
SECTIONS = {"text_to_image_left_tail": "## Stable Diffusion 1.5", "molecules_qm9": "## QM9"}


def plan_of(**changes: Any) -> Plan:
    data: dict[str, Any] = {}
    for name in ("config", "paper"):
        data = merge(data, yaml.safe_load((CONFIG / f"{name}.yaml").read_text()))
    return read_plan(merge(data, changes), "config/paper.yaml")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)
    return plan_of()


def section(heading: str) -> str:
    return PAGE.split(heading, 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(("name", "rows"), [("text_to_image_left_tail", 27), ("molecules_qm9", 25)])
def test_each_number_of_the_page_is_what_is_planned(planned: Plan, name: str, rows: int) -> None:
    data = planned.files[name][name].model_dump(mode="json")
    found = ROW.findall(section(SECTIONS[name]))
    assert len(found) == rows
    for key, text in found:
        value: Any = data
        for part in key.split("."):
            value = value[part]
        assert value == yaml.safe_load(text), key


def test_the_updates_of_the_page_add_up(planned: Plan) -> None:
    solver = planned.files["text_to_image_left_tail"]["text_to_image_left_tail"].solver
    assert round(solver.warmup * solver.updates) == 20
    assert solver.buffer is not None
    assert solver.updates % (solver.passes * solver.buffer // solver.batch) == 0
    qm9 = planned.files["molecules_qm9"]["molecules_qm9"]
    masses = qm9.masses_of("tfft")
    assert (masses[0], masses[119] > 0.002, masses[120]) == (1.0, True, pytest.approx(0.002))
    assert qm9.own_updates_of("fdc") == 20


def test_every_solver_of_the_papers_scale_has_settings_that_its_code_takes(planned: Plan) -> None:
    from flowtilt.interpolants import time_grid
    from flowtilt.pipeline.solvers import adjoint_matching_settings, fitting_settings

    checked = 0
    for cases in planned.files.values():
        for case in cases.values():
            for name, method in case.methods.items():
                if method.tuned:
                    solver, updates = case.solver_of(name), case.updates_of(name)
                    if solver.kind == "adjoint_matching":
                        adjoint_matching_settings(solver, updates).parts(time_grid(solver.steps))
                    else:
                        fitting_settings(solver, updates)
                    checked += 1
    assert checked > 20


def test_the_settings_of_geom_are_those_of_an_experiment() -> None:
    block = yaml.safe_load(section("## GEOM").split("```yaml")[1].split("```")[0])
    file = CONFIG / "experiments" / "molecules_qm9.yaml"
    left_out = (
        yaml.safe_load(file.read_text())["methods"].keys() - block["methods"].keys() - {"pretrained", "am"}
    )
    drop = {"skip": {"molecules_qm9": {"methods": sorted(left_out)}}}
    for name, method in block["methods"].items():
        if name in ("fdc", "tfft"):
            method.update({"step": None} if name == "fdc" else {"narrowing": None})
    experiment: Any = load_file(file, {**drop, "molecules": block})["molecules_qm9"]
    assert experiment.own_updates_of("fdc") == experiment.own_updates_of("am") == 120
    assert experiment.methods["fdc"].step_weight == [1.2, 3.1, 5.0]
    assert experiment.mass == 0.1


def test_the_official_prompts_take_the_place_of_ours_where_the_user_has_placed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    measured, trained = tmp_path / "benchmark_ir.json", tmp_path / "refl_data.json"
    name = "text_to_image_left_tail"
    changes = {"prompts": str(measured), "training_prompts": str(trained)}
    with pytest.raises(ConfigError) as error:
        plan_of(overrides={"files": {name: changes}})
    assert all(part in str(error.value) for part in (f"{name}.yaml: key prompts", str(measured), "place one"))
    measured.write_text(json.dumps([{"id": k, "prompt": f"measured {k}"} for k in range(100)]))
    trained.write_text(json.dumps([{"image_path": "", "text": f"trained {k}"} for k in range(10_000)]))
    experiment: Any = plan_of(overrides={"files": {name: changes}}).files[name][name]
    assert (len(experiment.prompts), len(experiment.trained_prompts)) == (100, 10_000)
