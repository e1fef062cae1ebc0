"""Configurations: what is valid, and what one reads when something is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.pipeline.configuration import ConfigError, merge
from flowtilt.pipeline.experiment import dump, load_file, load_resolved, method_of, stage_digest
from small import CONFIG, in_plane

EXPERIMENTS = CONFIG / "experiments"
RISK = EXPERIMENTS / "risk_averse_2d.yaml"
TAIL: dict[str, Any] = {"utility": {"kind": "cvar", "mass": 0.2}, "divergence": {"kind": "kl"}}


def with_change(tmp_path: Path, change: dict[str, Any]) -> Path:
    """The risk-averse experiment under its own name in a folder of its own, with some keys changed."""
    file = tmp_path / "risk_averse_2d.yaml"
    file.write_text(yaml.safe_dump(merge(yaml.safe_load(RISK.read_text()), change)))
    return file


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_shipped_file_loads_and_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    for name, experiment in load_file(file).items():
        written = tmp_path / f"{name.replace('/', '-')}.yaml"
        written.write_text(dump(experiment))
        assert load_resolved(written) == experiment
        assert experiment.name == name


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        ({"objective": {"mass": 1.0}}, "objective.mass", "less than 1"),
        ({"objective": {"mass": 0.0}}, "objective.mass", "greater than 0"),
        ({"objective": {"mass": -0.1}}, "objective.mass", "greater than 0"),
        ({"objective": {"alpha": 0.0}}, "objective.alpha", "greater than 0"),
        ({"objective": {"alpha": -1.0}}, "objective.alpha", "greater than 0"),
        ({"seeds": 0}, "seeds", "at least 1"),
        ({"seeds": []}, "seeds", "at least 1"),
        ({"objective": {"lvl": 0.1}}, "objective.lvl", "known keys here: tail, mass, alpha"),
        ({"colour": "red"}, "colour", "known keys here: name"),
        ({"solver": {"pool": 1}}, "solver", "must be at least batch"),
        ({"solver": {"batch": 1}}, "solver.batch", "greater than or equal to 2"),
        (
            {"path": {"kind": "linear"}},
            "(whole file)",
            "network.prediction: a score gives no finite",
        ),
        (
            {"methods": {"am": {"kind": "ppo"}}},
            "methods.am.kind",
            "'pretrained', 'am', 'fdc', 'tfft', 'best_of', 'resampled' or 'steered'",
        ),
        ({"methods": {"am": {"kind": "am", "step": 0.5}}}, "methods.am", "step belong to fdc, not to am"),
        ({"methods": {"fdc": {"by": None}}}, "methods.fdc", "needs step, or by: exponents, which searches"),
        ({"methods": {"fdc": {"by": "values"}}}, "methods.fdc.by", "'scores' or 'exponents'"),
        ({"methods": {"am": {"by": "exponents"}}}, "methods.am", "by belong to fdc, not to am"),
        (
            {"methods": {"more": {"kind": "fdc", "iterations": 3, "step": 0.5, "continue_from": "fdc"}}},
            "(whole file)",
            "methods.more must have more iterations than 'fdc', and all other keys the same",
        ),
        ({"methods": {"fdc": {"continue_from": "none"}}}, "(whole file)", "no fdc method of this experiment"),
        ({"reward": {"landscape": "cliffs"}}, "reward.landscape", "stripes, spikes or module:Class"),
        ({"reward": {"width": 0.0}}, "reward.width", "greater than 0"),
        ({"data": {"weights": [1.0]}}, "data", "one entry per component"),
        ({"data": {"modes": [0, 1]}}, "(whole file)", "data.modes: belongs to experiments on functionals"),
        ({"name": "another"}, "name", "must be the file's own"),
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


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        ({"objective": {"alpha": -0.1}}, "objective.alpha", "greater than or equal to 0"),
        ({"data": {"modes": [0, 1]}}, "data", "modes must have one entry per component"),
        ({"data": {"modes": [1]}}, "data", "leave out no number from 0"),
        ({"data": {"modes": [-1]}}, "data.modes.0", "greater than or equal to 0"),
        ({"objective": {"utility": {"kind": None}}}, "objective.utility.kind", "string"),
        ({"methods": {"am": {"kind": "tfft"}}}, "(whole file)", "methods.am: tfft raises a tail mean"),
        (
            {"methods": {"fdc_dA": {"by": "exponents"}}},
            "(whole file)",
            "methods.fdc_dA: by exponents fdc pays for a KL divergence, got wasserstein1; remove by",
        ),
        (
            {"methods": {"t": {"kind": "tfft", "objective": {**TAIL, "alpha": 0.0}}}},
            "(whole file)",
            "alpha > 0",
        ),
        ({"methods": {"t": {"kind": "tfft", "objective": TAIL}}, "reward": None}, "(whole file)", "a reward"),
        (
            {"methods": {"t": {"kind": "tfft", "objective": {**TAIL, "utility": {"kind": "sq", "mass": 1}}}}},
            "(whole file)",
            "mass: between 0 and 1",
        ),
        (
            {"methods": {"am": {"solver": {"bnk": 3}}}},
            "(whole file)",
            "methods.am.solver: key bnk: unknown; known",
        ),
        ({"methods": {"am": {"solver": {"bank": 0}}}}, "(whole file)", "methods.am.solver: key bank"),
        (
            {"methods": {"am": {"solver": {"pool": 2}}}},
            "(whole file)",
            "methods.am.solver: key (whole file): pool",
        ),
        (
            {"methods": {"pretrained": {"solver": {"bank": 9}}}},
            "methods.pretrained",
            "solver belongs to methods",
        ),
        ({"methods": {"fdc_dA": {"step_weight": None}}}, "methods.fdc_dA", "needs step_weight"),
        ({"methods": {"fdc_dA": {"step": 0.5}}}, "methods.fdc_dA.step", "unknown"),
        ({"methods": {"am": {"objective": {"alpha": 0.0}}}}, "(whole file)", "am raises the expected reward"),
        (
            {"methods": {"am": {"objective": {"alpha": -1.0}}}},
            "(whole file)",
            "methods.am.objective: key alpha",
        ),
        ({"methods": {"am": {"objective": {"alfa": 1.0}}}}, "(whole file)", "known keys here: utility"),
        ({"methods": {"optimum": {"kind": "pretrained"}}}, "(whole file)", "the name is taken"),
        ({"reward": {"landscape": "stripes"}}, "reward.landscape", "slope, rings, cone or module:Class"),
        ({"solver": {"kind": "newton"}}, "solver.kind", "'weighted_fitting' or 'annealed_fitting'"),
        (
            {"evaluation": {"transport": {"metrics": {"dA": [1.0]}}}},
            "evaluation.transport.metrics.dA",
            "2 items",
        ),
    ],
)
def test_errors_of_functional_experiments(
    change: dict[str, Any], key: str, hint: str, tmp_path: Path
) -> None:
    file = tmp_path / "ot_2d.yaml"
    file.write_text(yaml.safe_dump(merge(yaml.safe_load((EXPERIMENTS / "ot_2d.yaml").read_text()), change)))
    with pytest.raises(ConfigError) as caught:
        load_file(file)
    assert f"{file}: key {key}:" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("utility", "mass", "spec"), [("cvar", 0.2, ("lower", 0.2, 3.0)), ("sq", 0.25, ("upper", 0.25, 3.0))]
)
def test_tail_of_a_method_on_a_functional(utility: str, mass: float, spec: tuple[str, float, float]) -> None:
    objective = {**TAIL, "utility": {"kind": utility, "mass": mass}}
    tfft = {"kind": "tfft", "objective": objective}
    (experiment,) = load_file(EXPERIMENTS / "ot_2d.yaml", in_plane(methods={"tfft": tfft})).values()
    assert experiment.tail_of("tfft") == spec
    with pytest.raises(ConfigError, match=r"experiment ot_2d: key methods.am: tfft raises a tail mean"):
        experiment.tail_of("am")


def test_tail_of_a_tail_experiment_is_its_objective() -> None:
    (experiment,) = load_file(RISK).values()
    assert experiment.tail_of("tfft") == ("lower", 0.01, 200.0)


@pytest.mark.parametrize("file", ["risk_averse_2d", "ot_2d"])
def test_a_method_changes_the_solver_for_itself_alone(file: str) -> None:
    changes = {"kind": "weighted_fitting", "learning_rate": 0.004, "updates": 50}
    path = EXPERIMENTS / f"{file}.yaml"
    other = {"kind": "am", "solver": changes, "objective": {**TAIL, "utility": {"kind": "expected_reward"}}}
    if file == "risk_averse_2d":
        del other["objective"]
    (plain,) = load_file(path).values()
    (changed,) = load_file(path, in_plane(methods={"other": other})).values()
    assert changed.solver_of("other") == plain.solver.model_copy(update=changes)
    assert changed.solver_of("am") == plain.solver_of("am") == plain.solver
    assert changed.updates_of("other") == 50
    assert changed.updates_of("am") == plain.solver.updates
    (fewer,) = load_file(path, in_plane(methods={"other": {**other, "updates": 20}})).values()
    assert fewer.updates_of("other") == 20
    assert stage_digest(changed, "finetune", "other") != stage_digest(fewer, "finetune", "other")
    assert stage_digest(changed, "finetune", "am") == stage_digest(plain, "finetune", "am")
    together = "exact" if plain.solved_apart else "measure"
    assert len({stage_digest(e, together) for e in (plain, changed, fewer)}) == 3


def test_distances_need_a_pretrained_method(tmp_path: Path) -> None:
    data = yaml.safe_load((EXPERIMENTS / "ot_2d.yaml").read_text())
    del data["methods"]["pretrained"]
    file = tmp_path / "ot_2d.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"evaluation.transport: .*add methods.pretrained"):
        load_file(file)


def test_another_kind_replaces_a_mapping_and_the_same_kind_changes_it() -> None:
    old = {"divergence": {"kind": "mmd", "kernel": "energy"}, "alpha": 1.0}
    assert merge(old, {"divergence": {"kind": "kl"}}) == {"divergence": {"kind": "kl"}, "alpha": 1.0}
    same = merge(old, {"divergence": {"kind": "mmd", "bandwidth": 2.0}})
    assert same["divergence"] == {"kind": "mmd", "kernel": "energy", "bandwidth": 2.0}


def test_unknown_files_and_methods_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no_such_2d.*experiments in .*: entropy_2d, hierarchy_2d, iter"):
        load_file(EXPERIMENTS / "no_such_2d.yaml")
    (experiment,) = load_file(RISK).values()
    with pytest.raises(ConfigError, match=r"unknown method 'ppo'; it has pretrained, am, fdc, tfft"):
        method_of(experiment, "ppo")


def test_broken_yaml_is_one_line_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("name: [broken")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_file(file)
    file.write_text("- a list")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_file(file)


def test_a_study_changes_only_what_its_case_says() -> None:
    cases = load_file(EXPERIMENTS / "resolution_2d.yaml")
    (parent,) = load_file(RISK).values()
    narrow, wide = cases["resolution_2d/stripes-0.05"], cases["resolution_2d/stripes-0.48"]
    assert narrow.reward == parent.reward
    assert narrow.starts_from == wide.starts_from == "risk_averse_2d"
    assert wide.reward.width == 0.48
    assert wide.reward.bump == parent.reward.bump
    assert narrow.solver == parent.solver
    own = {"updates": 300, "learning_rate": 0.002, "endpoint_gradient": "pathwise"}
    assert wide.solver == parent.solver.model_copy(update=own)
    assert len(wide.seeds) == 3


SKIPPED = EXPERIMENTS / "iterations_2d.yaml"


def test_cases_and_methods_can_be_left_out() -> None:
    methods = ["fdc_k20", "tfft"]
    one = {"cases": ["novelty"]}
    skip = {"iterations_2d": {**one, "methods": methods}, "resolution_2d": {"cases": ["spikes-0.6"]}}
    overrides = {"skip": skip, **in_plane(seeds=1)}
    (experiment,) = load_file(SKIPPED, overrides).values()
    (before,) = load_file(SKIPPED, {"skip": {"iterations_2d": one}, **in_plane(seeds=1)}).values()
    assert list(experiment.methods) == [m for m in before.methods if m not in methods]
    cases = load_file(EXPERIMENTS / "resolution_2d.yaml", overrides)
    assert len(cases) == 5
    assert "resolution_2d/spikes-0.6" not in cases
    assert load_file(RISK, overrides) == load_file(RISK, in_plane(seeds=1))


@pytest.mark.parametrize(
    ("skip", "said"),
    [
        (
            {"methods": ["ppo"]},
            "key skip.iterations_2d.methods: there is no method 'ppo' (pretrained, fdc_k1",
        ),
        ({"cases": ["easy"]}, "key skip.iterations_2d.cases: there is no case 'easy'"),
        ({"case": ["risk_averse"]}, "key case: unknown; known keys here: cases, methods"),
        ({"methods": ["fdc_k1"]}, "methods.fdc_k2.continue_from names 'fdc_k1'"),
    ],
)
def test_what_cannot_be_left_out_is_said(skip: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_file(SKIPPED, {"skip": {"iterations_2d": skip}})
    assert str(SKIPPED) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "table", "known"),
    [
        ("hierarchy_2d", "axis", "hierarchy or solvers"),
        ("iterations_2d", "solvers", "axis"),
        ("solvers_2d", "curve", "hierarchy or solvers"),
    ],
)
def test_table_of_a_study_must_fit_its_cases(name: str, table: str, known: str, tmp_path: Path) -> None:
    for file in EXPERIMENTS.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(merge(yaml.safe_load(file.read_text()), {"study": {"table": table}})))
    said = f"{name}.yaml: key study.table: its cases can have {known}, got '{table}'"
    with pytest.raises(ConfigError, match=said):
        load_file(file)


def test_overrides_have_the_last_word() -> None:
    overrides = in_plane(seeds=1, solver={"updates": 7})
    for file in EXPERIMENTS.glob("*_2d.yaml"):
        for experiment in load_file(file, overrides).values():
            assert experiment.seeds == [0]
            assert experiment.solver.updates == 7


def test_digests_change_with_what_a_stage_reads_and_with_nothing_else() -> None:
    (before,) = load_file(RISK).values()
    (after,) = load_file(RISK, in_plane(methods={"fdc": {"iterations": 3}})).values()
    assert stage_digest(before, "finetune", "fdc") != stage_digest(after, "finetune", "fdc")
    for stage, method in [("finetune", "am"), ("pretrain", None), ("offline", None), ("threshold", "tfft")]:
        assert stage_digest(before, stage, method) == stage_digest(after, stage, method)
    (fewer,) = load_file(RISK, in_plane(seeds=2)).values()
    for stage in ("pretrain", "offline", "exact"):
        assert stage_digest(before, stage) == stage_digest(fewer, stage)


def test_metric_names_follow_the_mass() -> None:
    (experiment,) = load_file(RISK).values()
    assert (experiment.main_metric, experiment.mean_metric) == ("worst_1pct_cost", "mean_cost")
    (upper,) = load_file(EXPERIMENTS / "novelty_2d.yaml", in_plane(objective={"mass": 0.002})).values()
    assert upper.main_metric == "top_0.2pct_reward"
    (functional,) = load_file(EXPERIMENTS / "ot_2d.yaml").values()
    assert (functional.main_metric, functional.mean_metric) == ("functional", "mean_reward")


def test_reading_a_configuration_needs_no_torch() -> None:
    import subprocess
    import sys

    modules = "flowtilt.pipeline.experiment, flowtilt.domains.planar.evaluation"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
