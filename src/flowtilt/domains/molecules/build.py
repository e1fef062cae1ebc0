"""From the configuration of a pretrained flow on molecules to its objects, and its pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, model_validator

from flowtilt.checkpoints import save_weights
from flowtilt.configuration import Count, Positive, Section, Share
from flowtilt.control.base import Progress
from flowtilt.domains.molecules.data import Molecules, MoleculeSource, load
from flowtilt.domains.molecules.model import MoleculeFlow
from flowtilt.domains.molecules.network import NetworkSettings
from flowtilt.domains.molecules.states import Units
from flowtilt.pretraining import PretrainingSettings, Resumption, fit_flow
from flowtilt.seeding import seed_of


class SubsetConfig(Section):
    """Which molecules of QM9: by their numbers of atoms, hydrogen included."""

    smallest: Count = 1
    largest: Count = 12

    @model_validator(mode="after")
    def _in_order(self) -> SubsetConfig:
        if self.smallest > self.largest:
            raise ValueError(f"smallest ({self.smallest}) must not be above largest ({self.largest})")
        return self


class UnitsConfig(Section):
    """See :class:`flowtilt.domains.molecules.states.Units`."""

    length: Positive = 1.25
    type_scale: Positive = 0.1


class MoleculeNetworkConfig(Section):
    """See :class:`flowtilt.domains.molecules.network.NetworkSettings`."""

    layers: Count = 4
    width: Count = 128
    vectors: Count = 16
    pair_width: Count = 48
    heads: Count = 8
    radial: Annotated[int, Field(ge=2)] = 24
    reach: Positive = 5.0

    @model_validator(mode="after")
    def _divisible(self) -> MoleculeNetworkConfig:
        NetworkSettings(**self.model_dump())  # which says what is wrong
        return self


class MoleculePretrainConfig(Section):
    """See :class:`flowtilt.pretraining.PretrainingSettings`; ``window`` is of the source of molecules,
    ``type_weight`` of the loss."""

    updates: Count
    batch: Count = 64
    learning_rate: Positive = 1e-3
    warmup: Share = 0.01
    average: Annotated[float, Field(ge=0, lt=1)] = 0.9995
    gradient_clip: Positive = 1.0
    times: tuple[float, Positive] = (1.5, 1.2)
    window: Annotated[float, Field(gt=0, le=1)] = 1.0
    type_weight: Positive = 1.0
    bfloat16: bool = True
    compiled: bool = False


class MoleculeConfig(Section):
    """A flow on molecules: data, units, network and pretraining. ``name`` is that of its weights."""

    name: str
    subset: SubsetConfig
    units: UnitsConfig = UnitsConfig()
    network: MoleculeNetworkConfig = MoleculeNetworkConfig()
    pretrain: MoleculePretrainConfig


def build_units(config: MoleculeConfig) -> Units:
    """What the states of the configuration are measured in."""
    return Units(**config.units.model_dump())


def build_model(
    config: MoleculeConfig, size_weights: torch.Tensor | None = None, seed: int = 0
) -> MoleculeFlow:
    """A freshly initialised flow; its weights follow from the name and the seed alone.

    Args:
        config: of it.
        size_weights: of the data, (largest + 1,); without them, to be had from a checkpoint.
        seed: of the weights.
    """
    if size_weights is None:
        size_weights = torch.ones(config.subset.largest + 1)
    network = NetworkSettings(**config.network.model_dump())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.name, "initial weights", seed))
        return MoleculeFlow(network, build_units(config), size_weights, config.pretrain.type_weight)


def subset_of(config: MoleculeConfig, molecules: Path) -> Molecules:
    """The molecules of the configuration, from a file of :func:`flowtilt.domains.molecules.data.prepare`."""
    return load(molecules).of_size(config.subset.smallest, config.subset.largest)


def pretrain(
    config: MoleculeConfig,
    molecules: Path,
    seed: int,
    output: Path,
    state: Path,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Pretrain the configured flow on the training split; returns the history, a row an update.

    Args:
        config: of the flow.
        molecules: file of :func:`flowtilt.domains.molecules.data.prepare`.
        seed: of weights and draws.
        output: where the weights go, the averaged ones.
        state: where the training keeps its state, and goes on from if the file is there.
        progress: called with each update's row.
    """
    chosen = subset_of(config, molecules)
    sizes = torch.zeros(config.subset.largest + 1, dtype=torch.float64)
    weights = chosen.size_weights()
    sizes[: len(weights)] = weights
    model = build_model(config, sizes, seed)
    keys = config.pretrain.model_dump(exclude={"window", "type_weight"})
    source = MoleculeSource(chosen.of_split("train"), build_units(config), config.pretrain.window)
    generator = torch.Generator().manual_seed(seed_of(config.name, "pretrain", seed))
    history = fit_flow(model, source, PretrainingSettings(**keys), generator, progress, Resumption(state))
    save_weights(model, output)
    return history
