"""Configurations of experiments on images: what is refused, and what a stage's hash depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowtilt.domains.images import DOMAIN
from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.pipeline.configuration import ConfigError, merge
from flowtilt.pipeline.experiment import dump, load_file, load_resolved, stage_digest
from small import CONFIG

LEFT_TAIL, ENTROPY = "text_to_image_left_tail", "text_to_image_entropy"
FDC = {"kind": "fdc", "by": "exponents", "iterations": 1, "mass": None}
OF_NO_BATCH: dict[str, Any] = {
    "resampled": {"kind": "best_of", "n": 4},
    "resampled_tfft": {"kind": "best_of", "n": 4, "of": None},
    "steered_tfft": {"of": None},
}
"""Methods that train nothing without those that take the offline batch, or a threshold from it."""
STAGES = [stage.name for stage in DOMAIN.stages]


def load(name: str, **changes: Any) -> ImageExperiment:
    (experiment,) = load_file(CONFIG / "experiments" / f"{name}.yaml", {"images": changes}).values()
    assert isinstance(experiment, ImageExperiment)
    return experiment


def model(**changes: Any) -> dict[str, Any]:
    """The embedded model's file with some keys changed, as an experiment holds it."""
    data = yaml.safe_load((CONFIG / "models" / "bridges.yaml").read_text())
    return {"name": "changed", **merge(data, changes)}


