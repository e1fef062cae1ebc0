"""The worked examples of docs/adding-a-functional.md, run as they stand at a small size."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from by_hand import pretrained
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.problems import check_problems
from flowtilt.functionals.checks import check_entry
from flowtilt.functionals.curvature import example_problem, tier_table
from flowtilt.functionals.divergences import Renyi
from flowtilt.functionals.registry import DIVERGENCES, UTILITIES, Entry, Registry
from flowtilt.pipeline.configuration import ConfigError, merge
from flowtilt.pipeline.experiment import Experiment, load_file
from small import CONFIG, TINY, in_plane

PAGE = (Path(__file__).parents[1] / "docs" / "adding-a-functional.md").read_text()
*MODULE, REGISTRATION = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(EXPERIMENT,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
DISTRIBUTION, INGREDIENTS = example_problem()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's module, importable until the test ends, and its experiment."""
    (tmp_path / "my_functionals.py").write_text("\n\n".join(MODULE))
    (tmp_path / "own_functionals_2d.yaml").write_text(EXPERIMENT)
    (tmp_path / "ot_2d.yaml").write_text((CONFIG / "experiments" / "ot_2d.yaml").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_functionals", None)


@pytest.fixture
def module(folder: Path) -> ModuleType:
    return importlib.import_module("my_functionals")


@pytest.fixture
def registered(module: ModuleType) -> Iterator[None]:
    """The page's entries in the registries until the test ends."""
    before = [dict(registry) for registry in (UTILITIES, DIVERGENCES)]
    exec(REGISTRATION, vars(module))
    yield
    for registry, entries in zip((UTILITIES, DIVERGENCES), before, strict=True):
        registry.clear()
        registry.update(entries)


def cases(folder: Path, **changes: Any) -> dict[str, Experiment]:
    """The page's experiment at a size of seconds, by the label of the case."""
    overrides = merge(TINY, {"grid": {"cells": 24}, **changes})
    loaded = load_file(folder / "own_functionals_2d.yaml", in_plane(**overrides))
    return {name.partition("/")[2]: case for name, case in loaded.items()}


def build(entry: Entry, **parameters: Any) -> Any:
    return Registry("functional", {"own": entry}).build("own", parameters, INGREDIENTS)


def test_the_module_checks_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(folder / "my_functionals.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["EntropicRisk", "EntropicRisk", "ChiSquared"]


@pytest.mark.slow
def test_registered_they_inherit_every_check(registered: None) -> None:
    for registry, name, curvature in (
        (UTILITIES, "entropic_risk", "convex"),
        (DIVERGENCES, "chi_squared", "convex"),
    ):
        found = check_entry(registry[name])
        assert len(found) == len(registry[name].examples)
        assert {each.curvature for each in found} == {curvature}
        assert max(each.first_variation for each in found) < 1e-8
        assert max(each.gradient for each in found) < 1e-4
    tiers = {row.name: (row.paper, row.measured, row.needs) for row in tier_table()}
    assert tiers["entropic_risk"] == ("general", "general", "nothing")
    assert tiers["chi_squared"] == ("convex", "convex", "density")


def test_the_registries_are_as_before() -> None:
    assert not {"entropic_risk", "chi_squared"} & {*UTILITIES, *DIVERGENCES}


def test_entropic_risk_lies_between_the_worst_and_the_mean(module: ModuleType) -> None:
    rewards = INGREDIENTS.reward(DISTRIBUTION.points).numpy()
    values = [build(module.ENTROPIC_RISK, theta=t).finite_value(DISTRIBUTION) for t in (1e-6, 0.5, 5.0, 1e4)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(DISTRIBUTION.p @ rewards, abs=1e-5)
    assert values[1] == pytest.approx(-2 * np.log(DISTRIBUTION.p @ np.exp(-0.5 * rewards)))
    assert values[3] == pytest.approx(rewards.min(), abs=1e-2)  # where exponentials would overflow
    with pytest.raises(ValueError, match=r"theta must be positive and finite, got -1.0; known keys: theta"):
        build(module.ENTROPIC_RISK, theta=-1)


def test_chi_squared_is_the_exponential_of_renyi_of_order_two(module: ModuleType) -> None:
    value = build(module.CHI_SQUARED).finite_value(DISTRIBUTION)
    assert value == pytest.approx(np.expm1(Renyi(INGREDIENTS.reference, 2.0).finite_value(DISTRIBUTION)))
    halved = np.where(np.arange(len(DISTRIBUTION.p)) < 15, DISTRIBUTION.p, 0)
    assert np.isfinite(build(module.CHI_SQUARED).finite_value(DISTRIBUTION.with_p(halved / halved.sum())))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("label", ["entropic_risk", "chi_squared"])
@pytest.mark.parametrize("solver", ["adjoint_matching", "weighted_fitting"])
def test_the_experiment_runs(folder: Path, label: str, solver: str) -> None:
    case = cases(folder, solver={"kind": solver, "bank": 200})[label]
    assert isinstance(case, FunctionalExperiment)
    check_problems(case)
    stages = pretrained(folder, case)
    assert stages.finetune("fdc") == 0
    history = stages.file("fdc", "history.csv").read_text().splitlines()
    assert len(history) == 1 + 3 * TINY["solver"]["updates"]
    assert np.isfinite(stages.rows()["fdc"]["functional"])


@pytest.mark.parametrize("label", ["entropic_risk", "chi_squared"])
def test_its_exact_steps_raise_the_objective(folder: Path, label: str) -> None:
    rows = pretrained(folder, cases(folder)[label]).rows()
    exact, optimum = rows["fdc_exact"], rows["fdc_optimum"]
    assert exact["functional_before"] < exact["functional"] <= optimum["functional"] + 1e-9
    gap = optimum["functional"] - exact["functional_before"]
    assert exact["functional"] - exact["functional_before"] > 0.6 * gap


def test_a_registered_name_is_the_same_functional(registered: None, folder: Path) -> None:
    own = (folder / "own_functionals_2d.yaml").read_text()
    for name, entry in (("ENTROPIC_RISK", "entropic_risk"), ("CHI_SQUARED", "chi_squared")):
        own = own.replace(f'"my_functionals:{name}"', entry)
    assert "my_functionals" not in own
    (folder / "own_functionals_2d.yaml").write_text(own)
    for case in cases(folder).values():
        assert isinstance(case, FunctionalExperiment)
        check_problems(case)


def test_it_can_be_a_part_of_a_sum(module: ModuleType) -> None:
    parts = [{"name": "expected_reward"}, {"name": "my_functionals:ENTROPIC_RISK", "weight": 2, "theta": 1}]
    built = UTILITIES.build_sum(parts, INGREDIENTS)
    alone = build(module.ENTROPIC_RISK, theta=1).finite_value(DISTRIBUTION)
    rewards = INGREDIENTS.reward(DISTRIBUTION.points).numpy()
    assert built.finite_value(DISTRIBUTION) == pytest.approx(DISTRIBUTION.p @ rewards + 2 * alone)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("my_functional:ENTROPIC_RISK", ["No module named 'my_functional'", "PYTHONPATH"]),
        ("my_functionals:ENTROPIC", ["no attribute 'ENTROPIC'", "correct the name"]),
        ("my_functionals:EntropicRisk", ["must be an Entry", "got EntropicRisk", "NAME = Entry("]),
        ("my_functionals:math", ["must be an Entry", "got module"]),
        ("broken:ENTRY", ["cannot load", "invalid syntax"]),
        ("impossible:ENTRY", ["cannot take model", "experiments provide reward, reference, cost"]),
        ("unfit:ENTRY", ["unexpected keyword argument 'beta'", "known keys: theta, beta"]),
        ("my_functionals:ENTROPIC:RISK", ["unknown utility", "or module:NAME of your own"]),
        ("entropic", ["unknown utility 'entropic'", "known: expected_reward"]),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, kind: str, words: list[str]) -> None:
    (folder / "broken.py").write_text("ENTRY = = 1\n")
    head = "from my_functionals import *\n"
    (folder / "impossible.py").write_text(f'{head}ENTRY = Entry(EntropicRisk, takes=("model",))\n')
    parameters = '{"theta": number(), "beta": number()}'
    (folder / "unfit.py").write_text(
        f'{head}ENTRY = Entry(EntropicRisk, takes=("reward",), parameters={parameters})\n'
    )
    utility = {"kind": kind, "theta": 0.1} | ({"beta": 1.0} if kind == "unfit:ENTRY" else {})
    case = cases(folder, objective={"utility": utility})["entropic_risk"]
    assert isinstance(case, FunctionalExperiment)
    with pytest.raises(ConfigError) as caught:
        check_problems(case)
    for word in ["key objective.utility", *words]:
        assert word in str(caught.value)
