"""Made-up runs on pictures in the layout of real ones, for tests of tables, costs and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from flowtilt.domains.images import bridges
from flowtilt.experiment import image_experiment, load_file
from flowtilt.figures_images import picture_name
from flowtilt.files import folder_of
from flowtilt.image_experiment import ImageExperiment, tail_metric
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.stages.files import Metrics, write_arrays, write_history, write_rows
from small import CONFIG

ENTROPY, LEFT_TAIL = (
    CONFIG / "experiments" / f"text_to_image_{name}.yaml" for name in ("entropy", "left_tail")
)
DESIGNS = list(bridges.DESIGNS)


def loaded(file: Path) -> ImageExperiment:
    """The shipped experiment."""
    (experiment,) = load_file(file).values()
    return image_experiment(experiment)


def write_metrics(results: Path, experiment: ImageExperiment, row: Callable[[str, int], Metrics]) -> None:
    """The metrics of all runs, by method and seed."""
    for method in experiment.methods:
        for seed in experiment.seeds:
            folder = folder_of(results, experiment.name, method, seed)
            write_rows({method: row(method, seed)}, folder / "metrics.json")


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


def write_pictures(results: Path, experiment: ImageExperiment, level: Callable[[str], float]) -> None:
    """Bridges with scores and metrics that belong to them.

    ``level`` of a method in [0, 1] is the share of pictures that are not as the pretrained model has them:
    designs are redrawn at random, and rewards rise.
    """
    for method in experiment.methods:
        for seed in experiment.seeds:
            _write_run(results, experiment, method, seed, level(method))


def _write_run(results: Path, experiment: ImageExperiment, method: str, seed: int, level: float) -> None:
    folder = folder_of(results, experiment.name, method, seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    prompts, designs, rewards = [], [], []
    for prompt in range(len(experiment.prompts)):
        for number in range(experiment.evaluation.pictures):
            rng = np.random.default_rng([seed, prompt, number])
            bridge, moved, other = bridges.draw_bridge(rng), rng.random() < level, rng.integers(len(DESIGNS))
            bridge = replace(bridge, design=DESIGNS[other]) if moved else bridge
            reward = 0.3 + 0.02 * level + (0.03 if moved else 0.06) * rng.normal()
            picture = Image.fromarray(bridges.picture(bridge, rng, 32))
            picture.save(folder / "pictures" / picture_name(prompt, number))
            prompts.append(prompt)
            designs.append(DESIGNS.index(bridge.design))
            rewards.append(reward)
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
