"""The plan of a configuration, and what is refused before there is one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.pipeline import checks
from flowtilt.pipeline.checks import check_folder, read_plan
from flowtilt.pipeline.config import WorkflowConfig
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Job, Run, domain_named, job_of, sources
from flowtilt.pipeline.experiment import load_resolved
from flowtilt.pipeline.plan import Plan
from flowtilt.pipeline.resources import REPORT, TARGETS, Needs
from flowtilt.pipeline.rules import StageRule, benchmark_of
from flowtilt.pipeline.starting import write_configs
from workflow_copy import ROOT

SMALL: dict[str, Any] = {
    "results": "results",
    "experiments": ["risk_averse_2d"],
    "resolution": "resolution_2d",
    "overrides": {
        "skip": {"resolution_2d": {"cases": ["stripes-0.48", "spikes-0.6", "spikes-2.4"]}},
        "planar": {"seeds": 2},
    },
}
TAIL = "text_to_image_left_tail"
ENTROPY = "text_to_image_entropy"


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


@pytest.fixture(scope="module")
def embedded(project: Path) -> Plan:
    """The plan of all experiments, with files for the shipped models in their places."""
    for name in ("molecules/qm9_12.safetensors", "molecules/qm9_12.json", *SHIPPED):
        file = project / "resources" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        return read_plan(
            yaml.safe_load(Path("config/config.yaml").read_text(encoding="utf-8")), "config.yaml"
        )


SHIPPED = ("images/bridges/unet/config.json", "images/bridges_clip/tokenizer.json")


@pytest.fixture
def whole(embedded: Plan, project: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The same, in its folder."""
    monkeypatch.chdir(project)
    return embedded


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


def committed(*names: str) -> dict[str, Any]:
    """Committed configurations, of which the last one wins."""
    merged: dict[str, Any] = {}
    for name in names:
        merged |= yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8"))
    return merged


