"""Configurations of molecules: what is valid, what one reads when something is not, what stages read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.pipeline.configuration import ConfigError, merge
from flowtilt.pipeline.domain import job_of
from flowtilt.pipeline.experiment import dump, load_file, load_resolved, method_of, stage_digest
from small import tiny as tiny_plane
from small_molecules import CONFIG, tiny

EXPERIMENTS = CONFIG / "experiments"
QM9 = EXPERIMENTS / "molecules_qm9.yaml"


def with_change(tmp_path: Path, change: dict[str, Any]) -> Path:
    file = tmp_path / QM9.name
    file.write_text(yaml.safe_dump(merge(yaml.safe_load(QM9.read_text()), change)))
    return file


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        ({"objective": {"mass": 1.0}}, "objective.mass", "less than 1"),
        ({"objective": {"mass": 0.0}}, "objective.mass", "greater than 0"),
        ({"objective": {"alpha": 0.0}}, "objective.alpha", "greater than 0"),
        ({"methods": {"tfft_0.9": {"mass": 1.5}}}, "methods.tfft_0.9.mass", "less than 1"),
        (
            {"methods": {"tfft_0.9": {"narrowing": 2.0}}},
            "methods.tfft_0.9.narrowing",
            "less than or equal to 1",
        ),
        ({"methods": {"am": {"mass": 0.1}}}, "methods.am", "mass belongs to fdc and tfft, not to am"),
        ({"methods": {"fdc": {"narrowing": 0.5}}}, "methods.fdc", "narrowing belongs to tfft, not to fdc"),
        ({"methods": {"fdc": {"step": None}}}, "methods.fdc", "needs step"),
        ({"methods": {"data": {"updates": 3}}}, "methods.data", "fine-tuned, not to data"),
        (
            {"methods": {"am": {"kind": "ppo"}}},
            "methods.am.kind",
            "'data', 'pretrained', 'am', 'fdc', 'tfft', 'best_of', 'resampled' or 'steered'",
        ),
        ({"methods": {"am": {"solver": {"pool": 1}}}}, "(whole file)", "methods.am.solver: key (whole file)"),
        ({"solver": {"kind": "weighted_fitting"}}, "(whole file)", "methods.fdc.solver.kind"),
        (
            {"solver": {"endpoint_gradient": "likelihood_ratio"}},
            "solver",
            "endpoint_gradient must be pathwise",
        ),
        (
            {"solver": {"endpoint_gradient": "likelihood_ratio", "adjoint": "lean"}},
            "(whole file)",
            "must be pathwise; likelihood_ratio takes values",
        ),
        ({"subset": {"smallest": 13}}, "subset", "must not be above largest"),
        ({"network": {"width": 12}}, "network", "width (12) must be a multiple of heads (8)"),
        ({"reward": {"binding": [1.0, -1.0]}}, "reward", "binding must be in order"),
        ({"reward": {"unpaired": -1}}, "reward.unpaired", "greater than or equal to 0"),
        ({"checkpoint": {"sha256": "abc"}}, "checkpoint.sha256", "should match pattern"),
        (
            {"domain": "proteins"},
            "domain",
            "unknown domain 'proteins'; known here: images, molecules, planar",
        ),
        ({"domain": None}, "domain", "must be images or molecules or planar, got None"),
        ({"colour": "red"}, "colour", "known keys here: name, domain"),
        ({"seeds": 0}, "seeds", "at least 1"),
        ({"grid": {"cells": 3}}, "grid", "unknown"),
    ],
)
def test_errors_name_the_file_the_key_and_the_fix(
    change: dict[str, Any], key: str, hint: str, tmp_path: Path
) -> None:
    file = with_change(tmp_path, change)
    with pytest.raises(ConfigError) as caught:
        load_file(file)
    message = str(caught.value)
    assert str(file) in message
    assert f"key {key}:" in message
    assert hint in message
    assert "\n" not in message


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    data = yaml.safe_load(QM9.read_text())
    del data["checkpoint"]
    file = tmp_path / QM9.name
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"key checkpoint: missing; add it"):
        load_file(file)


def test_all_objectives_have_one_kl_weight() -> None:
    experiment = tiny()
    for method in ("fdc", "tfft_0.9"):
        problem = experiment.tail_of(method)
        assert problem.tail == "upper"
        assert problem.mass == experiment.mass_of(method)
        assert problem.alpha == experiment.objective.alpha
    assert experiment.tail_of("tfft_0.9").mass == 0.1
    assert experiment.main_metric == "top_0.2pct_negative_energy"


def test_overrides_of_the_plane_and_of_molecules_do_not_meet() -> None:
    overrides = {"planar": {"grid": {"cells": 48}}, "molecules": {"seeds": 2, "offline": {"samples": 7}}}
    (molecules,) = load_file(QM9, overrides).values()
    assert (molecules.seeds, molecules.offline.samples) == ([0, 1], 7)
    (plane,) = load_file(EXPERIMENTS / "risk_averse_2d.yaml", overrides).values()
    assert (plane.seeds, plane.grid.cells) == ([0, 1, 2, 3, 4], 48)


def test_a_study_of_masses_derives_from_its_experiment() -> None:
    cases = load_file(EXPERIMENTS / "molecules_tail_sweep.yaml", {"molecules": {"offline": {"samples": 9}}})
    masses = {"rising": [0.05], "plain": [0.002], "pool": [0.5, 0.2, 0.1, 0.05, 0.002], "large_pool": [0.002]}
    masses["fitted"] = [0.5]
    assert list(cases) == [f"molecules_tail_sweep/{label}" for label in masses]
    for name, case in cases.items():
        own = case
        assert own.starts_from == "molecules_qm9"
        assert own.offline.samples == 9
        assert [own.mass_of(method) for method in own.methods] == masses[name.partition("/")[2]]
        narrowing = {own.methods[method].narrowing for method in own.methods}
        assert narrowing == ({0.5} if name.endswith("rising") else {None})
    plain = cases["molecules_tail_sweep/plain"]
    assert plain.solver.pool == plain.solver.batch
    rising = cases["molecules_tail_sweep/rising"]
    assert {name: rising.mass_of(name) for name in rising.also} == {"tfft_0.9": 0.1, "tfft": 0.002}


def test_a_case_has_methods_of_its_base_as_its_own(tmp_path: Path) -> None:
    (tmp_path / QM9.name).write_text(QM9.read_text())
    file = tmp_path / "mine.yaml"

    def load(**case: object) -> None:
        cases = [{"label": "a", "of": "molecules_qm9", "methods": {"am": {"kind": "am"}}, **case}]
        study = {"axis": "mass", "table": "masses", "cases": cases}
        file.write_text(yaml.safe_dump({"name": "mine", "title": "t", "seeds": 1, "study": study}))
        load_file(file)

    load(also=["tfft"])
    with pytest.raises(
        ConfigError, match=r"mine\.yaml: key study\.cases: case 'a': also: .* no method 'ppo'"
    ):
        load(also=["ppo"])
    with pytest.raises(ConfigError, match=r"also: am is a method of the case's own"):
        load(also=["am"])


def test_what_is_merged_into_one_file_comes_before_the_changes_of_its_cases() -> None:
    files = {"files": {"molecules_qm9": {"solver": {"pool": 64, "updates": 7}}}}
    (base,) = load_file(QM9, files).values()
    assert (base.solver.pool, base.solver.updates) == (64, 7)
    cases = load_file(EXPERIMENTS / "molecules_tail_sweep.yaml", files)
    pools = {name.partition("/")[2]: case.solver.pool for name, case in cases.items()}
    assert pools == {"pool": 64, "plain": 32, "large_pool": 128, "rising": 64, "fitted": 64}
    with pytest.raises(ConfigError, match="key files: must map names of experiment files"):
        load_file(QM9, {"files": {"molecules_qm9": 3}})


def test_a_study_of_masses_is_of_molecules(tmp_path: Path) -> None:
    for name in ("risk_averse_2d", "molecules_qm9"):
        (tmp_path / f"{name}.yaml").write_text((EXPERIMENTS / f"{name}.yaml").read_text())
    for parent, table in (("risk_averse_2d", "masses"), ("molecules_qm9", "axis")):
        cases = [{"label": "a", "of": parent}]
        methods = {"pretrained": {"kind": "pretrained"}}
        study = {"axis": "mass", "table": table, "cases": cases, "methods": methods}
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({"name": "mine", "title": "t", "seeds": 1, "study": study}))
        with pytest.raises(ConfigError, match=rf"key study\.table: its cases can have .*, got '{table}'"):
            load_file(file)


def test_a_stage_is_of_its_domain(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="molecules_qm9: molecules has no stage density; it has data, pretrain"
    ):
        job_of("density", [tiny()], "", 0, tmp_path)
    with pytest.raises(
        ConfigError, match="risk_averse_2d: planar has no stage sample; it has pretrain, density"
    ):
        job_of("sample", [tiny_plane()], "am", 0, tmp_path)
    with pytest.raises(ConfigError, match="unknown method 'ppo'; it has data, pretrained"):
        method_of(tiny(), "ppo")


@pytest.mark.parametrize(
    ("change", "changed", "kept"),
    [
        (
            {"objective": {"alpha": 3.0}},
            ["threshold", "finetune", "evaluate"],
            ["pretrain", "offline", "sample"],
        ),
        ({"evaluation": {"samples": 31}}, ["sample", "evaluate"], ["pretrain", "offline", "finetune"]),
        ({"title": "another"}, [], ["pretrain", "offline", "threshold", "finetune", "sample", "evaluate"]),
        ({"reward": {"charge": 1}}, ["offline", "finetune", "evaluate"], ["pretrain", "threshold", "sample"]),
        ({"checkpoint": {"retrain": True}}, ["pretrain"], ["offline", "finetune", "sample", "evaluate"]),
    ],
)
def test_digests_follow_what_a_stage_reads(
    change: dict[str, Any], changed: list[str], kept: list[str]
) -> None:
    before, after = tiny(), tiny(**change)
    for stages, same in ((changed, False), (kept, True)):
        for stage in stages:
            digests = [stage_digest(experiment, stage, "tfft_0.9") for experiment in (before, after)]
            assert (digests[0] == digests[1]) is same, stage


def test_the_resolved_file_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "resolved.yaml"
    file.write_text(dump(tiny()))
    assert load_resolved(file) == tiny()


BY_VALUES = {"kind": "fdc", "by": "exponents", "iterations": 2}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"kind": "am", "solver": {"kl": 1.0}}, "methods.own.solver.kl: is a budget of annealed fitting"),
        ({**BY_VALUES, "step": 0.5, "solver": {"kl": 1.0}}, "methods.own.step: with the budget solver.kl"),
        ({"kind": "am", "solver": {"kind": "annealed_fitting", "kl": 0.4, "stage_kl": 0.5}}, "stage_kl"),
        ({"kind": "am", "solver": {"kind": "annealed_fitting", "stage_kl": 0.5}}, "stage_kl"),
        ({"kind": "am", "barrier": {"bound": 0.4, "strength": 1.0}}, "barrier: validity has values"),
        ({**BY_VALUES, "barrier": {"bound": 1.5, "strength": 1.0}}, "barrier.bound"),
    ],
)
def test_budgets_and_barriers_that_no_method_has_are_refused(method: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny(None, methods={"own": method})
