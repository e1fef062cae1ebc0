"""The base model on molecules, and the stage that draws the molecules of a run.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtilt.devices import generator_of
from flowtilt.domains.molecules import build
from flowtilt.domains.molecules.adapters import load_adapted
from flowtilt.domains.molecules.data import Molecules
from flowtilt.domains.molecules.energies import Decoder, TypeShares
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.model import FlowModel
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import write_arrays
from flowtilt.sampling import OdeSettings, sample_ode

CHUNK = 64
"""Molecules that are sampled together, of nearly one size."""


@dataclass(frozen=True)
class Base:
    """A base model, how its states become molecules, and what their types are before that."""

    flow: FlowModel
    decode: Decoder
    types: TypeShares


def load_base(experiment: MoleculeExperiment, weights: Path, method: str = "") -> Base:
    """The configured model with some weights, and with the adapters of a method, if it has some.

    Raises:
        CheckpointError: if they are not there, or of another network.
        FlowMolError: if they are to be FlowMol's, and cannot be used.
    """
    adapter = experiment.methods[method].adapter if method else None
    if experiment.model.kind == "flowmol":
        from flowtilt.domains.molecules.flowmol_weights import load_flowmol

        return Base(*load_flowmol(experiment.model.name, weights, experiment.time_power, adapter))
    flow = load_adapted(build.build_model(experiment.flow), weights, adapter)
    units = experiment.units
    return Base(flow, build.decoder(units), build.type_shares(units))


def sample(job: Job) -> None:
    """Draw the molecules of a run by the probability-flow ODE, or from the training data.

    Models of one seed start from the same noise, so that differences between methods are not those of
    their draws.
    """
    experiment = job.experiment
    count = experiment.evaluation.samples
    generator = generator_of(experiment.starts_from, "sample", job.seed)
    if job.run.kind == "data":
        data = build.subset_of(experiment.flow, job.read("molecules"))
        coordinates, numbers = _drawn(data, count, generator)
    else:
        base = load_base(experiment, job.read("model"), job.method)
        settings = OdeSettings(steps=experiment.evaluation.ode_steps)
        coordinates, numbers = generated(base, count, settings, generator)
    write_molecules(coordinates, numbers, job.outputs["samples"])


def write_molecules(coordinates: Tensor, numbers: Tensor, output: Path) -> None:
    """Write molecules: coordinates in ångström (molecules, atoms, 3) and atomic numbers (molecules, atoms),
    zero where there is no atom."""
    write_arrays(
        output,
        coordinates=coordinates.numpy(force=True).astype(np.float32),
        numbers=numbers.numpy(force=True).astype(np.uint8),
    )


def generated(
    base: Base, count: int, settings: OdeSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Molecules of a flow, drawn in batches of nearly one size, which saves padding. Returns coordinates in
    ångström (count, atoms, 3) and atomic numbers (count, atoms), zero where there is no atom."""
    context = base.flow.draw_context(count, generator)
    order = torch.argsort(context.sum(1), stable=True)
    coordinates, numbers = torch.zeros(*context.shape, 3), torch.zeros(context.shape, dtype=torch.long)
    for index in order.split(CHUNK):
        mask = base.flow.select_context(context, index)
        atoms = int(mask.sum(1).max())
        mask = mask[:, :atoms]
        x = sample_ode(base.flow, len(index), generator, mask, settings)
        coordinates[index, :atoms], numbers[index, :atoms] = base.decode(x, mask)
    return coordinates, numbers


def _drawn(molecules: Molecules, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Molecules of the training split, with replacement."""
    train = molecules.of_split("train").as_molecules()
    chosen = torch.randint(len(train), (count,), generator=generator)
    return build.padded([train[i] for i in chosen.tolist()])