def refused(data: Mapping[str, Any], *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(data, "config/my.yaml")
    for word in words:
        assert word in str(caught.value)


def rule_of(plan: Plan, name: str) -> StageRule:
    (found,) = (rule for rule in plan.rules if rule.name == name)
    return found


# -------------------------------------------------------------------------------------- the plan itself


def test_it_imports_neither_the_numerics_nor_snakemake() -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'pandas', 'snakemake'}"
    program = (
        "import sys, flowtilt.pipeline.starting, flowtilt.pipeline.domain as d; from pathlib import Path; "
        "from flowtilt.pipeline.checks import read_plan; "
        "from flowtilt.pipeline.configuration import read_yaml; "
        "plan = read_plan(read_yaml(Path('config/config.yaml')), 'config'); "
        "assert {domain.name for domain in plan.domains} == {*d.sources()}; "
        "assert plan.tables and plan.figures and plan.pages and plan.runs and plan.config_hash(); "
        f"print({heavy} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "set()"


def test_it_reads_every_committed_configuration(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    for scale in ("paper", "smoke"):
        plan = read_plan(committed("config", scale), f"config/{scale}.yaml")
        assert plan.config.experiments == committed("config")["experiments"]
        assert [domain.name for domain in plan.domains] == ["planar", "molecules", "images"]


def test_files_of_a_tail_in_the_plane(planned: Callable[..., Plan]) -> None:
    plan = planned()
    run = "results/runs/risk_averse_2d"
    files = plan.run_files("risk_averse_2d")
    assert len(files) == len(set(files))
    assert {file for file in files if "/tfft/seed1/" in file} == {
        f"{run}/tfft/seed1/{name}"
        for name in ("threshold.json", "model.safetensors", "history.csv", "samples.npz", "metrics.json")
    }
    for rows in ("exact", "resolved"):
        assert {f"{run}/{rows}/seed0/metrics.json", f"{run}/{rows}/seed0/distributions.npz"} <= set(files)
    assert f"{run}/pretrained/seed0/density.npz" in files
    assert f"{run}/pretrained/seed0/offline.npz" not in files  # made where a threshold takes it, and no more
    assert not [file for file in files if "seed2" in file]
    assert {*plan.run_files("risk_averse_2d", "history.csv")} == {
        f"{run}/{method}/seed{seed}/history.csv" for seed in (0, 1) for method in ("pretrained", *OF_RISK)
    }
    assert plan.figures_of("risk_averse_2d") == [
        f"results/figures/risk_averse_2d_{kind}.png" for kind in ("landscape", "densities", "histograms")
    ]
    assert plan.captions("risk_averse_2d")["_landscape"] == "landscape"
    assert plan.figures_of("resolution_2d") == ["results/figures/resolution_2d.png"]
    assert plan.captions("resolution_2d") == {"": "study"}
    assert plan.pretrained_models == [f"{run}/pretrained/seed{seed}/model.safetensors" for seed in (0, 1)]


def test_files_of_other_kinds_of_experiments(whole: Plan) -> None:
    run = "results/runs/ot_2d/fdc_dA/seed0"
    made = ("model.safetensors", "history.csv", "samples.npz", "metrics.json", "distributions.npz")
    assert [file for file in whole.run_files("ot_2d") if file.startswith(f"{run}/")] == [
        f"{run}/{name}" for name in made
    ]
    assert whole.figures_of("ot_2d") == [
        f"results/figures/ot_2d_{kind}.png" for kind in ("densities", "metrics")
    ]

    base, case = "results/runs/molecules_qm9", "results/runs/molecules_tail_sweep/rising/tfft_0.95/seed0"
    files = whole.run_files("molecules_tail_sweep")
    assert files[:2] == [f"{base}/pretrained/model.safetensors", f"{base}/pretrained/training.json"]
    made = (
        *("threshold.json", "model.safetensors", "history.csv"),
        *("samples.npz", "metrics.json", "molecules.sdf", "energies.npz"),
    )
    assert [file for file in files if file.startswith(f"{case}/")] == [f"{case}/{name}" for name in made]
    assert whole.figures_of("molecules_tail_sweep") == ["results/figures/molecules_tail_sweep.png"]
    kinds = {"_frontier": "frontier", "_energies": "energies", "_molecules": "molecules"}
    assert whole.captions("molecules_qm9") == kinds

    run = f"results/runs/{TAIL}"
    files = whole.run_files(TAIL)
    assert files[0] == f"{run}/pretrained/model.json"
    made = ("threshold.json", "model.safetensors", "history.csv", "images", "metrics.json", "scores.npz")
    assert {file for file in files if file.startswith(f"{run}/tfft/seed0/")} == {
        f"{run}/tfft/seed0/{name}" for name in made
    }
    shown = ("frontier", "images", "scores")
    assert whole.figures_of(TAIL) == [f"results/figures/{TAIL}_{kind}.png" for kind in shown]


def test_targets_hold_what_is_made_of_every_experiment(whole: Plan) -> None:
    for name in whole.config.experiments:
        assert {*whole.tables_of(name)} <= {*whole.tables}
        assert {*whole.figures_of(name)} <= {*whole.figures}
        assert {*whole.run_files(name)} <= {*whole.runs}
        assert f"results/pages/{name}.html" in whole.pages
    for name in whole.theory:
        assert f"results/theory/{name}.json" in whole.runs
        assert {f"results/tables/theory_{name}.md", f"results/figures/theory_{name}.png"} <= {*whole.theories}
    assert "results/resolution.json" in whole.runs
    assert {"results/tables/comparison.csv", "results/tables/by_seed.csv"} <= {*whole.tables}
    assert len(whole.tables) == len(set(whole.tables))
    assert "results/runs/molecules_qm9/pretrained/model.safetensors" in whole.pretrained_models
    assert f"results/runs/{TAIL}/pretrained/model.json" in whole.pretrained_models


def test_what_tables_are_made_from(whole: Plan) -> None:
    run = "results/runs/risk_averse_2d"
    assert {*whole.read_by_table("risk_averse_2d")} == {
        f"{run}/{rows}/seed{seed}/metrics.json"
        for rows in ("pretrained", *OF_RISK, *KEPT_OF_RISK, "exact", "resolved")
        for seed in range(5)
    }
    solvers = whole.read_by_table("solvers_2d")
    weighted = "results/runs/solvers_2d/entropy/weighted_fitting_500/seed0"
    assert {f"{weighted}/metrics.json", f"{weighted}/history.csv"} <= {*solvers}
    base = "results/runs/molecules_qm9"
    compared = {f"{base}/{run}/seed0/metrics.json" for run in ("pretrained", "am", "tfft", "tfft_0.8_fitted")}
    assert compared <= {*whole.read_by_table("molecules_tail_sweep")}
    assert {*whole.read_by_table("ot_2d")} == {*whole.run_files("ot_2d", "metrics.json")}
    assert {*whole.run_files("ot_2d"), "results/resolution.json"} <= {*whole.read_by_figures("ot_2d")}


# ------------------------------------------------------------------------------------- jobs of every stage

RISK, QM9 = "results/runs/risk_averse_2d", "results/runs/molecules_qm9"
IMAGE, MODEL = f"results/runs/{TAIL}", f"results/runs/{TAIL}/pretrained/model.json"
OF_RISK = ("am", "fdc", "tfft", "am_annealed", "tfft_annealed")
"""Fine-tuned methods of the risk-averse experiment."""
KEPT_OF_RISK = (
    *("best_of_4", "best_of_16", "best_of_64"),
    *("resampled", "resampled_tfft", "steered", "steered_tfft"),
)
"""Those that train nothing."""

RISING = "results/runs/molecules_tail_sweep/rising/tfft_0.95/seed1"
WEIGHTS, HISTORY = "model.safetensors", "history.csv"

JOBS: list[tuple[str, dict[str, str], dict[str, Any], dict[str, str]]] = [
    (
        "planar_pretrain",
        {"experiment": "risk_averse_2d", "seed": "1"},
        {},
        {
            name: f"{RISK}/pretrained/seed1/{file}"
            for name, file in (("model", WEIGHTS), ("history", HISTORY))
        },
    ),
    (
        "planar_density",
        {"experiment": "risk_averse_2d", "seed": "1"},
        {"model": f"{RISK}/pretrained/seed1/{WEIGHTS}"},
        {"density": f"{RISK}/pretrained/seed1/density.npz"},
    ),
    (
        "planar_offline",
        {"experiment": "iterations_2d/risk_averse", "seed": "1"},
        {"pretrained": f"{RISK}/pretrained/seed1/{WEIGHTS}"},
        {"offline": "results/runs/iterations_2d/risk_averse/pretrained/seed1/offline.npz"},
    ),
    (
        "planar_threshold",
        {"experiment": "risk_averse_2d", "method": "tfft", "seed": "1"},
        {"offline": f"{RISK}/pretrained/seed1/offline.npz"},
        {"threshold": f"{RISK}/tfft/seed1/threshold.json"},
    ),
    (
        "planar_finetune",
        {"experiment": "risk_averse_2d", "method": "tfft", "seed": "1"},
        {
            "pretrained": f"{RISK}/pretrained/seed1/{WEIGHTS}",
            "threshold": f"{RISK}/tfft/seed1/threshold.json",
        },
        {"model": f"{RISK}/tfft/seed1/{WEIGHTS}", "history": f"{RISK}/tfft/seed1/{HISTORY}"},
    ),
    (
        "planar_keep",
        {"experiment": "risk_averse_2d", "method": "resampled_tfft", "seed": "1"},
        {
            "pretrained": f"{RISK}/pretrained/seed1/{WEIGHTS}",
            "offline": f"{RISK}/pretrained/seed1/offline.npz",
            "threshold": f"{RISK}/tfft/seed1/threshold.json",
        },
        {
            "samples": f"{RISK}/resampled_tfft/seed1/kept_samples.npz",
            "kept": f"{RISK}/resampled_tfft/seed1/kept.json",
        },
    ),
    (
        "planar_exact",
        {"experiment": "risk_averse_2d", "seed": "1"},
        {"density": f"{RISK}/pretrained/seed1/density.npz", "resolution": "results/resolution.json"},
        {
            "metrics": f"{RISK}/exact/seed1/metrics.json",
            "distributions": f"{RISK}/exact/seed1/distributions.npz",
            "resolved_metrics": f"{RISK}/resolved/seed1/metrics.json",
            "resolved_distributions": f"{RISK}/resolved/seed1/distributions.npz",
        },
    ),
    ("molecules_data", {}, {}, {"molecules": "results/data/qm9.npz"}),
    (
        "molecules_pretrain",
        {"experiment": "molecules_qm9"},
        {
            "molecules": "results/data/qm9.npz",
            "shipped": ["resources/molecules/qm9_12.safetensors", "resources/molecules/qm9_12.json"],
        },
        {"model": f"{QM9}/pretrained/{WEIGHTS}", "record": f"{QM9}/pretrained/training.json"},
    ),
    (
        "molecules_offline",
        {"experiment": "molecules_qm9", "seed": "1"},
        {"pretrained": f"{QM9}/pretrained/{WEIGHTS}"},
        {"offline": f"{QM9}/pretrained/seed1/offline.npz"},
    ),
    (
        "molecules_threshold",
        {"experiment": "molecules_tail_sweep/rising", "method": "tfft_0.95", "seed": "1"},
        {"offline": f"{QM9}/pretrained/seed1/offline.npz"},
        {"threshold": f"{RISING}/threshold.json"},
    ),
    (
        "molecules_finetune",
        {"experiment": "molecules_tail_sweep/rising", "method": "tfft_0.95", "seed": "1"},
        {"pretrained": f"{QM9}/pretrained/{WEIGHTS}", "threshold": f"{RISING}/threshold.json"},
        {"model": f"{RISING}/{WEIGHTS}", "history": f"{RISING}/{HISTORY}"},
    ),
    (
        "molecules_keep",
        {"experiment": "molecules_qm9", "method": "steered_tfft_0.9", "seed": "1"},
        {"pretrained": f"{QM9}/pretrained/{WEIGHTS}", "threshold": f"{QM9}/tfft_0.9/seed1/threshold.json"},
        {
            "samples": f"{QM9}/steered_tfft_0.9/seed1/kept_samples.npz",
            "kept": f"{QM9}/steered_tfft_0.9/seed1/kept.json",
        },
    ),
    (
        "molecules_sample",
        {"experiment": "molecules_tail_sweep/rising", "method": "tfft_0.95", "seed": "1"},
        {"model": f"{RISING}/{WEIGHTS}"},
        {"samples": f"{RISING}/samples.npz"},
    ),
    (
        "molecules_sample",
        {"experiment": "molecules_qm9", "method": "pretrained", "seed": "1"},
        {"model": f"{QM9}/pretrained/{WEIGHTS}"},
        {"samples": f"{QM9}/pretrained/seed1/samples.npz"},
    ),
    (
        "molecules_sample",
        {"experiment": "molecules_qm9", "method": "data", "seed": "1"},
        {"molecules": "results/data/qm9.npz"},
        {"samples": f"{QM9}/data/seed1/samples.npz"},
    ),
    (
        "molecules_evaluate",
        {"experiment": "molecules_tail_sweep/rising", "method": "tfft_0.95", "seed": "1"},
        {
            "samples": f"{RISING}/samples.npz",
            "molecules": "results/data/qm9.npz",
            "history": f"{RISING}/{HISTORY}",
            "threshold": f"{RISING}/threshold.json",
        },
        {
            "metrics": f"{RISING}/metrics.json",
            "sdf": f"{RISING}/molecules.sdf",
            "energies": f"{RISING}/energies.npz",
        },
    ),
    (
        "molecules_evaluate",
        {"experiment": "molecules_qm9", "method": "best_of_4", "seed": "1"},
        {
            "samples": f"{QM9}/best_of_4/seed1/kept_samples.npz",
            "molecules": "results/data/qm9.npz",
            "kept": f"{QM9}/best_of_4/seed1/kept.json",
        },
        {
            "metrics": f"{QM9}/best_of_4/seed1/metrics.json",
            "sdf": f"{QM9}/best_of_4/seed1/molecules.sdf",
            "energies": f"{QM9}/best_of_4/seed1/energies.npz",
        },
    ),
    ("images_fetch", {"experiment": TAIL}, {}, {"fetched": f"{IMAGE}/pretrained/fetched.json"}),
    (
        "images_pretrain_pipeline",
        {"model": "bridges"},
        {},
        {"pipeline": "results/models/bridges/pipeline/weights"},
    ),
    (
        "images_pretrain_alignment",
        {"model": "bridges"},
        {},
        {"alignment": "results/models/bridges/alignment/weights"},
    ),
    (
        "images_model",
        {"experiment": TAIL},
        {"shipped": [f"resources/{file}" for file in SHIPPED]},
        {"model": MODEL},
    ),
    (
        "images_offline",
        {"experiment": TAIL, "seed": "1"},
        {"pretrained": MODEL},
        {"offline": f"{IMAGE}/pretrained/seed1/offline.npz"},
    ),
    (
        "images_threshold",
        {"experiment": TAIL, "method": "tfft_0.5", "seed": "1"},
        {"offline": f"{IMAGE}/pretrained/seed1/offline.npz"},
        {"threshold": f"{IMAGE}/tfft_0.5/seed1/threshold.json"},
    ),
    (
        "images_finetune",
        {"experiment": TAIL, "method": "tfft", "seed": "1"},
        {"pretrained": MODEL, "threshold": f"{IMAGE}/tfft/seed1/threshold.json"},
        {"model": f"{IMAGE}/tfft/seed1/{WEIGHTS}", "history": f"{IMAGE}/tfft/seed1/{HISTORY}"},
    ),
    (
        "images_keep",
        {"experiment": TAIL, "method": "resampled", "seed": "1"},
        {"pretrained": MODEL, "offline": f"{IMAGE}/pretrained/seed1/offline.npz"},
        {"samples": f"{IMAGE}/resampled/seed1/kept_images", "kept": f"{IMAGE}/resampled/seed1/kept.json"},
    ),
    (
        "images_sample",
        {"experiment": TAIL, "method": "tfft", "seed": "1"},
        {"pretrained": MODEL, "model": f"{IMAGE}/tfft/seed1/{WEIGHTS}"},
        {"images": f"{IMAGE}/tfft/seed1/images"},
    ),
    (
        "images_sample",
        {"experiment": TAIL, "method": "pretrained", "seed": "1"},
        {"pretrained": MODEL},
        {"images": f"{IMAGE}/pretrained/seed1/images"},
    ),
    (
        "images_evaluate",
        {"experiment": TAIL, "method": "tfft", "seed": "1"},
        {
            "pretrained": MODEL,
            "images": f"{IMAGE}/tfft/seed1/images",
            "history": f"{IMAGE}/tfft/seed1/{HISTORY}",
            "threshold": f"{IMAGE}/tfft/seed1/threshold.json",
            "reference": f"{IMAGE}/pretrained/seed1/scores.npz",
        },
        {"metrics": f"{IMAGE}/tfft/seed1/metrics.json", "scores": f"{IMAGE}/tfft/seed1/scores.npz"},
    ),
]


@pytest.mark.parametrize(
    ("name", "wildcards", "inputs", "outputs"), JOBS, ids=[f"{job[0]}-{i}" for i, job in enumerate(JOBS)]
)
def test_a_job_s_files_and_command(
    whole: Plan, name: str, wildcards: dict[str, str], inputs: dict[str, Any], outputs: dict[str, str]
) -> None:
    rule = rule_of(whole, name)
    assert rule.wildcards == list(wildcards)
    for field, value in wildcards.items():
        if field != "seed":
            assert re.fullmatch(rule.constraints[field], value)
    assert rule.inputs(**wildcards) == inputs
    assert {role: str(file).format(**wildcards) for role, file in rule.outputs.items()} == outputs
    experiment = rule.run(**wildcards).experiment.name
    options = [
        word for key in ("method", "seed") if key in wildcards for word in (f"--{key}", wildcards[key])
    ]
    threads = "3" if rule.stage.needs.threaded else "1"
    assert rule.command(3, **wildcards) == " ".join(
        [
            f"OMP_NUM_THREADS={threads} flowtilt {rule.stage.name} {whole.config_files[experiment]}",
            *options,
            "--results results --workers 3",
        ]
    )


def test_every_stage_of_every_domain_is_tried_above() -> None:
    """But for those on several experiments, which have tests of their own."""
    tried = {name for name, *_ in JOBS} | {"planar_measure", "planar_resolution"}
    domains = [domain_named(name) for name in ("planar", "molecules", "images")]
    named = {f"{d.name}_{s.name}".replace("-", "_") for d in domains for s in d.stages}
    assert named == tried


def test_the_runs_of_a_file_are_measured_together(whole: Plan) -> None:
    rule = rule_of(whole, "planar_measure_risk_averse_2d")
    assert rule.wildcards == ["seed"]
    tuned = [
        f"{RISK}/{m}/seed3/{name}"
        for m in OF_RISK
        for name in (WEIGHTS, HISTORY, *(["threshold.json"] if m.startswith("tfft") else []))
    ]
    base = [f"{RISK}/pretrained/seed3/{name}" for name in (WEIGHTS, "density.npz")]
    kept = [f"{RISK}/{m}/seed3/{name}" for m in KEPT_OF_RISK for name in ("kept_samples.npz", "kept.json")]
    assert rule.inputs(seed="3") == {"runs": [*base, *tuned, *kept]}
    assert rule.outputs == {
        role: [f"{RISK}/{m}/seed{{seed}}/{name}" for m in ("pretrained", *OF_RISK, *KEPT_OF_RISK)]
        for role, name in (("samples", "samples.npz"), ("metrics", "metrics.json"))
    }
    (config,) = rule._of({"seed": "3"})
    assert rule.command(seed="3") == (
        f"OMP_NUM_THREADS=1 flowtilt measure {whole.config_files[config.name]} --seed 3 --results results "
        "--workers 1"
    )
    assert set(rule_of(whole, "planar_measure_ot_2d").outputs) == {"samples", "metrics", "distributions"}
    cases = rule_of(whole, "planar_measure_iterations_2d")
    assert f"{RISK}/pretrained/seed3/density.npz" in cases.inputs(seed="3")["runs"]


def test_the_resolution_is_measured_from_runs_of_adjoint_matching(planned: Callable[..., Plan]) -> None:
    plan = planned()
    rule = rule_of(plan, "planar_resolution")
    assert rule.outputs == {"resolution": "results/resolution.json"}
    assert (rule.wildcards, rule.constraints) == ([], {})
    cases = ["stripes-0.05", "stripes-0.16", "spikes-0.15"]
    runs = [f"results/runs/resolution_2d/{case}/am" for case in cases]
    read = rule.inputs()["runs"]
    assert {file for file in read if file.endswith("samples.npz")} == {
        f"{run}/seed{seed}/samples.npz" for run in runs for seed in (0, 1)
    }
    assert {Path(file).name for file in read} == {"samples.npz", "density.npz"}
    files = " ".join(plan.config_files[f"resolution_2d/{case}"] for case in cases)
    assert rule.command() == f"OMP_NUM_THREADS=1 flowtilt resolution {files} --results results --workers 1"


def test_fdc_goes_on_from_an_earlier_run(whole: Plan) -> None:
    rule, found = rule_of(whole, "planar_finetune"), 0
    for name, case in whole.experiments.items():
        for method, settings in case.methods.items():
            if start := getattr(settings, "continue_from", None):
                read = rule.inputs(experiment=name, method=method, seed="0")
                assert read["start"] == f"results/runs/{name}/{start}/seed0/{WEIGHTS}"
                found += 1
    assert found


def test_what_an_images_model_waits_for(planned: Callable[..., Plan], whole: Plan) -> None:
    trained = planned(experiments=[TAIL], overrides={"images": {"retrain": True}})
    assert rule_of(trained, "images_model").inputs(experiment=TAIL) == {
        part: f"results/models/bridges/{part}/weights" for part in ("pipeline", "alignment")
    }
    hub = {"repository": "someone/model", "revision": "0" * 40, "files": ["unet/*"]}
    elsewhere = {"name": "other", "pipeline": {"path": "a", "hub": hub}, "alignment": {"path": "b"}}
    fetched = planned(experiments=[TAIL], overrides={"files": {TAIL: {"model": elsewhere}}})
    assert rule_of(fetched, "images_model").inputs(experiment=TAIL) == {
        "fetched": f"{IMAGE}/pretrained/fetched.json"
    }


def test_a_checkpoint_that_is_trained_anew_is_not_read(planned: Callable[..., Plan]) -> None:
    trained = planned(
        experiments=["molecules_qm9"], overrides={"molecules": {"checkpoint": {"retrain": True}}}
    )
    read = rule_of(trained, "molecules_pretrain").inputs(experiment="molecules_qm9")
    assert read == {"molecules": "results/data/qm9.npz"}


def jobs_of(rule: StageRule) -> Iterator[dict[str, str]]:
    """The wildcards of all jobs of a rule."""
    for experiment in rule.experiments:
        values: dict[str, list[Any]] = {
            "experiment": [experiment.name],
            "method": [name for name in experiment.methods if rule.stage.has(experiment, name)],
            "seed": experiment.seeds,
            **{field: [value] for field, value in rule.stage.fields(experiment).items()},
        }
        for found in product(*(values[field] for field in rule.wildcards)):
            yield dict(zip(rule.wildcards, map(str, found), strict=True))


def listed(files: Mapping[str, Any]) -> Iterator[str]:
    for value in files.values():
        yield from [value] if isinstance(value, str) else value


def test_every_file_is_written_by_one_job_and_read_where_it_is(whole: Plan) -> None:
    """And the command finds the files that the workflow waits for."""
    written: dict[str, str] = {}
    read: set[str] = set()
    for rule in whole.rules:
        for wildcards in {tuple(job.items()): job for job in jobs_of(rule)}.values():
            job = f"{rule.name} {wildcards}"
            read |= {*listed(rule.inputs(**wildcards))}
            for pattern in listed(rule.outputs):
                file = pattern.format(**wildcards)
                assert written.setdefault(file, job) == job
            if rule.stage.scope == "run":
                same_as_by_hand(whole, rule, wildcards)
    assert {file for file in read - written.keys() if not file.startswith("resources/")} == set()
    assert {*whole.runs} - written.keys() == {f"results/theory/{name}.json" for name in whole.theory}


def same_as_by_hand(plan: Plan, rule: StageRule, wildcards: Mapping[str, str]) -> None:
    experiment = rule.run(**wildcards).experiment
    seed = int(wildcards["seed"]) if "seed" in wildcards else None
    method = wildcards.get("method", "")
    job: Job = job_of(rule.stage.name, [experiment], method, seed, Path(plan.config.results))[1]
    assert {role: _text(path) for role, path in job.inputs.items()} == rule.inputs(**wildcards)
    outputs = {role: str(file).format(**wildcards) for role, file in rule.outputs.items()}
    assert {role: _text(path) for role, path in job.outputs.items()} == outputs
    run = Run(plan.config.results, experiment, method, wildcards.get("seed", ""))
    assert benchmark_of(rule.domain, rule.stage, run) == f"{rule.name}/{rule.log().format(**wildcards)}"


def _text(path: Path | list[Path]) -> str | list[str]:
    return [str(file) for file in path] if isinstance(path, list) else str(path)


def test_what_starts_from_a_base_is_written_there_by_hand_too(planned: Callable[..., Plan]) -> None:
    case = next(iter(planned(experiments=["iterations_2d"]).files["iterations_2d"].values()))
    _, job = job_of("pretrain", [case], "", 0, Path("results"))
    assert job.outputs["model"] == Path(f"{RISK}/pretrained/seed0/{WEIGHTS}")


def test_jobs_of_no_experiment_are_none(whole: Plan) -> None:
    """What is done once for all cases of a study has jobs of their base alone, by its rule."""
    assert re.fullmatch(rule_of(whole, "planar_pretrain").constraints["experiment"], "risk_averse_2d")
    for name in ("iterations_2d/risk_averse", "ot-2d", "risk_averse_2dx"):
        assert not re.fullmatch(rule_of(whole, "planar_pretrain").constraints["experiment"], name)
    assert not re.fullmatch(rule_of(whole, "planar_threshold").constraints["method"], "am")
    assert not re.fullmatch(rule_of(whole, "planar_exact").constraints["experiment"], "ot_2d")


# ------------------------------------------------------------------------------------ resources and groups


def test_resources_follow_the_configuration(planned: Callable[..., Plan]) -> None:
    short, long = planned(), planned(job_length="long", gpu=2, processes=3)
    finetune, threshold, exact = (
        rule_of(short, f"planar_{name}").stage.needs for name in ("finetune", "threshold", "exact")
    )
    assert (finetune.memory(short.config), finetune.minutes(short.config)) == (1500, 10)
    assert (finetune.memory(long.config), finetune.minutes(long.config)) == (3 * 8000, 480)
    assert (finetune.gpus(short.config), finetune.gpus(long.config)) == (0, 6)
    assert (finetune.processes(short.config), finetune.processes(long.config)) == (1, 3)
    for one in (threshold, exact):
        assert (one.gpus(long.config), one.processes(long.config)) == (0, 1)
    assert (finetune.group_in(short.config), finetune.group_in(long.config)) == ("finetune", None)
    assert threshold.group_in(short.config) == threshold.group_in(long.config) == "pretrain"
    assert finetune.group_in(planned(gpu=1).config) is None


def test_the_paper_s_scale_has_long_jobs_of_a_gpu_each() -> None:
    config = WorkflowConfig.model_validate(committed("config", "paper"))
    needs = {
        f"{name}_{stage.name}": stage.needs
        for name in ("planar", "molecules")
        for stage in domain_named(name).stages
    }
    assert needs["planar_finetune"].gpus(config) == 1
    assert needs["planar_threshold"].gpus(config) == needs["molecules_evaluate"].gpus(config) == 0
    assert needs["planar_finetune"].minutes(config) == 480
    assert needs["planar_finetune"].group_in(config) is None
    assert needs["planar_threshold"].group_in(config) == "pretrain"


def test_a_job_that_several_processes_share_is_started_by_torchrun(planned: Callable[..., Plan]) -> None:
    plan = planned(gpu=2, processes=3)
    wildcards = {"experiment": "risk_averse_2d", "method": "am", "seed": "0"}
    assert rule_of(plan, "planar_finetune").command(6, **wildcards) == (
        "OMP_NUM_THREADS=2 torchrun --standalone --nproc-per-node 3 --no-python "
        f"flowtilt finetune {plan.config_files['risk_averse_2d']} --method am --seed 0 --results results "
        "--workers 2 --gpu 2"
    )
    del wildcards["method"]
    assert (
        rule_of(plan, "planar_density")
        .command(6, **wildcards)
        .startswith("OMP_NUM_THREADS=6 flowtilt density")
    )
    assert "--gpu" not in rule_of(plan, "planar_density").command(6, **wildcards)


def test_what_a_stage_asks_for_can_be_met() -> None:
    for name in sources():
        for stage in domain_named(name).stages:
            assert isinstance(stage.needs, Needs)
            assert all(mb >= 500 for mb in stage.needs.mb)
            assert stage.needs.mb[0] <= stage.needs.mb[1]
            assert stage.needs.time[0] <= stage.needs.time[1]
            assert not (stage.needs.local and (stage.needs.gpu or stage.needs.group))
            assert not (stage.needs.shared and not stage.needs.gpu)


# ------------------------------------------------------------------------------------ digests and addresses


def small(**changes: Any) -> dict[str, Any]:
    """The overrides of the small configuration with more keys in the plane."""
    return {**SMALL["overrides"], "planar": {**SMALL["overrides"]["planar"], **changes}}


def of_risk(**changes: Any) -> dict[str, Any]:
    """The same with keys of the one experiment's file changed."""
    return {**SMALL["overrides"], "files": {"risk_averse_2d": changes}}


@pytest.mark.parametrize(
    ("overrides", "changed", "kept"),
    [
        (
            small(objective={"alpha": 3.0}),
            {"threshold", "finetune", "exact", "measure"},
            {"pretrain", "density"},
        ),
        (
            small(solver={"updates": 9}),
            {"finetune", "offline"},
            {"pretrain", "density", "exact", "threshold"},
        ),
        (small(grid={"cells": 120}), {"density", "measure", "exact"}, {"pretrain", "offline", "finetune"}),
        (
            of_risk(methods={"am": {"updates": 9}}),
            {"finetune", "measure", "exact"},
            {"pretrain", "offline", "threshold"},
        ),
        (of_risk(methods={"fdc": {"iterations": 7}}), {"measure", "exact"}, {"finetune", "threshold"}),
        (
            small(title="Another title"),
            set(),
            {"pretrain", "density", "offline", "threshold", "finetune", "measure", "exact"},
        ),
    ],
)
def test_a_digest_changes_with_what_its_stage_reads_alone(
    planned: Callable[..., Plan], overrides: dict[str, Any], changed: set[str], kept: set[str]
) -> None:
    before, after = planned(), planned(overrides=overrides)

    def digest(plan: Plan, stage: str) -> list[str]:
        rule = rule_of(plan, "planar_measure_risk_averse_2d" if stage == "measure" else f"planar_{stage}")
        method = "tfft" if stage == "threshold" else "am"
        values = {"experiment": "risk_averse_2d", "method": method, "seed": "0"}
        return rule.digest(**{field: values[field] for field in rule.wildcards})

    differ = {stage: digest(before, stage) != digest(after, stage) for stage in changed | kept}
    assert {stage for stage, other in differ.items() if other} == changed
    assert before.config_files["risk_averse_2d"] != after.config_files["risk_averse_2d"]
    assert before.config_hash() != after.config_hash()
    assert before.file_digest("risk_averse_2d") != after.file_digest("risk_averse_2d")


@pytest.mark.parametrize(
    ("domain", "name", "method", "evaluation", "kept"),
    [
        ("molecules", "molecules_qm9", "tfft_0.9", {"relaxed": 1}, {"finetune", "offline", "data"}),
        ("images", TAIL, "tfft", {"images": 3}, {"finetune", "offline", "model", "threshold"}),
    ],
)
def test_what_an_evaluation_draws_changes_no_training(
    whole: Plan,
    planned: Callable[..., Plan],
    domain: str,
    name: str,
    method: str,
    evaluation: dict[str, int],
    kept: set[str],
) -> None:
    after = planned(experiments=[name], overrides={domain: {"evaluation": evaluation}})

    def digest(plan: Plan, stage: str) -> list[str]:
        rule = rule_of(plan, f"{domain}_{stage}")
        values = {"experiment": name, "method": method, "seed": "0", "data": "qm9"}
        return rule.digest(**{field: values[field] for field in rule.wildcards})

    for stage in kept:
        assert digest(whole, stage) == digest(after, stage), stage
    for stage in ("sample", "evaluate"):
        assert digest(whole, stage) != digest(after, stage), stage


@pytest.mark.parametrize("name", ["planar", "molecules", "images"])
def test_stages_read_sections_that_there_are(whole: Plan, name: str) -> None:
    for stage in domain_named(name).stages:
        for experiment in whole.experiments.values():
            if experiment.domain == name and stage.of(experiment):
                sections = (*stage.sections, *experiment.reads_too.get(stage.name, ()))
                assert {*sections} <= {*type(experiment).model_fields}
                assert len(sections) == len(set(sections))


def test_what_is_merged_is_handed_on_as_it_was_given(planned: Callable[..., Plan]) -> None:
    assert json.loads(planned().overrides) == SMALL["overrides"]
    assert planned(overrides={}).overrides == "{}"


def test_configurations_are_written_once_at_their_contents_address(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = planned(), planned(overrides=small(title="Another title"))
    monkeypatch.chdir(tmp_path)
    write_configs(first)
    file = tmp_path / first.config_files["risk_averse_2d"]
    assert load_resolved(file) == first.experiments["risk_averse_2d"]
    written = file.stat().st_mtime_ns
    write_configs(second)
    write_configs(first)
    assert file.stat().st_mtime_ns == written
    assert load_resolved(second.config_files["risk_averse_2d"]) == second.experiments["risk_averse_2d"]


def test_a_job_whose_configuration_is_not_there_says_why(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = planned().config_files["risk_averse_2d"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the configuration has changed since the run was started"):
        load_resolved(file)


def test_rules_are_those_of_the_workflow() -> None:
    folder = ROOT / "workflow"
    texts = [path.read_text() for path in [folder / "Snakefile", *(folder / "rules").glob("*.smk")]]
    rules = {line[5:-1] for text in texts for line in text.splitlines() if line.startswith("rule ")}
    entered = {name for text in texts for name in re.findall(r'^made\(\n    "(\w+)",$', text, re.MULTILINE)}
    assert rules | entered | {"figures"} == {*REPORT, *TARGETS}  # those of figures are made in a loop


def test_the_shell_gets_every_name_and_path_quoted() -> None:
    """But for a command that is quoted as it is made, and numbers."""
    shells = 0
    for file in (ROOT / "workflow" / "rules").glob("*.smk"):
        for shell in re.findall(r"^ +shell:\n(.*?)(?:\n\n|\Z)", file.read_text(), re.DOTALL | re.MULTILINE):
            fields = re.findall(r"{([^}]*)}", shell)
            plain = {field for field in fields if not field.endswith(":q")}
            assert plain <= {"threads", "params.path", "params.command"}, f"{file.name}: {shell}"
            shells += 1
    assert shells == 2  # one for stages, and one for all that is made of results


def test_commands_of_stages_are_quoted_as_they_are_made(planned: Callable[..., Plan]) -> None:
    plan = planned(results="/tmp/a")
    plan.config_files["risk_averse_2d"] = "a b;c"
    command = rule_of(plan, "planar_pretrain").command(experiment="risk_averse_2d", seed="$x")
    assert shlex.split(command)[3:] == ["a b;c", "--seed", "$x", "--results", "/tmp/a", "--workers", "1"]


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experimens": []}, ("key experimens: unknown", "known keys here: results, experiments")),
        ({"experiments": []}, ("key experiments:", "at least 1")),
        ({"experiments": ["a", "a"]}, ("key experiments: 'a' occurs twice",)),
        ({"experiments": ["my experiment"]}, ("key experiments.0:",)),
        ({"experiments": ["risk_averse_3d"]}, ("key experiments: unknown", "risk_averse_3d", "novelty_2d")),
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
        ({"overrides": {"planar": {"seeds": 0}}}, ("key overrides: merged into", "key seeds")),
        (
            {"overrides": {"planar": {"objective": {"alpha": 0}}}},
            ("key overrides: merged into", "key objective.alpha"),
        ),
        (
            {"overrides": {"planar": {"solvr": {"updates": 3}}}},
            ("key overrides: merged into", "key solvr: unknown"),
        ),
        (
            {"overrides": {"solver": {"updates": 3}}},
            ("key overrides: merged into", "key solver: ", "under their domain (images, molecules, planar)"),
        ),
        ({"overrides": {"planar": 3}}, ("key overrides: merged into", "key planar: must map keys")),
        ({"overrides": {"skip": {"nothing": {}}}}, ("key overrides.skip.nothing: there is no",)),
        ({"overrides": {"files": {"nothing": {}}}}, ("key overrides.files.nothing: there is no",)),
        ({"overrides": {"skip": 3}}, ("key overrides.skip:",)),
    ],
)
def test_a_bad_configuration_is_refused(
    planned: Callable[..., Plan], changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused({**SMALL, "overrides": {}, **changes}, "config/my.yaml: key ", *words)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("planar_pretrain", "rule"),
        ("planar_measure_risk_averse_2d", "rule"),
        ("figures_risk_averse_2d", "rule"),
        ("compare", "rule"),
        ("tables", "rule"),
        ("comparison", "table"),
        ("theory_threshold", "table"),
    ],
)
def test_names_that_the_workflow_has_are_refused(edited: Callable[..., None], name: str, what: str) -> None:
    file = Path(f"config/experiments/{name}.yaml")
    shutil.copy("config/experiments/risk_averse_2d.yaml", file)
    edited(name, "name", name)
    refused(
        {**SMALL, "experiments": ["risk_averse_2d", name]},
        f"config/my.yaml: key experiments: {name}: the workflow has a {what} of this name",
        f"rename the experiment, in its key name and its file {file}",
    )


def test_what_says_nothing_is_taken_from_the_folder_of_the_results(planned: Callable[..., Plan]) -> None:
    for folder in ("res/", "./res", "res//"):
        assert planned(results=folder).config.results == "res"
    assert planned(results="/tmp/a/").config.results == "/tmp/a"


def test_overrides_of_a_study_that_is_not_run_are_left_aside(planned: Callable[..., Plan]) -> None:
    assert planned(theory=[], theory_overrides={"threshold": {"batches": 0}}).theory == {}


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("risk_averse_2d", "objective.mass", 1.0, ("risk_averse_2d.yaml: key objective.mass",)),
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


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("plane", ("unknown domain 'plane'; known here: images, molecules, planar", "is installed")),
        (3, ("must be images or molecules or planar, got 3",)),
        ("molecules", ("key subset: missing",)),
    ],
)
def test_an_experiment_of_a_domain_that_is_not_there_is_refused(
    edited: Callable[..., None], value: Any, words: tuple[str, ...]
) -> None:
    edited("risk_averse_2d", "domain", value)
    refused({**SMALL, "overrides": {}}, "config/experiments/risk_averse_2d.yaml: key ", *words)


