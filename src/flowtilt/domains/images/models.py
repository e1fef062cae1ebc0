"""Stages that give a text-to-image model, trained or checked; in the end one file says where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowtilt.checkpoints import CheckpointError
from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.fetching import check_source, contents_of
from flowtilt.domains.images.sections import EmbeddedConfig
from flowtilt.files import atomic_folder, read_json
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import write_json
from flowtilt.pipeline.places import located
from flowtilt.pipeline.report.provenance import commit, versions
from flowtilt.pipeline.states import resumption_of

if TYPE_CHECKING:
    from flowtilt.domains.images.pipeline import TextToImage

RECORD = "training.json"
"""File in the folder of a trained model: what made it, and how that went."""

LOSS_WINDOW = 100
"""Updates whose mean loss is a line of the record."""

HELD_OUT = 1000
"""Images on which trained models are checked."""

SEED = 0
"""Of the embedded models, from which all seeds of fine-tuning start."""


def train_pipeline(job: Job) -> None:
    """Train the experiment's embedded text-to-image model, and write its folder. The folder's parent keeps
    the state while the training runs."""
    from flowtilt.domains.images import pretraining

    experiment, folder = job.experiment, job.outputs["pipeline"]
    config = _embedded(experiment)
    fits = (config.autoencoder.fit, config.autoencoder.refine, config.denoiser.fit)
    updates = sum(fit.updates for fit in fits if fit is not None)
    progress = job.bar(updates, f"{experiment.model.name} pipeline")
    resumption = resumption_of(experiment, "pretrain-pipeline", SEED, folder, [])
    with atomic_folder(folder) as temporary:
        pipeline, histories = pretraining.train_pipeline(config, resumption, progress)
        checks = pretraining.check_autoencoder(pipeline.vae, config, HELD_OUT)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.half()
        pipeline.save_pretrained(temporary)
        write_json(_record(experiment, temporary, histories, checks), temporary / RECORD)
    resumption.remove()


def train_alignment(job: Job) -> None:
    """Train the experiment's embedded CLIP, and write its folder; see :func:`train_pipeline`."""
    from flowtilt.domains.images import build, pretraining

    experiment, folder = job.experiment, job.outputs["alignment"]
    config = _embedded(experiment)
    progress = job.bar(config.alignment.fit.updates, f"{experiment.model.name} alignment")
    resumption = resumption_of(experiment, "pretrain-alignment", SEED, folder, [])
    with atomic_folder(folder) as temporary:
        model, histories = pretraining.train_alignment(config, resumption, progress)
        checks = pretraining.check_alignment(model, config, HELD_OUT)
        build.save_clip(config, temporary, model.half())
        write_json(_record(experiment, temporary, histories, checks), temporary / RECORD)
    resumption.remove()


def _embedded(experiment: ImageExperiment) -> EmbeddedConfig:
    if experiment.model.embedded is None:
        raise ConfigError(
            f"experiment {experiment.name}: the model {experiment.model.name} has no section embedded, and "
            "is not trained here"
        )
    return experiment.model.embedded


def _record(
    experiment: ImageExperiment,
    folder: Path,
    histories: Mapping[str, list[dict[str, float]]],
    checks: Mapping[str, float],
) -> dict[str, Any]:
    """What made a model, and how it went."""
    return {
        "model": experiment.model.name,
        "sha256": contents_of(folder),
        "commit": commit(),
        "command": "flowtilt pretrain-pipeline and pretrain-alignment, with retrain: true",
        "seed": SEED,
        "configuration": _embedded(experiment).model_dump(mode="json"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "trainings": {name: _curve(history) for name, history in histories.items()},
        "checks": {"images": HELD_OUT, **{name: round(value, 4) for name, value in checks.items()}},
    }


def _curve(history: list[dict[str, float]]) -> dict[str, Any]:
    losses = np.array([row["loss"] for row in history])
    window = min(LOSS_WINDOW, len(losses))
    ends = range(window, len(losses) + 1, window)
    return {
        "wall_seconds": round(history[-1]["seconds"], 1),
        "loss": [{"updates": e, "mean": round(float(losses[e - window : e].mean()), 5)} for e in ends],
    }


def write_model(job: Job) -> None:
    """Check the experiment's model, and write down where its parts are and what they hold.

    Raises:
        CheckpointError: if a part is missing, another file, or of another kind.
        ConfigError: if its noise schedule has no memoryless form.
    """
    from flowtilt.domains.images.alignment import load_alignment

    experiment, model = job.experiment, job.experiment.model
    pipeline, alignment = job.read_if_any("pipeline"), job.read_if_any("alignment")
    if pipeline is None:
        check_source(model.pipeline, f"model {model.name}: key pipeline")
    if alignment is None:
        check_source(model.alignment, f"model {model.name}: key alignment")
    if experiment.reward.weights is not None:
        check_source(experiment.reward.weights, "key reward.weights")
    places = {
        "pipeline": pipeline or Path(model.pipeline.path),
        "alignment": alignment or Path(model.alignment.path),
    }
    # Loaded once before any training: what is wrong is said now.
    base = text_to_image_of(experiment, located(places["pipeline"]))
    try:
        base.flow.time_grid(experiment.solver.steps)
    except ValueError as error:
        raise ConfigError(
            f"experiment {experiment.name}: keys solver.steps and schedule.spacing: {error}"
        ) from None
    load_alignment(*alignment_of(experiment, located(places["alignment"])))
    found = {
        part: {"path": str(folder), "sha256": contents_of(located(folder))} for part, folder in places.items()
    }
    write_json({"model": model.name, **found}, job.outputs["model"])


def text_to_image_of(
    experiment: ImageExperiment, folder: Path, prompts: Sequence[str] | None = None
) -> TextToImage:
    """A folder of a pipeline as the experiment's flow, before any fine-tuning, on the prompts that runs are
    measured on, or on others.

    Raises:
        CheckpointError, ConfigError: see :func:`flowtilt.domains.images.pipeline.load_text_to_image`.
    """
    from flowtilt.domains.images.pipeline import load_text_to_image

    sections = (experiment.guidance, experiment.schedule, experiment.compute, experiment.adapter)
    return load_text_to_image(folder, prompts or experiment.prompts, *sections)


def read_model(file: Path) -> tuple[Path, Path]:
    """Where the pipeline and the alignment of a model are, from the file of :func:`write_model`. Raises
    CheckpointError if the file is missing or malformed."""
    try:
        data = read_json(file)
        return located(data["pipeline"]["path"]), located(data["alignment"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: not a file of the stage model ({type(error).__name__}); delete it and run again"
        ) from None


def alignment_of(experiment: ImageExperiment, alignment: Path) -> tuple[str, Path | None]:
    """The arguments of :func:`flowtilt.domains.images.alignment.load_alignment`."""
    architecture = experiment.model.architecture
    return (str(alignment), None) if architecture is None else (architecture, alignment)
