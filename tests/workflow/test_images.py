"""Images in the workflow: the short run, a folder like Stable Diffusion 1.4's, a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from workflow_copy import SMOKE, Project

pytest.importorskip("diffusers", reason="the extra 'images' is not installed")
pytest.importorskip("open_clip", reason="the extra 'images' is not installed")

from small_images import EMBEDDED, write_models

LEFT_TAIL, ENTROPY = "text_to_image_left_tail", "text_to_image_entropy"
METRICS = f"runs/{ENTROPY}/pretrained/seed0/metrics.json"

# Of CompVis/stable-diffusion-v1-4: a scheduler that is not DDIM, with its noise levels.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.fast
def test_all_files_of_a_run_are_there(finished: Project) -> None:
    run = finished.smoke / "runs" / LEFT_TAIL / "tfft" / "seed0"
    assert {path.name for path in run.iterdir()} == {
        *("threshold.json", "model.safetensors", "history.csv", "images", "metrics.json", "scores.npz")
    }
    overrides = yaml.safe_load((finished.folder / "config" / "smoke.yaml").read_text())["overrides"]
    expected = overrides["images"]["evaluation"]["images"] * 20
    assert len(list((run / "images").glob("*.png"))) == expected
    for kind in ("images", "scores"):
        figure = finished.smoke / "figures" / f"{LEFT_TAIL}_{kind}.png"
        assert figure.read_bytes().startswith(b"\x89PNG")
    assert "Vendi score" in (finished.smoke / "tables" / f"{LEFT_TAIL}.md").read_text()


def small(
    project: Project, model: dict[str, Any], experiment: str, target: str, **images: Any
) -> tuple[str, ...]:
    """Arguments of Snakemake for a file of an experiment on a model at smoke size, in a folder of its own."""
    file = project.folder / "config" / "small.yaml"
    (project.folder / "config" / "models" / "small.yaml").write_text(yaml.safe_dump(model))
    overrides = {"files": {experiment: {"model": "small"}}, "images": images}
    overrides["files"].setdefault(LEFT_TAIL, {})["prompts"] = [
        "a bridge",
        "a red steel truss bridge at night",
    ]
    file.write_text(yaml.safe_dump({"results": "results/small", "overrides": overrides}))
    chosen = f"experiments=[{experiment}]"
    return (*SMOKE, "config/small.yaml", "--config", chosen, "--", f"results/small/{target}")


def test_a_folder_like_stable_diffusion_goes_through_every_rule(project: Project) -> None:
    """All classes are those of Stable Diffusion 1.4; only sizes and weights are not."""
    pipeline, _ = write_models(project.folder / "models")
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    hub = {"revision": "0" * 40, "repository": "nobody/nothing", "files": ["unet/*.safetensors", "vae/*"]}
    model = {
        "pipeline": {"path": "models/pipeline", "hub": hub},
        "alignment": {"path": "models/alignment"},
    }
    run = project.snakemake(
        *small(
            project,
            model,
            LEFT_TAIL,
            f"tables/{LEFT_TAIL}.md",
            schedule={"spacing": "leading"},
            adapter={"rank": 2, "alpha": 2.0},
        )
    )
    assert run.returncode == 0, run.stdout
    for rule in ("images_fetch", "images_model", "images_offline", "images_threshold", "images_finetune"):
        assert f"Rule: {rule})" in run.stdout
    results = project.folder / "results" / "small"
    fetched = json.loads((results / "runs" / LEFT_TAIL / "pretrained" / "fetched.json").read_text())
    assert "nobody/nothing" in json.dumps(fetched)
    assert (results / "tables" / f"{LEFT_TAIL}.md").is_file()


def test_what_is_not_there_is_named_with_where_to_place_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = {"revision": "0" * 40, "repository": "nobody/nothing", "files": ["unet/*.safetensors"]}
    model = {"pipeline": {"path": "models/none", "hub": hub}, "alignment": {"path": "models/none"}}
    run = project.snakemake(*small(project, model, ENTROPY, METRICS))
    assert run.returncode != 0
    log = project.folder / "results" / "small" / "logs" / "images_fetch" / f"{ENTROPY}.log"
    said = log.read_text()
    assert "nobody/nothing" in said
    assert str(Path("models") / "none") in said
    assert "Traceback" not in said


def test_retrain_trains_both_models_and_uses_them(project: Project) -> None:
    model = {"pipeline": {"path": "none"}, "alignment": {"path": "none"}, "embedded": EMBEDDED}
    # What samples takes one of the models, and what judges them the other.
    run = project.snakemake(*small(project, model, ENTROPY, METRICS, retrain=True))
    assert run.returncode == 0, run.stdout
    trained = project.folder / "results" / "small" / "models" / "small"
    for part in ("pipeline", "alignment"):
        assert (trained / part / "weights" / "training.json").is_file()
    record = project.folder / "results" / "small" / "runs" / ENTROPY / "pretrained" / "model.json"
    assert json.loads(record.read_text())["pipeline"]["path"] == "results/small/models/small/pipeline/weights"