@pytest.mark.parametrize("name", [LEFT_TAIL, ENTROPY])
def test_a_resolved_experiment_holds_its_model(name: str, tmp_path: Path) -> None:
    experiment = load(name)
    assert experiment.model.name == "bridges"
    path = tmp_path / "resolved.yaml"
    path.write_text(dump(experiment))
    assert load_resolved(path) == experiment


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (ENTROPY, {"methods": {"fdc": {"iterations": None}}}, "an fdc method needs iterations"),
        (ENTROPY, {"methods": {"am": {"mass": 0.1}}}, "mass belongs to fdc and tfft, not to am"),
        (ENTROPY, {"methods": {"fdc": {"mass": 0.1}}}, "tfft and mass are of the left tail, not of entropy"),
        (
            ENTROPY,
            {"methods": {"fdc": {"by": "exponents"}}},
            "the entropy of latents has scores and no values",
        ),
        (
            ENTROPY,
            {"methods": {"fdc": {"solver": {"kind": "annealed_fitting"}}}},
            "methods.fdc.solver.kind: the entropy of latents has scores and no values, which fits take",
        ),
        (ENTROPY, {"methods": {"pretrained": {"updates": 3}}}, "belong to methods that are fine-tuned"),
        (
            ENTROPY,
            {"methods": {"other": {"kind": "tfft"}}},
            "tfft and mass are of the left tail, not of entropy",
        ),
        (
            LEFT_TAIL,
            {"methods": {"other": {"kind": "fdc", "iterations": 2, "step": 1.0}}},
            "methods.other.by: on the left tail fdc goes by the reward's values; set it to exponents",
        ),
        (
            LEFT_TAIL,
            {"methods": {"tfft": FDC, "tfft_0.1": FDC, "tfft_0.5": FDC} | OF_NO_BATCH, "offline": None},
            "offline: method 'tfft' finds its first step on an offline batch; add samples",
        ),
        (LEFT_TAIL, {"solver": {"endpoint_gradient": "likelihood_ratio"}}, "pathwise"),
        (
            LEFT_TAIL,
            {"methods": OF_NO_BATCH, "offline": None},
            "offline: method 'tfft' finds its threshold from",
        ),
        (LEFT_TAIL, {"offline": None}, "offline: method 'resampled' resamples an offline batch; add samples"),
        (
            LEFT_TAIL,
            {"offline": {"samples": 19}},
            "offline.samples: 19 are fewer than the 20 prompts, each of which 'resampled' resamples",
        ),
        (ENTROPY, {"methods": {"am": {"n": 4}}}, "n belongs to best_of, not to am; remove it"),
        (LEFT_TAIL, {"solver": {"passes": 0}}, "passes"),
        (LEFT_TAIL, {"objective": {"mass": 1.0}}, "mass"),
        (LEFT_TAIL, {"objective": {"utility": "mean"}}, "utility"),
        (LEFT_TAIL, {"prompts": []}, "prompts"),
        (LEFT_TAIL, {"guidance": {"sampling": 0.5}}, "guidance.sampling"),
        (LEFT_TAIL, {"schedule": {"spacing": "linspace"}}, "schedule.spacing"),
        (LEFT_TAIL, {"evaluation": {"images": 1}}, "evaluation.images"),
        (LEFT_TAIL, {"evaluation": {"sets": 0}}, "evaluation.sets"),
        (LEFT_TAIL, {"evaluation": {"factors": [{"classes": ["by day"]}]}}, "evaluation.factors"),
        (
            LEFT_TAIL,
            {"evaluation": {"designs": [], "factors": [{"classes": ["by day", "at night"]}]}},
            "factors are told beside designs",
        ),
        (
            LEFT_TAIL,
            {"reward": {"kind": "image_reward"}},
            "weights belong to image_reward, which must have them",
        ),
        (LEFT_TAIL, {"model": model(embedded={"bridges": {"size": 20}})}, "bridges.size"),
        (LEFT_TAIL, {"model": model(embedded={"alignment": {"patch": 5}})}, "not a multiple of 5"),
        (LEFT_TAIL, {"model": model(pipeline={"sha256": {"a": "short"}})}, "sha256"),
        (LEFT_TAIL, {"compute": {"precision": "int8"}}, "compute.precision"),
    ],
)
def test_bad_values_are_refused_with_their_key(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(name, **changes)
    assert said in str(error.value)
    assert f"{name}.yaml" in str(error.value)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model .dall_e.*known: bridges, stable_diffusion_1_4"):
        load(ENTROPY, model="dall_e")


def test_a_model_that_is_not_trained_here_cannot_be_retrained() -> None:
    with pytest.raises(ConfigError, match="has no section embedded to be trained by"):
        load(ENTROPY, model="stable_diffusion_1_4", retrain=True)


@pytest.mark.parametrize("name", [LEFT_TAIL, ENTROPY])
def test_the_papers_scale_is_an_override(name: str) -> None:
    overrides = yaml.safe_load((CONFIG / "paper.yaml").read_text())["overrides"]
    experiment = load_file(CONFIG / "experiments" / f"{name}.yaml", overrides)[name]
    assert isinstance(experiment, ImageExperiment)
    assert experiment.model.name == {ENTROPY: "stable_diffusion_1_4", LEFT_TAIL: "stable_diffusion_1_5"}[name]
    assert experiment.model.pipeline.hub is not None
    assert experiment.methods.keys() == load(name).methods.keys() - {"fdc_alpha_8", "fdc_alpha_1"}
    if name == LEFT_TAIL:
        assert len(set(experiment.prompts)) == 100
        assert experiment.reward.kind == "image_reward"


def test_prompts_of_the_left_tail_are_the_drawn_sets_wishes() -> None:
    from flowtilt.domains.images.bridges import CREATIVE, DESIGNS
    from small_images import PROMPTS

    assert tuple(load(LEFT_TAIL).prompts) == PROMPTS
    assert load(ENTROPY).prompts == [CREATIVE]
    assert load(ENTROPY).evaluation.designs == list(DESIGNS)


def test_a_stage_runs_again_for_what_it_reads_alone() -> None:
    before, after = load(LEFT_TAIL), load(LEFT_TAIL, evaluation={"images": 4})
    same = {s: stage_digest(before, s) == stage_digest(after, s) for s in STAGES}
    assert {stage for stage, equal in same.items() if not equal} == {"keep", "sample", "evaluate"}
    after = load(LEFT_TAIL, objective={"alpha": 1.0})
    same = {s: stage_digest(before, s) == stage_digest(after, s) for s in STAGES}
    changed = {stage for stage, equal in same.items() if not equal}
    assert changed == {"threshold", "finetune", "keep", "evaluate"}


def test_the_configuration_is_read_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, flowtilt.domains.images; assert not {'torch', 'diffusers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