def test_an_unknown_parent_of_a_case_is_refused(edited: Callable[..., None]) -> None:
    edited("iterations_2d", "study.cases.0.of", "risk_2d")
    refused({**SMALL, "overrides": {}, "experiments": ["iterations_2d"]}, "risk_2d", "risk_averse_2d")


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"utility": {"kind": "entropie"}}, ("key objective.utility: unknown utility 'entropie'", "entropy")),
        (
            {"utility": {"kind": "cvar", "lvl": 0.1}},
            ("utility cvar: key lvl: unknown; known keys here: mass",),
        ),
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


def test_what_planning_imports_comes_with_snakemake() -> None:
    program = (
        "import sys; from pathlib import Path; from flowtilt.pipeline.checks import read_plan; "
        "from flowtilt.pipeline.configuration import read_yaml; import flowtilt.pipeline.starting; "
        "plan = read_plan(read_yaml(Path('config/config.yaml')), ''); plan.rules, plan.runs, plan.figures; "
        "print(*{name.partition('.')[0] for name in sys.modules} - {*sys.stdlib_module_names})"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=True,
    )
    parts = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "yaml"}
    built = {"__main__", "_yaml", "_cython", "cython_runtime", "_sysconfigdata"}
    others = {name for name in run.stdout.split() if not name.startswith(tuple(built))}
    assert others == {"flowtilt", *parts}


def test_experiments_without_their_packages_are_left_out(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    molecules = ["molecules_qm9", "molecules_tail_sweep"]
    plan = planned(experiments=[molecules[0], "risk_averse_2d", molecules[1]])
    monkeypatch.setattr(checks, "is_installed", lambda package: package != "tblite")
    rest, said = checks.runnable(plan, "config/config.yaml")
    assert rest.config.experiments == ["risk_averse_2d"]
    assert len(said) == 1
    assert said[0].startswith("molecules_qm9, molecules_tail_sweep: left out, since this Python")
    assert "lacks tblite" in said[0]
    monkeypatch.setattr(checks, "is_installed", lambda package: True)
    assert checks.runnable(plan, "")[0] is plan
    monkeypatch.setattr(checks, "is_installed", lambda package: False)
    with pytest.raises(ConfigError, match="key experiments: none can run here"):
        checks.runnable(planned(experiments=molecules), "config/config.yaml")
