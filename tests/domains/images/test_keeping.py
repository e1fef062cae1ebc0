"""Methods that train nothing on images: as many of each prompt, and scores of the images that are stored."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from by_hand import Driven
from flowtilt.tilts import Groups, tilted
from small_images import tiny, write_models

pytest.importorskip("diffusers", reason="the extra 'images' is not installed")
pytest.importorskip("open_clip", reason="the extra 'images' is not installed")

KEPT = ("best_of_4", "resampled", "resampled_tfft", "steered")
BANK, EACH, PROMPTS, STEPS = 20, 4, 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Driven:
    """The shipped rows at tiny size, with prompts of unequal numbers in the offline batch."""
    models = write_models(tmp_path_factory.mktemp("models"))
    model = {part: {"path": str(p)} for part, p in zip(("pipeline", "alignment"), models, strict=True)}
    changes: dict[str, Any] = {
        "offline": {"samples": BANK},
        "objective": {"alpha": 0.01},
        "methods": {"steered": {"every": 2}},
    }
    experiment = tiny("text_to_image_left_tail", retrain=False, model=model, **changes)
    made = Driven(tmp_path_factory.mktemp("images"), experiment)
    assert made.run("model") == made.run("offline") == made.run("threshold", "tfft") == 0
    assert made.run("sample", "pretrained") == made.run("evaluate", "pretrained") == 0
    for method in KEPT:
        assert made.run("keep", method) == made.run("evaluate", method) == 0
    return made


def row(folder: Driven, method: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(folder.file(method, "metrics.json").read_text())["rows"][method]
    return found


def scores(folder: Driven, method: str) -> dict[str, np.ndarray]:
    with np.load(folder.file(method, "scores.npz")) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("method", KEPT)
def test_every_prompt_has_as_many_images(folder: Driven, method: str) -> None:
    found = scores(folder, method)
    assert np.bincount(found["prompt"]).tolist() == [EACH] * PROMPTS
    files = sorted(file.name for file in folder.file(method, "kept_images").iterdir())
    assert files == [f"prompt{p:03d}_{n:04d}.png" for p in range(PROMPTS) for n in range(EACH)]


def test_the_best_have_more_of_the_reward(folder: Driven) -> None:
    assert row(folder, "best_of_4")["mean_reward"] > row(folder, "pretrained")["mean_reward"]


def test_resampled_images_are_those_of_the_batch_by_its_weights(folder: Driven) -> None:
    """Each as often as its weight within its prompt, whatever number of each prompt the batch has."""
    with np.load(folder.shared("seed0/offline.npz")) as arrays:
        rewards, prompts = arrays["reward"].astype(float), arrays["context"]
    assert len(set(np.bincount(prompts))) > 1
    groups = Groups(prompts, np.full(PROMPTS, 1 / PROMPTS))
    under = tilted(rewards / 0.01, groups)
    found, kept = scores(folder, "resampled"), row(folder, "resampled")
    assert kept["kl"] == pytest.approx(under.kl, rel=1e-6)
    assert kept["effective_sample_size"] == pytest.approx(BANK * under.effective_share, rel=1e-6)
    # Scores are of images in bytes: the reward of each is near that of a latent of the batch.
    for prompt in range(PROMPTS):
        own = rewards[prompts == prompt]
        nearest = np.abs(found["reward"][found["prompt"] == prompt][:, None] - own)
        copies = np.bincount(nearest.argmin(1), minlength=len(own))
        assert (np.abs(copies - EACH * PROMPTS * under.probabilities[prompts == prompt]) < 1).all()
        assert nearest.min(1).max() < 0.005


def test_costs_of_an_image(folder: Driven) -> None:
    """Twice the passes under guidance."""
    plain, images = 2 * STEPS, EACH * PROMPTS
    wanted = {
        "best_of_4": (4 * plain, 4),
        "resampled": (plain * BANK / images, BANK / images),
        "steered": (4 * plain, 4 * 2),
    }
    for method, costs in wanted.items():
        found = row(folder, method)
        assert (found["sample_passes"], found["sample_rewards"]) == pytest.approx(costs)
        assert found["plain_passes"] == plain
