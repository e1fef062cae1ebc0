"""The base model on pictures, and the stage that draws the pictures of a run.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtilt.checkpoints import load_weights
from flowtilt.devices import generator_of
from flowtilt.domains.images.alignment import AlignmentModel, load_alignment
from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.files import picture_name
from flowtilt.domains.images.models import alignment_of, read_model
from flowtilt.files import atomic_folder
from flowtilt.pipeline.files import StageError
from flowtilt.rewards import Reward
from flowtilt.sampling import sample_sde

if TYPE_CHECKING:  # what loads models takes seconds to import, and a job needs one of the two or both
    from flowtilt.domains.images.pipeline import TextToImage
    from flowtilt.domains.images.rewards import Decode

CHUNK = 50
"""Pictures that are drawn together."""


def load_base(experiment: ImageExperiment, model: Path, weights: Path | None = None) -> TextToImage:
    """The experiment's model, or a fine-tuned one.

    Args:
        experiment: whose model.
        model: file of the stage model.
        weights: of a fine-tuning; without them, the pretrained model.

    Raises:
        CheckpointError: if something is not there, or of another network.
    """
    from flowtilt.domains.images.pipeline import load_text_to_image

    found = load_text_to_image(
        read_model(model).pipeline,
        experiment.prompts,
        experiment.guidance,
        experiment.schedule,
        experiment.compute,
        experiment.adapter,
    )
    if weights is not None:
        load_weights(found.flow, weights)
    return found


def load_scorer(experiment: ImageExperiment, model: Path) -> AlignmentModel:
    """The model that scores pictures."""
    return load_alignment(*alignment_of(experiment, read_model(model)))


def load_reward(experiment: ImageExperiment, model: Path, decode: Decode) -> Reward:
    """The reward that am and tfft raise, of latents."""
    from flowtilt.domains.images.rewards import ClipReward, ImageReward

    weights = experiment.reward.weights
    if weights is not None:
        return ImageReward(decode, experiment.prompts, Path(weights.path))
    return ClipReward(decode, load_scorer(experiment, model), experiment.prompts)


# ------------------------------------------------------------------------------------ pictures


def sample(
    experiment: ImageExperiment,
    method: str,
    seed: int,
    model: Path,
    output: Path,
    weights: Path | None = None,
) -> None:
    """Draw the pictures of a run by the memoryless process, as PNG files.

    Models of one seed start from the same noise, and have the same noise on the way, so that differences
    between methods are not those of their draws.

    Args:
        experiment: of the run.
        method: of the run.
        seed: of the run.
        model: file of the stage model.
        output: folder to write, of a picture for every prompt and number, see
            :func:`flowtilt.domains.images.files.picture_name`.
        weights: of the fine-tuning; without them, the pretrained model's pictures.

    Raises:
        StageError: if a picture is not finite.
    """
    base = load_base(experiment, model, weights)
    generator = generator_of(experiment.name, "sample", seed)
    each = experiment.evaluation.drawn
    prompt = torch.arange(len(base.prompts)).repeat(each)
    with atomic_folder(output) as folder:
        for index in torch.arange(len(prompt)).split(CHUNK):
            context = base.flow.context_of(prompt[index])
            latents = sample_sde(base.flow, len(index), experiment.solver.steps, generator, context)[-1]
            pictures = decoded(base.decode, latents)
            if not bool(pictures.isfinite().all()):
                bad = int((~pictures.isfinite()).flatten(1).any(1).sum())
                raise StageError(
                    f"method {method!r}, seed {seed}: {bad} of {len(pictures)} pictures are not finite; "
                    "lower solver.learning_rate, or leave compute.precision at float32"
                )
            for i, picture in zip(index.tolist(), as_bytes(pictures), strict=True):
                number, position = divmod(i, len(base.prompts))
                Image.fromarray(picture).save(folder / picture_name(position, number))


_NAME = re.compile(r"prompt(\d{3,})_(\d{4,})\.png")


@torch.no_grad()
def decoded(decode: Decode, latents: Tensor) -> Tensor:
    """Pictures of latents, a few at a time."""
    return torch.cat([decode(part) for part in latents.split(CHUNK)])


def as_bytes(pictures: Tensor) -> np.ndarray:
    """Pictures in [-1, 1], (n, 3, height, width), as uint8 (n, height, width, 3)."""
    scaled = (pictures.clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).numpy(force=True)


def read_pictures(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of a run, uint8 (n, height, width, 3), and the positions of their prompts, (n,), in order.

    Raises:
        StageError: if there is none, or one cannot be read.
    """
    places = {
        (int(match[1]), int(match[2])): file
        for file in folder.glob("*.png")
        if (match := _NAME.fullmatch(file.name))
    }
    if not places:
        raise StageError(f"{folder}: no pictures; make them by the stage sample")
    order = sorted(places)  # by number: as text the thousandth prompt comes before the 101st
    pictures = [_read(places[place]) for place in order]
    if len({picture.shape for picture in pictures}) > 1:
        raise StageError(f"{folder}: pictures of several sizes; delete the folder and run again")
    return np.stack(pictures), np.array([prompt for prompt, _ in order])


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow raises SyntaxError too, and what zlib and struct raise
        raise StageError(f"{file}: cannot be read ({error}); delete the folder and run again") from None


def as_pictures(pictures: np.ndarray) -> Tensor:
    """Pictures uint8 (n, height, width, 3) in [-1, 1], (n, 3, height, width)."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
