"""The stages of pictures on the command line, one subcommand each; see :mod:`flowtilt.pipeline.cli`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowtilt.domains.molecules.cli import Add, Handler

if TYPE_CHECKING:
    from flowtilt.domains.images.experiment import ImageExperiment

_OPTIONS: dict[str, dict[str, Any]] = {
    "--seed": {"type": int, "help": "seed of the run"},
    "--method": {"help": "name of one of the experiment's methods"},
    "--part": {"choices": ("pipeline", "alignment"), "help": "which of the two models"},
    "--model": {"type": Path, "help": "file of the stage images-model (json)"},
    "--pipeline": {"type": Path, "help": "folder of the pipeline that was trained"},
    "--alignment": {"type": Path, "help": "folder of the CLIP that was trained"},
    "--weights": {"type": Path, "help": "what was fine-tuned (safetensors)"},
    "--offline": {"type": Path, "help": "the offline batch (npz)"},
    "--pictures": {"type": Path, "help": "folder of the run's pictures"},
    "--output": {"type": Path, "help": "file or folder to write"},
    "--scores": {"type": Path, "help": "file for every picture's scores (npz)"},
    "--history": {"type": Path, "help": "the fine-tuning's history (csv), a row an update"},
    "--threshold": {"type": Path, "help": "tfft's threshold file"},
    "--gpu": {
        "type": int,
        "default": 0,
        "help": "GPUs that the job was given; more than torch sees are an error",
    },
}


def add_stages(add: Add) -> None:
    """Add the subcommands.

    Args:
        add: gives the parser of a new subcommand from its name, handler and description.
    """

    def stage(name: str, handler: Handler, text: str, *required: str, optional: tuple[str, ...] = ()) -> None:
        parser = add(name, handler, text)
        parser.add_argument("config", type=Path, help="an experiment's file, resolved or as written")
        for option in (*required, *optional):
            parser.add_argument(option, required=option in required, **_OPTIONS[option])

    stage("fetch-checkpoint", _fetch, "Fetch a model that is not there, and check it.", "--output")
    stage(
        *("images-pretrain", _pretrain, "Train an embedded model.", "--part", "--output"),
        optional=("--gpu",),
    )
    stage(
        *("images-model", _model, "Check the model, and write down where it is.", "--output"),
        optional=("--pipeline", "--alignment"),
    )
    stage(
        *("images-offline", _offline, "Draw the offline batch, with rewards."),
        *("--seed", "--model", "--output"),
        optional=("--gpu",),
    )
    stage("images-threshold", _threshold, "Solve TFFT's dual.", "--method", "--offline", "--output")
    stage(
        *("images-finetune", _finetune, "Fine-tune by am, fdc or tfft."),
        *("--method", "--seed", "--model", "--output", "--history"),
        optional=("--threshold", "--gpu"),
    )
    stage(
        *("images-sample", _sample, "Draw a run's pictures."),
        *("--method", "--seed", "--model", "--output"),
        optional=("--weights", "--gpu"),
    )
    stage(
        *("images-evaluate", _evaluate, "Scores and metrics of a run."),
        *("--method", "--model", "--pictures", "--output", "--scores"),
        optional=("--history", "--threshold", "--gpu"),
    )


def _load(a: argparse.Namespace) -> ImageExperiment:
    from flowtilt.pipeline.experiment import image_experiment, load_resolved

    return image_experiment(load_resolved(a.config))


def _prepare_torch(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.cli import prepare_torch

    prepare_torch(gpu=True)
    from flowtilt.devices import check_gpus

    check_gpus(a.gpu)


def _bar(total: int, label: str) -> Any:
    from flowtilt.pipeline.cli import Bar

    return Bar(total, label)


def _fetch(a: argparse.Namespace) -> None:
    from flowtilt.domains.images import fetching

    fetching.fetch(_load(a), a.output)


def _pretrain(a: argparse.Namespace) -> None:
    experiment = _load(a)
    _prepare_torch(a)
    from flowtilt.domains.images import models as image_models

    train = image_models.train_pipeline if a.part == "pipeline" else image_models.train_alignment
    updates = image_models.updates_of(experiment, a.part)
    train(experiment, a.output, _bar(updates, f"{experiment.model.name} {a.part}"))


def _model(a: argparse.Namespace) -> None:
    from flowtilt.domains.images import models as image_models

    image_models.write_model(_load(a), a.output, a.pipeline, a.alignment)


def _offline(a: argparse.Namespace) -> None:
    _prepare_torch(a)
    from flowtilt.domains.images import finetuning as image_finetuning

    image_finetuning.offline(_load(a), a.seed, a.model, a.output)


def _threshold(a: argparse.Namespace) -> None:
    from flowtilt.domains.images import evaluation as image_metrics

    image_metrics.threshold(_load(a), a.method, a.offline, a.output)


def _finetune(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.experiment import method_of

    experiment = _load(a)
    solves = method_of(experiment, a.method).iterations or 1
    progress = _bar(experiment.updates_of(a.method) * solves, f"{experiment.name} {a.method}")
    _prepare_torch(a)
    from flowtilt.domains.images import finetuning as image_finetuning

    files = (a.model, a.output, a.history, a.threshold)
    image_finetuning.finetune(experiment, a.method, a.seed, *files, progress)


def _sample(a: argparse.Namespace) -> None:
    _prepare_torch(a)
    from flowtilt.domains.images import sampling as image_sampling

    image_sampling.sample(_load(a), a.method, a.seed, a.model, a.output, a.weights)


def _evaluate(a: argparse.Namespace) -> None:
    _prepare_torch(a)
    from flowtilt.domains.images import evaluation as image_metrics

    files = (a.model, a.pictures, a.output, a.scores, a.history, a.threshold)
    image_metrics.evaluate(_load(a), a.method, *files)
