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
