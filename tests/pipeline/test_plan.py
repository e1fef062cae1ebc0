"""The plan of a configuration, and what is refused before there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.pipeline.checks import check_folder, read_plan
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import load_resolved
from flowtilt.pipeline.plan import IMAGES, MOLECULES, PLANAR, Plan
from flowtilt.pipeline.resources import RULES, TARGETS
from flowtilt.pipeline.starting import write_configs
from workflow_copy import ROOT

SMALL: dict[str, Any] = {
    "results": "results",
    "experiments": ["risk_averse_2d"],
    "resolution": "resolution_2d",
    "overrides": {
        "skip": {"resolution_2d": {"cases": ["stripes-0.48", "spikes-0.6", "spikes-2.4"]}},
        "seeds": 2,
    },
}
TAIL = "text_to_image_left_tail"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "config", folder / "config")
    return folder


@pytest.fixture
def planned(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plans of the small configuration with some keys changed."""
    monkeypatch.chdir(project)
    return lambda **changes: read_plan({**SMALL, **changes}, "config/my.yaml")


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes one key of an experiment's file, by its path, in a project of the test's own."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)

    def change(name: str, key: str, value: Any) -> None:
        file = tmp_path / "config" / "experiments" / f"{name}.yaml"
        data = part = yaml.safe_load(file.read_text())
        *parents, last = key.split(".")
        for parent in parents:
            part = part[int(parent) if parent.isdigit() else parent]
        part[last] = value
        file.write_text(yaml.safe_dump(data))

    return change


