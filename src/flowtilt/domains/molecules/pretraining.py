"""The stage that gives the pretrained flow on molecules: shipped weights, checked, or weights trained anew.

Beside the weights stands their record: what made them, and how loss and validity went.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowtilt.checkpoints import CheckpointError, load_weights, sha256_of
from flowtilt.devices import generator_of
from flowtilt.domains.molecules import build
from flowtilt.domains.molecules.assessment import composition, drift
from flowtilt.domains.molecules.chemistry import perceive, uniqueness
from flowtilt.domains.molecules.energies import molecules_of
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.domains.molecules.sampling import Base, generated, load_base
from flowtilt.domains.molecules.workers import WorkerPool
from flowtilt.files import atomic_path, one_line, read_json
from flowtilt.model import FlowModel
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import StageError, write_history, write_json
from flowtilt.pipeline.places import located
from flowtilt.pipeline.report.provenance import commit, versions
from flowtilt.pipeline.states import resumption_of
from flowtilt.pretraining import Watch
from flowtilt.sampling import OdeSettings

SEED = 0
"""Of the pretrained model, from which all seeds of fine-tuning start."""

LOSS_WINDOW = 500
"""Updates whose mean loss is a line of the record."""


def pretrain(job: Job) -> None:
    """Give the pretrained model and its record: those that are shipped, checked, or trained anew.

    A training keeps its state beside the output while it runs, and goes on from it if it was stopped. Its
    history, a row an update, is ``history.csv`` there.

    Raises:
        CheckpointError: if the checkpoint is missing, another file, or of another network.
        FlowMolError: if the weights are to be FlowMol's, and cannot be used.
    """
    experiment, molecules = job.experiment, job.read("molecules")
    output, record = job.outputs["model"], job.outputs["record"]
    if not experiment.checkpoint.retrain:
        shipped = _shipped(experiment)
        for source, target in ((shipped, output), (record_of(shipped), record)):
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
        return
    checks = output.with_name("checks.json")
    resumption = resumption_of(experiment, "pretrain", SEED, output, [molecules])
    slot = resumption.slot("pretraining")
    if not slot.path.is_file():
        checks.unlink(missing_ok=True)
    watch = _watch(experiment, molecules, checks)
    progress = job.bar(experiment.pretrain.updates, "pretrain")
    history = build.pretrain(experiment.flow, molecules, SEED, output, slot, progress, watch)
    write_history(history, output.with_name("history.csv"))
    write_json(_record(experiment, molecules, output, history, _read_checks(checks)), record)
    resumption.remove()


def record_of(weights: Path) -> Path:
    """The record of shipped weights: the same name with another ending."""
    return weights.with_suffix(".json")


def _shipped(experiment: MoleculeExperiment) -> Path:
    """The shipped checkpoint, after a look whether it is the one that the configuration means."""
    path = located(experiment.checkpoint.path)
    where = f"experiment {experiment.name}: key checkpoint"
    retrain = "or set checkpoint.retrain to true, which trains it anew"
    if experiment.model.kind == "flowmol":
        retrain = "or convert FlowMol's weights anew, as docs/molecules.md says"
    for file in (path, record_of(path)):
        if not file.is_file():
            raise CheckpointError(f"{where}.path: {file}: no such file; restore it, {retrain}")
    found = sha256_of(path)
    if found != experiment.checkpoint.sha256:
        raise CheckpointError(
            f"{where}.sha256: {path} has the SHA-256 {found}, not {experiment.checkpoint.sha256}; restore "
            f"the file or correct the key, {retrain}"
        )
    load_base(experiment, path)
    return path


def _watch(experiment: MoleculeExperiment, molecules: Path, checks: Path) -> Watch[FlowModel]:
    """Draws molecules now and then, always from the same noise, and writes down how good they are."""
    check = experiment.pretrain.check
    reference = composition(build.subset_of(experiment.flow, molecules).of_split("train").as_molecules())
    units = experiment.units
    parts = build.decoder(units), build.type_shares(units)
    ode = OdeSettings(steps=experiment.evaluation.ode_steps)

    def look(updates: int, model: FlowModel) -> None:
        generator = generator_of(experiment.starts_from, "check")
        tensors = generated(Base(model, *parts), check.samples, ode, generator)
        drawn = molecules_of(*(tensor.numpy(force=True) for tensor in tensors))
        with WorkerPool(1) as pool:
            structures = perceive(drawn, pool=pool)
        smiles = [structure.smiles for structure in structures if structure.smiles is not None]
        moved = drift(drawn, reference)
        row = {
            "updates": updates,
            "validity": float(np.mean([structure.invalid is None for structure in structures])),
            "uniqueness": uniqueness(smiles) if smiles else None,
            **{key: value for key, value in moved.items() if key.endswith("total_variation")},
        }
        # A training that goes on from an earlier state comes by again.
        kept = [earlier for earlier in _read_checks(checks) if earlier["updates"] < updates]
        write_json([*kept, row], checks)

    return Watch(check.every, look)


def _read_checks(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of checks, none before the first. Raises StageError if it is not whole."""
    if not path.is_file():
        return []
    try:
        lines = read_json(path)
        if not isinstance(lines, list):
            raise TypeError(f"{type(lines).__name__}, not a list")
        return sorted(lines, key=lambda line: int(line["updates"]))
    except (ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"{path}: not the checks of a training ({one_line(error)}); delete it and run again"
        ) from None


def _record(
    experiment: MoleculeExperiment,
    molecules: Path,
    weights: Path,
    history: list[dict[str, float]],
    checks: list[dict[str, Any]],
) -> dict[str, Any]:
    """What made the weights, and how it went."""
    subset = build.subset_of(experiment.flow, molecules)
    losses = np.array([row["loss"] for row in history])
    ends = range(LOSS_WINDOW, len(losses) + 1, LOSS_WINDOW)
    model = load_weights(build.build_model(experiment.flow), weights)
    return {
        "weights": experiment.model.name,
        "sha256": sha256_of(weights),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "commit": commit(),
        "command": "flowtilt pretrain, the rule molecules_pretrain, with checkpoint.retrain: true",
        "seed": SEED,
        "configuration": {"name": experiment.model.name, **experiment.flow.model_dump(mode="json")},
        "data": {"package": "qm9pack", "molecules": len(subset), "trained_on": len(subset.of_split("train"))},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "wall_seconds": round(history[-1]["seconds"], 1),
        "loss": [
            {"updates": end, "mean": round(float(losses[end - LOSS_WINDOW : end].mean()), 5)} for end in ends
        ],
        "checks": {"samples": experiment.pretrain.check.samples, "lines": checks},
    }
