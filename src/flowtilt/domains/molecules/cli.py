"""The stages of molecules on the command line, one subcommand each; see :mod:`flowtilt.pipeline.cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowtilt.domains.molecules.experiment import MoleculeExperiment

Handler = Callable[[argparse.Namespace], None]
Add = Callable[[str, Handler, str], argparse.ArgumentParser]

_OPTIONS: dict[str, dict[str, Any]] = {
    "--seed": {"type": int, "help": "seed of the run"},
    "--method": {"help": "name of one of the experiment's methods"},
    "--model": {"type": Path, "help": "weights to read (safetensors)"},
    "--pretrained": {"type": Path, "help": "weights of the pretrained model (safetensors)"},
    "--molecules": {"type": Path, "help": "QM9 as arrays (npz), of the stage molecules-data"},
    "--offline": {"type": Path, "help": "the offline batch (npz)"},
    "--samples": {"type": Path, "help": "the run's molecules (npz)"},
    "--output": {"type": Path, "help": "file to write"},
    "--record": {"type": Path, "help": "file for what made the weights, and how it went (json)"},
    "--sdf": {"type": Path, "help": "file for the molecules with their energies and structures (sdf)"},
    "--energies": {"type": Path, "help": "file for their energies (npz)"},
    "--history": {"type": Path, "help": "the fine-tuning's history (csv), a row an update"},
    "--threshold": {"type": Path, "help": "tfft's threshold file"},
    "--workers": {"type": int, "help": "processes for energies; one for each processor if not given"},
}


def add_stages(add: Add) -> None:
    """Add the subcommands.

    Args:
        add: gives the parser of a new subcommand from its name, handler and description.
    """

    def stage(name: str, handler: Handler, text: str, *required: str, optional: tuple[str, ...] = ()) -> None:
        parser = add(f"molecules-{name}", handler, text)
        if name != "data":
            parser.add_argument("config", type=Path, help="an experiment's file, resolved or as written")
        for option in (*required, *optional):
            parser.add_argument(option, required=option in required, **_OPTIONS[option])

    stage("data", _data, "Parse QM9 from the installed package qm9pack.", "--output")
    stage(
        *("pretrain", _pretrain, "Check the shipped checkpoint, or train anew."),
        *("--molecules", "--output", "--record"),
    )
    stage(
        *("offline", _offline, "Draw the offline batch, with energies."),
        *("--seed", "--model", "--output"),
        optional=("--workers",),
    )
    stage("threshold", _threshold, "Solve TFFT's dual.", "--method", "--offline", "--output")
    stage(
        *("finetune", _finetune, "Fine-tune by am, fdc or tfft."),
        *("--method", "--seed", "--pretrained", "--output", "--history"),
        optional=("--threshold", "--workers"),
    )
    stage(
        *("sample", _sample, "Draw a run's molecules."),
        *("--method", "--seed", "--output"),
        optional=("--model", "--molecules"),
    )
    stage(
        *("evaluate", _evaluate, "Energies, structures and metrics of a run."),
        *("--method", "--samples", "--molecules", "--output", "--sdf", "--energies"),
        optional=("--history", "--threshold", "--workers"),
    )


def _load(a: argparse.Namespace) -> MoleculeExperiment:
    from flowtilt.pipeline.experiment import load_resolved, molecule_experiment

    return molecule_experiment(load_resolved(a.config))


def _prepare_torch() -> None:
    from flowtilt.pipeline.cli import prepare_torch

    prepare_torch(gpu=True)


def _bar(total: int, label: str) -> Any:
    from flowtilt.pipeline.cli import Bar

    return Bar(total, label)


def _data(a: argparse.Namespace) -> None:
    from flowtilt.domains.molecules import evaluation as molecule_metrics

    molecule_metrics.prepare(a.output)


def _pretrain(a: argparse.Namespace) -> None:
    experiment = _load(a)
    progress = _bar(experiment.pretrain.updates, "pretrain") if experiment.checkpoint.retrain else None
    _prepare_torch()
    from flowtilt.domains.molecules import pretraining as molecule_pretraining

    molecule_pretraining.pretrain(experiment, a.molecules, a.output, a.record, progress)


def _offline(a: argparse.Namespace) -> None:
    _prepare_torch()
    from flowtilt.domains.molecules import finetuning as molecule_finetuning

    molecule_finetuning.offline(_load(a), a.seed, a.model, a.output, a.workers)


def _threshold(a: argparse.Namespace) -> None:
    from flowtilt.domains.molecules import evaluation as molecule_metrics

    molecule_metrics.threshold(_load(a), a.method, a.offline, a.output)


def _finetune(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.experiment import method_of

    experiment = _load(a)
    solves = method_of(experiment, a.method).iterations or 1
    progress = _bar(experiment.updates_of(a.method) * solves, f"{experiment.name} {a.method}")
    files = (a.pretrained, a.output, a.history, a.threshold)
    _prepare_torch()
    from flowtilt.domains.molecules import finetuning as molecule_finetuning

    molecule_finetuning.finetune(experiment, a.method, a.seed, *files, a.workers, progress)


def _sample(a: argparse.Namespace) -> None:
    _prepare_torch()
    from flowtilt.domains.molecules import sampling as molecule_sampling

    molecule_sampling.sample(_load(a), a.method, a.seed, a.output, a.model, a.molecules)


def _evaluate(a: argparse.Namespace) -> None:
    from flowtilt.domains.molecules import evaluation as molecule_metrics

    files = (a.samples, a.molecules, a.output, a.sdf, a.energies, a.history, a.threshold)
    molecule_metrics.evaluate(_load(a), a.method, *files, a.workers)
