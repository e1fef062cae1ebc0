"""The metrics of a run on images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowtilt.domains.images.experiment import ImageExperiment, tail_metric
from flowtilt.metrics.diversity import combinations_covered, designs_covered, effective_classes, vendi
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import Metrics, StageError, write_arrays, write_rows
from flowtilt.pipeline.health import tilt_metrics, tuned_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from flowtilt.rewards import Reward

MASSES = (0.1, 0.2, 0.5)
"""Of the left tails that every run reports, beside those of its experiment."""


def evaluate(job: Job) -> None:
    """Metrics of a run from its images as they are stored, and their scores.

    The scores are ``prompt`` (n,), ``reward`` (n,), ``clip`` (n,), ``design`` (n,), -1 where no designs are
    told apart, and ``factors`` (n, factors), the classes by each other factor.
    """
    import torch

    from flowtilt.domains.images.alignment import classify_features
    from flowtilt.domains.images.sampling import as_images, load_scorer, read_images

    experiment, model, images = job.experiment, job.read("pretrained"), job.read("images")
    found, prompt = read_images(images)
    asked = experiment.evaluation
    expected = asked.drawn * len(experiment.prompts)
    if len(found) != expected:
        raise StageError(f"{images}: {len(found)} images, not {expected}; delete it and run again")
    scorer, drawn = load_scorer(experiment, model), as_images(found)
    with torch.no_grad():
        features = scorer.image_features(drawn)
    clip = scorer.scores_of(features, [experiment.prompts[i] for i in prompt])
    rewards = _rewards(experiment, model, drawn, prompt, clip)
    designs = np.full(len(found), -1)
    if asked.designs:
        designs = classify_features(features, scorer, asked.designs, asked.template).numpy(force=True)
    factors = np.empty((len(found), len(asked.factors)), dtype=np.int64)
    for k, factor in enumerate(asked.factors):
        factors[:, k] = classify_features(features, scorer, factor.classes, factor.template).numpy(force=True)
    sets = set_of(prompt, asked.images)
    own = {experiment.mass} if experiment.mass < 1 else set()
    masses = sorted({*MASSES} | experiment.tail_masses | own)
    row: Metrics = {
        "mean_reward": float(rewards.mean()),
        **{tail_metric(mass): lower_tail_mean(rewards, mass) for mass in masses},
        "clip": float(clip.double().mean()),
        **_diversity(features.numpy(force=True).astype(np.float64), prompt, sets),
        **_designs(designs, factors, sets, asked.designs),
    }
    row |= tuned_metrics(job)
    row |= tilt_metrics(job, rewards, job.read_if_any("reference"), "prompt")
    write_rows({job.method: row}, job.outputs["metrics"])
    write_arrays(
        job.outputs["scores"],
        prompt=prompt,
        reward=rewards,
        clip=clip.numpy(force=True),
        design=designs,
        factors=factors,
    )


def _rewards(
    experiment: ImageExperiment, model: Path, images: Tensor, prompt: np.ndarray, clip: Tensor
) -> np.ndarray:
    """Rewards of stored images, float64 (n,); those of CLIP are its scores."""
    import torch

    from flowtilt.domains.images.model import Prompted
    from flowtilt.domains.images.sampling import CHUNK, load_reward

    if experiment.reward.kind == "clip":
        return clip.double().numpy(force=True)
    reward: Reward = load_reward(experiment, model, lambda stored: stored)
    nothing = torch.zeros(len(experiment.prompts), 1, 1)
    positions = torch.as_tensor(prompt)
    parts = torch.arange(len(images)).split(CHUNK)
    values = [reward(images[part], Prompted(positions[part], nothing, nothing[0])) for part in parts]
    return torch.cat(values).double().numpy(force=True)


def set_of(prompt: np.ndarray, images: int) -> np.ndarray:
    """The set that each image is of, (n,): the first ``images`` of every prompt, the next, and so on.

    Args:
        prompt: positions of the images' prompts, in any order, (n,).
    """
    number = np.empty(len(prompt), dtype=np.int64)
    for one in np.unique(prompt):
        own = prompt == one
        number[own] = np.arange(own.sum())
    return number // images


def _diversity(features: np.ndarray, prompt: np.ndarray, sets: np.ndarray) -> Metrics:
    """Vendi scores, the means over sets: of all images of a set, and the mean of those of each prompt's."""
    alone = [sets == s for s in np.unique(sets)]
    each = [vendi(features[one & (prompt == p)]) for one in alone for p in np.unique(prompt)]
    return {
        "vendi": float(np.mean([vendi(features[one]) for one in alone])),
        "vendi_of_a_prompt": float(np.mean(each)),
    }


def _designs(designs: np.ndarray, factors: np.ndarray, sets: np.ndarray, names: list[str]) -> Metrics:
    """How many designs and combinations of factors a set has, the mean over sets, and the designs' shares."""
    if not names:
        return {}
    alone = [sets == s for s in np.unique(sets)]
    found: Metrics = {
        "designs_covered": float(np.mean([designs_covered(designs[one], len(names)) for one in alone])),
        "effective_designs": float(np.mean([effective_classes(designs[one], len(names)) for one in alone])),
    }
    if factors.shape[1]:
        both = np.column_stack([designs, factors])
        found["combinations_covered"] = float(np.mean([combinations_covered(both[one]) for one in alone]))
    return found | {f"share_{name}": float((designs == k).mean()) for k, name in enumerate(names)}