def refused(data: Mapping[str, Any], *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(data, "config/my.yaml")
    for word in words:
        assert word in str(caught.value)


# -------------------------------------------------------------------------------------- the plan itself


def test_it_imports_neither_the_numerics_nor_snakemake() -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'pandas', 'snakemake'}"
    program = (
        f"import sys, flowtilt.pipeline.starting, flowtilt.pipeline.checks; print({heavy} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_it_reads_every_committed_configuration(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    whole = yaml.safe_load(Path("config/config.yaml").read_text(encoding="utf-8"))
    paper = yaml.safe_load(Path("config/paper.yaml").read_text(encoding="utf-8"))
    plan = read_plan({**whole, **paper}, "config/paper.yaml")
    assert plan.config.experiments == whole["experiments"]
    assert {*plan.of_kind(PLANAR), *plan.of_kind(MOLECULES), *plan.of_kind(IMAGES)} == set(plan.experiments)
    assert plan.gpus("finetune") == 1
    assert plan.gpus("threshold") == plan.gpus("molecules_evaluate") == 0
    assert plan.minutes("finetune") == 480
    assert plan.minutes("finetune", attempt=2) == 960
    assert plan.group("finetune") is None
    assert plan.group("threshold") == "pretrain"


def test_files_of_a_tail_in_the_plane(planned: Callable[..., Plan]) -> None:
    plan = planned()
    run = "results/runs/risk_averse_2d"
    files = plan.run_files("risk_averse_2d")
    assert len(files) == len(set(files))
    assert [file for file in files if "/tfft/seed1/" in file] == [
        f"{run}/tfft/seed1/{name}"
        for name in ("threshold.json", "model.safetensors", "history.csv", "samples.npz", "metrics.json")
    ]
    for rows in ("exact", "resolved"):
        assert {f"{run}/{rows}/seed0/metrics.json", f"{run}/{rows}/seed0/laws.npz"} <= set(files)
    assert f"{run}/pretrained/seed0/density.npz" in files
    assert not [file for file in files if "seed2" in file]
    assert plan.run_files("risk_averse_2d", "history.csv") == [
        f"{run}/{method}/seed{seed}/history.csv" for seed in (0, 1) for method in ("am", "fdc", "tfft")
    ]
    assert plan.figures_of("risk_averse_2d") == [
        f"results/figures/risk_averse_2d_{kind}.png" for kind in ("landscape", "densities", "histograms")
    ]
    assert plan.figures_of("resolution_2d") == ["results/figures/resolution_2d.png"]
    assert plan.pretrained_models == [f"{run}/pretrained/seed{seed}/model.safetensors" for seed in (0, 1)]
    assert plan.measured_files("risk_averse_2d")[:2] == [
        f"{run}/pretrained/seed{{seed}}/samples.npz",
        f"{run}/pretrained/seed{{seed}}/metrics.json",
    ]
    made = {*plan.measured_runs("risk_averse_2d"), *plan.measured_files("risk_averse_2d")}
    assert {file.format(seed=0) for file in made} == {
        file for file in files if "seed0" in file and "/exact/" not in file and "/resolved/" not in file
    }


def test_inputs_in_the_plane(planned: Callable[..., Plan]) -> None:
    plan = planned(experiments=["iterations_2d"])
    case = next(name for name, cases in plan.experiments.items() if "tfft" in cases.methods)
    assert plan.base_model(case, "1").endswith("/pretrained/seed1/model.safetensors")
    assert plan.finetune_inputs(case, "tfft", "1") == {
        "threshold": f"results/runs/{case}/tfft/seed1/threshold.json"
    }
    assert plan.finetune_inputs("risk_averse_2d", "am", "0") == {}
    continued = [
        (name, method, settings.continue_from)
        for name, cases in plan.experiments.items()
        for method, settings in cases.methods.items()
        if settings.continue_from is not None
    ]
    assert continued
    for name, method, start in continued:
        assert plan.finetune_inputs(name, method, "0") == {
            "start": f"results/runs/{name}/{start}/seed0/model.safetensors"
        }
    with pytest.raises(ConfigError, match="unknown method 'amm'; it has pretrained, am"):
        plan.finetune_inputs("risk_averse_2d", "amm", "0")


def test_files_and_inputs_of_molecules(planned: Callable[..., Plan]) -> None:
    plan = planned(experiments=["molecules_qm9", "molecules_tail_sweep"])
    base, case = "results/runs/molecules_qm9", "molecules_tail_sweep/rising"
    files = plan.run_files("molecules_tail_sweep")
    assert files[:2] == [f"{base}/pretrained/model.safetensors", f"{base}/pretrained/training.json"]
    method = next(
        name for name, settings in plan.experiments[case].methods.items() if settings.kind == "tfft"
    )
    run = f"results/runs/{case}/{method}/seed0"
    assert [file for file in files if file.startswith(f"{run}/")] == [
        f"{run}/{name}"
        for name in (
            *("threshold.json", "model.safetensors", "history.csv"),
            *("samples.npz", "metrics.json", "molecules.sdf", "energies.npz"),
        )
    ]
    assert plan.molecules_sample_inputs(case, method, "0") == {"model": f"{run}/model.safetensors"}
    assert plan.molecules_sample_inputs("molecules_qm9", "pretrained", "0") == {"model": files[0]}
    assert plan.molecules_sample_inputs("molecules_qm9", "data", "0") == {"molecules": "results/data/qm9.npz"}
    assert plan.training_inputs("molecules_qm9", "data", "0") == {}
    assert plan.training_inputs(case, method, "0") == {
        "history": f"{run}/history.csv",
        "threshold": f"{run}/threshold.json",
    }
    assert plan.shared_offline(case, "1") == f"{base}/pretrained/seed1/offline.npz"
    assert {f"{base}/am/seed0/history.csv", f"{base}/tfft/seed0/metrics.json"} <= set(
        plan.read_by_table("molecules_tail_sweep")
    )


def test_files_and_inputs_of_pictures(planned: Callable[..., Plan]) -> None:
    plan = planned(experiments=[TAIL])
    run = f"results/runs/{TAIL}"
    assert plan.run_files(TAIL)[0] == f"{run}/pretrained/model.json"
    assert plan.images_sample_inputs(TAIL, "pretrained", "0") == {}
    assert plan.images_sample_inputs(TAIL, "tfft", "0") == {"weights": f"{run}/tfft/seed0/model.safetensors"}
    assert plan.image_models == ["bridges"]
    assert plan.image_model_file(TAIL) == "config/models/bridges.yaml"
    assert plan.figures_of(TAIL) == [f"results/figures/{TAIL}_{kind}.png" for kind in ("pictures", "scores")]
    trained = planned(experiments=[TAIL], overrides={"images": {"retrain": True}})
    assert trained.image_model_inputs(TAIL) == {
        part: f"results/models/bridges/{part}/weights" for part in ("pipeline", "alignment")
    }


@pytest.mark.parametrize(
    ("overrides", "changed", "kept"),
    [
        (
            {"objective": {"alpha": 3.0}},
            {"threshold", "finetune", "exact", "measure"},
            {"pretrain", "density"},
        ),
        ({"solver": {"updates": 9}}, {"finetune", "offline"}, {"pretrain", "density", "exact", "threshold"}),
        ({"grid": {"cells": 120}}, {"density", "measure", "exact"}, {"pretrain", "offline", "finetune"}),
        ({"title": "Another title"}, set(), {"pretrain", "offline", "finetune", "measure", "exact"}),
    ],
)
def test_a_digest_changes_with_what_its_stage_reads_alone(
    planned: Callable[..., Plan], overrides: dict[str, Any], changed: set[str], kept: set[str]
) -> None:
    before, after = planned(), planned(overrides={**SMALL["overrides"], **overrides})
    differ = {
        stage: before.digest(stage, "risk_averse_2d", "am") != after.digest(stage, "risk_averse_2d", "am")
        for stage in changed | kept
    }
    assert {stage for stage, other in differ.items() if other} == changed
    assert before.config_file("risk_averse_2d") != after.config_file("risk_averse_2d")
    assert before.config_hash() != after.config_hash()


def test_what_is_merged_is_handed_on_as_it_was_given(planned: Callable[..., Plan]) -> None:
    assert json.loads(planned().overrides) == SMALL["overrides"]
    assert planned(overrides={}).overrides == "{}"


def test_configurations_are_written_once_at_their_contents_address(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = planned(), planned(overrides={**SMALL["overrides"], "title": "Another title"})
    monkeypatch.chdir(tmp_path)
    write_configs(first)
    file = tmp_path / first.config_file("risk_averse_2d")
    assert load_resolved(file) == first.experiments["risk_averse_2d"]
    written = file.stat().st_mtime_ns
    write_configs(second)
    write_configs(first)
    assert file.stat().st_mtime_ns == written
    assert load_resolved(second.config_file("risk_averse_2d")) == second.experiments["risk_averse_2d"]


def test_a_job_whose_configuration_is_not_there_says_why(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = planned().config_file("risk_averse_2d")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the configuration has changed since the run was started"):
        load_resolved(file)


def test_rules_are_those_of_the_workflow() -> None:
    texts = [path.read_text() for path in [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]]
    rules = {line[5:-1] for text in texts for line in text.splitlines() if line.startswith("rule ")}
    assert rules == {*RULES, *TARGETS} - {"measure"}


def test_the_shell_gets_every_name_and_path_quoted() -> None:
    """But for commands and options that are made of quoted parts, and numbers."""
    plain = {"threads", "resources.gpu", "params.gpu", "params.each", "params.options", "params.together"}
    shells = 0
    for file in (ROOT / "workflow" / "rules").glob("*.smk"):
        for shell in re.findall(r"^ +shell:\n(.*?)(?:\n\n|\Z)", file.read_text(), re.DOTALL | re.MULTILINE):
            fields = re.findall(r"{([^}]*)}", shell)
            assert {field for field in fields if not field.endswith(":q")} <= plain, f"{file.name}: {shell}"
            shells += 1
    assert shells == len(RULES)


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experimens": []}, ("key experimens: unknown", "known keys here: results, experiments")),
        ({"experiments": []}, ("key experiments:", "at least 1")),
        ({"experiments": ["a", "a"]}, ("key experiments: 'a' occurs twice",)),
        ({"experiments": ["my experiment"]}, ("key experiments.0:",)),
        ({"experiments": ["risk_averse_3d"]}, ("key experiments: unknown", "risk_averse_3d", "novelty_2d")),
        ({"experiments": ["pretrain"]}, ("key experiments: pretrain: the workflow has a rule of this name",)),
        ({"experiments": ["tables"]}, ("a rule of this name", "config/experiments/tables.yaml")),
        ({"experiments": ["comparison"]}, ("a table of this name",)),
        ({"experiments": ["theory_threshold"]}, ("a table of this name",)),
        ({"results": "-out"}, ("key results:", "-out")),
        ({"results": "my results"}, ("key results:",)),
        ({"results": "."}, ("key results: must be a folder of its own",)),
        ({"processes": 2.0}, ("key processes:", "integer", "2.0")),
        ({"processes": 0}, ("key processes:",)),
        ({"gpu": -1}, ("key gpu:",)),
        ({"gpu": True}, ("key gpu:",)),
        ({"job_length": "medium"}, ("key job_length:", "'short' or 'long'")),
        ({"resolution": "iterations_2d"}, ("key resolution: iterations_2d has no method of kind am",)),
        ({"resolution": "resolution_3d"}, ("key resolution: unknown experiment",)),
        ({"theory": ["mirrors"]}, ("config/theory/mirrors.yaml: no such file",)),
        (
            {"theory": ["threshold"], "theory_overrides": {"threshold": {"batches": 0}}},
            ("key theory_overrides, merged into", "threshold.yaml", "key batches"),
        ),
        (
            {"theory_overrides": {"mirrors": {}}},
            ("key theory_overrides.mirrors:", "mirror_descent, threshold"),
        ),
        ({"overrides": {"seeds": 0}}, ("key overrides: merged into", "key seeds")),
        ({"overrides": {"objective": {"alpha": 0}}}, ("key overrides: merged into", "key objective.alpha")),
        ({"overrides": {"solvr": {"updates": 3}}}, ("key overrides: merged into", "key solvr")),
        ({"overrides": {"skip": {"nothing": {}}}}, ("key overrides.skip.nothing: there is no",)),
        ({"overrides": {"files": {"nothing": {}}}}, ("key overrides.files.nothing: there is no",)),
        ({"overrides": {"skip": 3}}, ("key overrides.skip:",)),
    ],
)
def test_a_bad_configuration_is_refused(
    planned: Callable[..., Plan], changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused({**SMALL, "overrides": {}, **changes}, "config/my.yaml: key ", *words)


def test_what_says_nothing_is_taken_from_the_folder_of_the_results(planned: Callable[..., Plan]) -> None:
    for folder in ("res/", "./res", "res//"):
        assert planned(results=folder).config.results == "res"
    assert planned(results="/tmp/a/").config.results == "/tmp/a"


def test_overrides_of_a_study_that_is_not_run_are_left_aside(planned: Callable[..., Plan]) -> None:
    assert planned(theory=[], theory_overrides={"threshold": {"batches": 0}}).theory == {}


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("risk_averse_2d", "objective.level", 1.0, ("risk_averse_2d.yaml: key objective.level",)),
        ("risk_averse_2d", "objective.alpha", -1.0, ("key objective.alpha",)),
        ("risk_averse_2d", "solver.update", 3, ("key solver.update",)),
        ("risk_averse_2d", "methods.amm", {"kind": "adjoint"}, ("key methods.amm",)),
        ("resolution_2d", "seeds", 0, ("resolution_2d.yaml", "key seeds")),
    ],
)
def test_a_bad_experiment_is_refused(
    edited: Callable[..., None], name: str, key: str, value: Any, words: tuple[str, ...]
) -> None:
    edited(name, key, value)
    refused({**SMALL, "overrides": {}}, f"config/experiments/{name}.yaml", *words)


