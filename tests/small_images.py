"""Experiments on images small enough to run whole in a unit test, and tiny untrained models for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.pipeline.configuration import merge
from flowtilt.pipeline.experiment import load_file
from small import CONFIG

EMBEDDED: dict[str, Any] = {
    "bridges": {"count": 24, "size": 16, "seed": 0},
    "autoencoder": {
        "channels": [16, 16],
        "latent_channels": 4,
        "kl_weight": 0.001,
        "fit": {"updates": 3, "batch": 4},
        "refine": {"updates": 2, "batch": 4},
    },
    "text": {"merges": 600, "length": 28, "width": 16, "layers": 1, "heads": 2},
    "denoiser": {"channels": [16, 16], "head_width": 8, "fit": {"updates": 3, "batch": 4, "average": 0.9}},
    "alignment": {
        "embedding": 8,
        "patch": 4,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "fit": {"updates": 3, "batch": 8},
    },
}
TINY: dict[str, Any] = {
    "seeds": 1,
    "offline": {"samples": 12},
    "solver": {"updates": 2, "batch": 3, "pool": 4, "steps": 4},
    "evaluation": {"images": 4, "sets": 1},
}
PROMPTS = (
    "a red steel suspension bridge over the sea at sunset",
    "a white concrete cable-stayed bridge over a river by day",
    "a yellow steel truss bridge over a valley by day",
    "a grey stone arch bridge over a river at night",
    "a blue concrete beam bridge in a city at sunset",
    "a blue steel suspension bridge in a city at night",
    "a red steel cable-stayed bridge over a valley at sunset",
    "a grey wood truss bridge over a river at sunset",
    "a white stone arch bridge over a valley by day",
    "a yellow wood beam bridge over the sea at night",
    "a white steel suspension bridge over a valley by day",
    "a yellow concrete cable-stayed bridge in a city at night",
    "a red wood truss bridge over the sea at night",
    "a blue steel arch bridge over the sea by day",
    "a grey stone beam bridge over a valley at night",
    "a yellow concrete suspension bridge over a river at night",
    "a blue steel cable-stayed bridge over the sea at sunset",
    "a white steel truss bridge in a city by day",
    "a red concrete arch bridge in a city at sunset",
    "a grey steel beam bridge over a river by day",
)
"""Of the drawn bridges, each factor in turn."""


def tiny(name: str, **changes: Any) -> ImageExperiment:
    """A shipped experiment at a size of seconds, on a model that is still to be trained."""
    model = {"name": "tiny", "pipeline": {"path": ""}, "alignment": {"path": ""}, "embedded": EMBEDDED}
    of_images = merge(TINY, {"retrain": True, "model": model})
    if name == "text_to_image_left_tail":
        of_images |= {"prompts": ["a red steel truss bridge at night", "a bridge", "a stone arch bridge"]}
    changed = {"images": merge(of_images, changes)}
    (experiment,) = load_file(CONFIG / "experiments" / f"{name}.yaml", changed).values()
    assert isinstance(experiment, ImageExperiment)
    return experiment


def write_models(folder: Path) -> tuple[Path, Path]:
    """Folders of the tiny pipeline and of the tiny CLIP, untrained."""
    from flowtilt.domains.images import build
    from flowtilt.domains.images.sections import EmbeddedConfig

    config = EmbeddedConfig(**EMBEDDED)
    build.build_pipeline(config).save_pretrained(folder / "pipeline")
    build.save_clip(config, folder / "alignment", None)
    return folder / "pipeline", folder / "alignment"
