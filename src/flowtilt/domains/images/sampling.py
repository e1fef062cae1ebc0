"""The base model on images, and the stage that draws the images of a run.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtilt.checkpoints import load_weights
from flowtilt.devices import generator_of
from flowtilt.domains.images.alignment import AlignmentModel, load_alignment
from flowtilt.domains.images.experiment import ImageExperiment, image_name
from flowtilt.domains.images.models import alignment_of, read_model, text_to_image_of
from flowtilt.files import atomic_folder
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import StageError
from flowtilt.pipeline.places import located
from flowtilt.rewards import Reward
from flowtilt.sampling import sample_sde

if TYPE_CHECKING:  # what loads models takes seconds to import, and a job needs one of the two or both
    from flowtilt.domains.images.pipeline import TextToImage
    from flowtilt.domains.images.rewards import Decode

CHUNK = 50
"""Images that are drawn together."""


def load_base(
    experiment: ImageExperiment,
    model: Path,
    weights: Path | None = None,
    prompts: Sequence[str] | None = None,
) -> TextToImage:
    """The experiment's model, or a fine-tuned one, see :func:`text_to_image_of`. Raises CheckpointError if
    something is not there, or of another network."""
    found = text_to_image_of(experiment, read_model(model)[0], prompts)
    if weights is not None:
        load_weights(found.flow, weights)
    return found


def load_scorer(experiment: ImageExperiment, model: Path) -> AlignmentModel:
    """The model that scores images."""
    return load_alignment(*alignment_of(experiment, read_model(model)[1]))


def load_reward(experiment: ImageExperiment, model: Path, decode: Decode) -> Reward:
    """The reward that am and tfft raise, of latents with the prompts of fine-tunings."""
    from flowtilt.domains.images.rewards import ClipReward, ImageReward

    weights = experiment.reward.weights
    if weights is not None:
        return ImageReward(decode, experiment.trained_prompts, located(weights.path))
    return ClipReward(decode, load_scorer(experiment, model), experiment.trained_prompts)


def sample(job: Job) -> None:
    """Draw the images of a run by the memoryless process, as PNG files; see :func:`image_name`.

    Models of one seed start from the same noise, and have the same noise on the way, so that differences
    between methods are not those of their draws.

    Raises:
        StageError: if an image is not finite.
    """
    experiment = job.experiment
    base = load_base(experiment, job.read("pretrained"), job.read_if_any("model"))
    generator = generator_of(experiment.name, "sample", job.seed)
    each = experiment.evaluation.drawn
    prompt = torch.arange(len(base.prompts)).repeat(each)

    def drawn(index: Tensor) -> Tensor:
        context = base.flow.context_of(prompt[index])
        return sample_sde(base.flow, len(index), experiment.solver.steps, generator, context)[-1]

    write_images(job, base, prompt, drawn, job.outputs["images"])


def write_images(
    job: Job, base: TextToImage, prompt: Tensor, latents: Callable[[Tensor], Tensor], output: Path
) -> None:
    """Write images as PNG files, those of a prompt by their order; see :func:`image_name`.

    Args:
        prompt: positions of the images' prompts, (n,).
        latents: from some images' positions to their latents.

    Raises:
        StageError: if an image is not finite.
    """
    written = [0] * len(base.prompts)
    with atomic_folder(output) as folder:
        for index in torch.arange(len(prompt)).split(CHUNK):
            images = decoded(base.decode, latents(index))
            if not bool(images.isfinite().all()):
                bad = int((~images.isfinite()).flatten(1).any(1).sum())
                raise StageError(
                    f"method {job.method!r}, seed {job.seed}: {bad} of {len(images)} images are not "
                    "finite; lower solver.learning_rate, or leave compute.precision at float32"
                )
            for position, image in zip(prompt[index].tolist(), as_bytes(images), strict=True):
                Image.fromarray(image).save(folder / image_name(position, written[position]))
                written[position] += 1


_NAME = re.compile(r"prompt(\d{3,})_(\d{4,})\.png")


@torch.no_grad()
def decoded(decode: Decode, latents: Tensor) -> Tensor:
    """Images of latents, a few at a time."""
    return torch.cat([decode(part) for part in latents.split(CHUNK)])


def as_bytes(images: Tensor) -> np.ndarray:
    """Images in [-1, 1], (n, 3, height, width), as uint8 (n, height, width, 3)."""
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).numpy(force=True)


def read_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of a run, uint8 (n, height, width, 3), and the positions of their prompts, (n,), in order.
    Raises StageError if there is none, or one cannot be read."""
    places = {
        (int(match[1]), int(match[2])): file
        for file in folder.glob("*.png")
        if (match := _NAME.fullmatch(file.name))
    }
    if not places:
        raise StageError(f"{folder}: no images; make them by the stage sample")
    order = sorted(places)  # by number: as text the thousandth prompt comes before the 101st
    images = [_read(places[place]) for place in order]
    if len({image.shape for image in images}) > 1:
        raise StageError(f"{folder}: images of several sizes; delete the folder and run again")
    return np.stack(images), np.array([prompt for prompt, _ in order])


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises SyntaxError too, and what zlib and struct raise
        raise StageError(f"{file}: cannot be read ({error}); delete the folder and run again") from None


def as_images(images: np.ndarray) -> Tensor:
    """Images uint8 (n, height, width, 3) in [-1, 1], (n, 3, height, width)."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
