"""From the configuration of a pretrained flow on molecules to its objects, and its pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowtilt.checkpoints import save_weights
from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.domains.molecules.data import Molecules, MoleculeSource, load
from flowtilt.domains.molecules.energies import Decoder, StateEnergy, TypeShares
from flowtilt.domains.molecules.model import MoleculeFlow
from flowtilt.domains.molecules.sections import MoleculeConfig, UnitsConfig
from flowtilt.domains.molecules.states import ATOMIC_NUMBERS, unpack
from flowtilt.domains.molecules.workers import Lost, WorkerError, shared_pool
from flowtilt.domains.molecules.xtb import Molecule, atomic_energy
from flowtilt.model import Context, FlowModel
from flowtilt.pretraining import PretrainingSettings, Watch, fit_flow
from flowtilt.resuming import Slot
from flowtilt.seeding import seed_of

ATOM_SECONDS = 60.0
"""Processor time that the energy of one atom may take, in seconds; it takes milliseconds."""


def decoder(units: UnitsConfig) -> Decoder:
    """From states of :mod:`.states`, with their mask as context, to coordinates and atomic numbers.

    The type of an atom is its largest type column: a discrete choice, so that there is no gradient of
    anything decoded on the type columns.
    """
    numbers = torch.tensor(ATOMIC_NUMBERS)

    def decode(x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        coordinates, types = unpack(x, context, units)
        return coordinates, numbers[types] * context

    return decode


def type_shares(units: UnitsConfig) -> TypeShares:
    """Of states of :mod:`.states`, with their mask as context: the type columns over their scale."""

    def shares(x: Tensor, context: Context) -> Tensor:
        return x[..., 3:] / units.type_scale * context.unsqueeze(2)

    return shares


def separated_atoms(shares: TypeShares, workers: int | None = None) -> StateEnergy:
    """The GFN1-xTB energy of a state's atoms far from each other, as a linear function of its types.

    It is that of the atoms where each is of one element, up to a constant an atom: the elements' mean is
    taken off, since the shares of an atom have a fixed sum and what would change it leads nowhere.

    Args:
        workers: processes to use; by default one for each processor.

    Raises:
        MissingExtra: if tblite is not installed.
        WorkerError: if an atom's energy cannot be had.
    """
    found = shared_pool(workers).map(atomic_energy, ATOMIC_NUMBERS, ATOM_SECONDS)
    if lost := [one.detail for one in found if isinstance(one, Lost)]:
        raise WorkerError(f"the energy of an atom is not there: the worker {lost[0]}")
    energies = torch.tensor(found, dtype=torch.float64)
    energies = energies - energies.mean()

    def energy(x: Tensor, context: Context) -> Tensor:
        return (shares(x, context) @ energies.to(x)).sum(1)

    return energy


def padded(molecules: Sequence[Molecule]) -> tuple[Tensor, Tensor]:
    """Coordinates in ångström (n, atoms, 3) and atomic numbers (n, atoms), zero where there is no atom."""
    atoms = max(len(molecule.numbers) for molecule in molecules)
    coordinates = torch.zeros(len(molecules), atoms, 3)
    numbers = torch.zeros(len(molecules), atoms, dtype=torch.long)
    for row, (z, x) in enumerate(molecules):
        coordinates[row, : len(z)], numbers[row, : len(z)] = torch.as_tensor(x), torch.as_tensor(z)
    return coordinates, numbers


def build_model(
    config: MoleculeConfig, size_weights: torch.Tensor | None = None, seed: int = 0
) -> MoleculeFlow:
    """A freshly initialised flow; its weights follow from the name and the seed alone.

    Args:
        size_weights: of the data, (largest + 1,); without them, to be had from a checkpoint.
    """
    if size_weights is None:
        size_weights = torch.ones(config.subset.largest + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.name, "initial weights", seed))
        return MoleculeFlow(
            config.network, config.units, size_weights, config.pretrain.type_weight, config.time_power
        )


def subset_of(config: MoleculeConfig, molecules: Path) -> Molecules:
    """The molecules of the configuration, from a file of :func:`flowtilt.domains.molecules.data.prepare`."""
    return load(molecules).of_size(config.subset.smallest, config.subset.largest)


def pretrain(
    config: MoleculeConfig,
    molecules: Path,
    seed: int,
    output: Path,
    slot: Slot,
    progress: Progress | None = None,
    watch: Watch[FlowModel] | None = None,
) -> list[dict[str, float]]:
    """Pretrain the configured flow on the training split; returns the history, a row an update."""
    chosen = subset_of(config, molecules)
    sizes = torch.zeros(config.subset.largest + 1, dtype=torch.float64)
    weights = chosen.size_weights()
    sizes[: len(weights)] = weights
    model = build_model(config, sizes, seed)
    keys = config.pretrain.model_dump(exclude={"window", "type_weight", "check"})
    source = MoleculeSource(chosen.of_split("train"), config.units, config.pretrain.window)
    generator = generator_of(config.name, "pretrain", seed)
    settings = PretrainingSettings(**keys)
    history = fit_flow(model, source, settings, generator, progress, slot, watch)
    save_weights(model, output)
    return history