def test_an_unknown_parent_of_a_case_is_refused(edited: Callable[..., None]) -> None:
    edited("iterations_2d", "study.cases.0.of", "risk_2d")
    refused({**SMALL, "overrides": {}, "experiments": ["iterations_2d"]}, "risk_2d", "risk_averse_2d")


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"utility": {"kind": "entropie"}}, ("key objective.utility: unknown utility 'entropie'", "entropy")),
        ({"utility": {"kind": "cvar", "lvl": 0.1}}, ("utility cvar: key lvl: unknown; known keys: level",)),
        ({"divergence": {"kind": "klx"}}, ("key objective.divergence: unknown divergence 'klx'", "renyi")),
    ],
)
def test_an_unknown_functional_is_refused(
    edited: Callable[..., None], objective: dict[str, Any], words: tuple[str, ...]
) -> None:
    case = {"label": "other", "of": "ot_2d", "set": {"objective": objective}}
    edited("hierarchy_2d", "study.cases", [case])
    refused(
        {**SMALL, "overrides": {}, "experiments": ["hierarchy_2d"]},
        "config/experiments/hierarchy_2d.yaml: experiment hierarchy_2d/other: ",
        *words,
    )


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        (
            *("molecules_tail_sweep", "study.cases.1.set", {"offline": {"samples": 7}}),
            ("molecules_tail_sweep.yaml: key offline: ", "make it an experiment of its own"),
        ),
        (
            *("molecules_qm9", "methods.tfft.updates", 7),
            ("molecules_tail_sweep/rising: also: tfft is solved by another solver in molecules_qm9",),
        ),
    ],
)
def test_cases_on_molecules_that_do_not_fit_their_base_are_refused(
    edited: Callable[..., None], name: str, key: str, value: Any, words: tuple[str, ...]
) -> None:
    edited(name, key, value)
    refused({**SMALL, "overrides": {}, "experiments": ["molecules_tail_sweep"]}, *words)


def test_methods_of_a_base_that_are_left_out_are_named(planned: Callable[..., Plan]) -> None:
    skip = {"skip": {"molecules_qm9": {"methods": ["tfft"]}}}
    refused(
        {**SMALL, "experiments": ["molecules_tail_sweep"], "overrides": skip},
        "also: tfft is left out of molecules_qm9 (overrides.skip); leave out the case too",
    )


def test_two_trainings_of_one_model_are_refused(planned: Callable[..., Plan]) -> None:
    own = {"name": "bridges", "pipeline": {"path": "elsewhere"}, "alignment": {"path": "elsewhere"}}
    refused(
        {
            **SMALL,
            "experiments": [TAIL, "text_to_image_entropy"],
            "overrides": {"files": {"text_to_image_entropy": {"model": own}}},
        },
        f"text_to_image_entropy.yaml: key model: differs from that of {TAIL}",
    )


def test_a_folder_for_snakemakes_records_is_refused_where_it_is_a_file_that_nobody_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_folder()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="copy the project to a folder that you can write to"):
        check_folder()
