"""Made-up runs on images in the layout of real ones, for tests of tables, costs and figures."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from flowtilt.domains.images import bridges
from flowtilt.domains.images.experiment import ImageExperiment, image_name, tail_metric
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.pipeline.configuration import merge, read_yaml
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.files import Metrics, write_arrays, write_frontier, write_history, write_rows
from flowtilt.pipeline.report.frontier import with_frontier
from small import CONFIG

ENTROPY, LEFT_TAIL = "text_to_image_entropy", "text_to_image_left_tail"
DESIGNS = list(bridges.DESIGNS)
_FDC: dict[str, Any] = {"kind": "fdc", "iterations": 2, "step": 1.0, "updates": 15}
_BASES = {"pretrained": {"kind": "pretrained"}, "am": {"kind": "am"}}
# What numbers in tests rest on, whatever the shipped files have.
_KEYS: dict[str, dict[str, Any]] = {
    ENTROPY: {
        "seeds": 3,
        "objective": {"utility": "entropy", "alpha": 8.0, "noise": 0.2, "reward_alpha": 0.02},
        "methods": {
            **_BASES,
            "fdc_alpha_32": _FDC | {"alpha": 32.0},
            "fdc_alpha_16": _FDC | {"alpha": 16.0},
            "fdc": _FDC,
        },
        "evaluation": {"images": 100, "designs": DESIGNS, "template": "a {} bridge"},
    },
    LEFT_TAIL: {
        "seeds": 3,
        "objective": {"utility": "left_tail", "mass": 0.2, "alpha": 0.02},
        "methods": {
            **_BASES,
            "tfft": {"kind": "tfft"},
            "tfft_0.1": {"kind": "tfft", "mass": 0.1},
            "tfft_0.5": {"kind": "tfft", "mass": 0.5},
        },
        "evaluation": {"images": 20, "designs": DESIGNS, "template": "a {} bridge"},
    },
}


def folder_of(results: Path, experiment: str, method: str, seed: int) -> Path:
    """Where the files of a run are kept."""
    return Path(results) / "runs" / experiment / method / f"seed{seed}"


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """A file like that of a shipped experiment, with its model's beside it and with some keys changed."""
    file = folder / "experiments" / f"{name}.yaml"
    data = merge({**read_yaml(CONFIG / "experiments" / file.name), **_KEYS[name]}, changes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    shutil.copytree(CONFIG / "models", folder / "models", dirs_exist_ok=True)
    return file


def loaded(name: str, **changes: Any) -> ImageExperiment:
    """The experiment of :func:`write_config`."""
    with tempfile.TemporaryDirectory() as folder:
        (experiment,) = load_file(write_config(Path(folder), name, **changes)).values()
    assert isinstance(experiment, ImageExperiment)
    return experiment


def write_metrics(
    results: Path, experiment: ImageExperiment, values: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """The metrics of all runs: values by metric and method, one a seed."""
    for method in experiment.methods:
        for number, seed in enumerate(experiment.seeds):
            folder = folder_of(results, experiment.name, method, seed)
            row: Metrics = {metric: of[method][number] for metric, of in values.items() if method in of}
            write_rows({method: row}, folder / "metrics.json")


def write_histories(results: Path, experiment: ImageExperiment, passes: Mapping[str, int]) -> None:
    """Histories of two updates a solve, in each of which a solve makes as many passes again."""
    for method, count in passes.items():
        for seed in experiment.seeds:
            rows = [
                {"iteration": k, "update": i, "network_passes": count * (i + 1), "seconds": 2.0 * i + 1}
                for k in range(experiment.methods[method].iterations or 1)
                for i in (0, 1)
            ]
            history = folder_of(results, experiment.name, method, seed) / "history.csv"
            write_history(rows, history)


def write_images(
    results: Path, experiment: ImageExperiment, level: Callable[[str], float], size: int = 32
) -> None:
    """Bridges with scores and metrics that belong to them.

    ``level`` of a method in [0, 1] is the share of images that are not as the pretrained model has them:
    designs are redrawn at random, and rewards rise.
    """
    for method in experiment.methods:
        for seed in experiment.seeds:
            _write_run(results, experiment, method, seed, level(method), size)


def _write_run(
    results: Path, experiment: ImageExperiment, method: str, seed: int, level: float, size: int
) -> None:
    folder = folder_of(results, experiment.name, method, seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if method in with_frontier(experiment):
        points = [
            {"stage": float(k), "kl": 0.4 * k, "mean_reward": 0.3 + 0.01 * k + 0.001 * seed}
            | {tail_metric(mass): 0.2 + 0.02 * k for mass in (0.2, 0.1)}
            for k in range(3)
        ]
        write_frontier(points, folder / "frontier.csv")
    prompts, designs, rewards = [], [], []
    for prompt in range(len(experiment.prompts)):
        for number in range(experiment.evaluation.images):
            rng = np.random.default_rng([seed, prompt, number])
            bridge, moved, other = bridges.draw_bridge(rng), rng.random() < level, rng.integers(len(DESIGNS))
            bridge = replace(bridge, design=DESIGNS[other]) if moved else bridge
            image = Image.fromarray(bridges.image(bridge, rng, size))
            image.save(folder / "images" / image_name(prompt, number))
            prompts.append(prompt)
            designs.append(DESIGNS.index(bridge.design))
            rewards.append(0.3 + 0.02 * level + (0.03 if moved else 0.06) * rng.normal())
    reward, design = np.array(rewards), np.array(designs)
    write_arrays(
        folder / "scores.npz",
        prompt=np.array(prompts),
        reward=reward,
        clip=reward.astype(np.float32),
        design=design,
    )
    shares = np.bincount(design, minlength=len(DESIGNS)) / len(design)
    held = shares[shares > 0]
    row: Metrics = {
        "mean_reward": float(reward.mean()),
        **{tail_metric(mass): lower_tail_mean(reward, mass) for mass in (0.1, 0.2, 0.5)},
        "clip": float(reward.mean()),
        "vendi": 1 + 2 * level + 0.1 * seed,
        "designs_covered": int((shares > 0).sum()),
        "effective_designs": float(np.exp(-held @ np.log(held))),
        **{f"share_{name}": float(share) for name, share in zip(DESIGNS, shares, strict=True)},
    }
    write_rows({method: row}, folder / "metrics.json")
