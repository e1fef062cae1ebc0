"""FlowMol's weights as safetensors: their conversion, once, and how they are loaded.

FlowMol's checkpoints have to be unpickled, which runs what is in them. That is done in one place,
:func:`convert_pretrained`, by FlowMol's own loader and only when it is called for; the stages read nothing
but safetensors, and build FlowMol's network from the description in them.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flowtilt.checkpoints import CheckpointError, save_weights, sha256_of
from flowtilt.domains.molecules.adapters import load_adapted
from flowtilt.domains.molecules.energies import Decoder, TypeShares
from flowtilt.domains.molecules.flowmol import (
    Description,
    FlowMolError,
    FlowMolFlow,
    decoder,
    imported,
    type_shares,
)
from flowtilt.domains.molecules.sections import MoleculeAdapterConfig
from flowtilt.files import write_text
from flowtilt.model import FlowModel


def load_flowmol(
    name: str, weights: Path, time_power: float = 1.0, adapter: MoleculeAdapterConfig | None = None
) -> tuple[FlowModel, Decoder, TypeShares]:
    """A model of FlowMol's Gaussian kind, frozen, and the decoder and the types of its states.

    Args:
        weights: converted, or fine-tuned from those.
        time_power: see :class:`flowtilt.model.FlowModel`.
        adapter: that it gets, or has.

    Raises:
        FlowMolError: if the package is missing, or the model is of another name or kind.
        CheckpointError: if the weights are not there, cut short, or of another network.
    """
    imported("flowmol")
    encoded, sizes = _described(weights)
    try:
        description = Description.decoded(encoded)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{weights}: its description of the network cannot be read ({error}); convert it again as "
            "docs/molecules.md says"
        ) from None
    if description.name != name:
        raise FlowMolError(
            f"{weights}: weights of FlowMol's {description.name!r}, where key model.name is {name!r}; "
            "correct the key, or convert the weights of that model"
        )
    description.check()
    flow = FlowMolFlow(description, _network(description), sizes, time_power)
    parts = decoder(description, flow.layout), type_shares(description, flow.layout)
    return load_adapted(flow, weights, adapter), *parts


def _described(weights: Path) -> tuple[Tensor, Tensor]:
    """The description of converted weights, and how often each number of atoms occurs."""
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such checkpoint; run the stage that writes it first")
    try:
        with safetensors.safe_open(weights, "pt") as file:
            names = ("description", "size_weights")
            if set(names) <= set(file.keys()):
                encoded, sizes = (file.get_tensor(name) for name in names)
                return encoded, sizes
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: not a complete safetensors file ({error}); make it anew") from None
    raise CheckpointError(
        f"{weights}: not converted weights of FlowMol; convert them as docs/molecules.md says, or set key "
        "model.kind to equivariant"
    )


def _network(description: Description) -> nn.Module:
    """FlowMol's network, with weights that are yet to be loaded."""
    fields = imported("flowmol.models.vector_field")
    scheduler = imported("flowmol.models.interpolant_scheduler")
    kinds = {feature: kind for feature, (kind, _) in description.schedules.items()}
    rates = {feature: nu for feature, (kind, nu) in description.schedules.items() if kind == "cosine"}
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = fields.EndpointVectorField(
                n_atom_types=len(description.elements),
                canonical_feat_order=list("xace"),
                # Held by the network, which does not ask it for anything when it predicts an endpoint.
                interpolant_scheduler=scheduler.InterpolantScheduler(
                    list("xace"), schedule_type=kinds, cosine_params=rates
                ),
                n_charges=description.charges,
                n_bond_types=description.bonds,
                **description.network,
            )
    except (AttributeError, TypeError) as error:
        raise FlowMolError(
            f"key model.name: the network of {description.name!r} cannot be built by the installed FlowMol "
            f"({error}); install a version that has this model among its pretrained ones"
        ) from None
    return network


def convert_pretrained(name: str, output: Path) -> None:
    """Write the weights of one of FlowMol's pretrained models as safetensors, with a record beside them.

    FlowMol downloads the model's checkpoint, if it has not yet, and *unpickles* it: run this once, in an
    environment that you trust.

    Args:
        name: of the model, as ``qm9_gaussian``.
        output: file to write; the record has the ending json.

    Raises:
        FlowMolError: if the package or the model is missing, or the model is not of the Gaussian kind.
    """
    package = imported("flowmol")
    try:
        model = package.load_pretrained(name)
    except (AttributeError, ValueError, OSError, RuntimeError, UnpicklingError) as error:
        raise FlowMolError(
            f"key model.name: FlowMol cannot load {name!r} ({error}); name a model of the installed version, "
            "or install a version that has it"
        ) from None
    description = describe(name, model)
    description.check()
    flow = FlowMolFlow(description, model.vector_field, _size_weights(model))
    output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(flow, output)
    record = {
        "weights": f"FlowMol's {name}, converted",
        "sha256": sha256_of(output),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "versions": {needed: _version_of(needed) for needed in ("flowmol", "dgl", "torch")},
    }
    write_text(output.with_suffix(".json"), json.dumps(record, indent=2) + "\n")


def describe(name: str, model: Any) -> Description:
    """What a loaded model of FlowMol's is, from its attributes and its hyperparameters."""
    scheduler = model.interpolant_scheduler
    features = [feature for feature in "xace" if feature in model.canonical_feat_order]
    priors = {}
    for feature in features:
        prior = model.prior_config[feature]
        # Arguments that are tensors belong to priors that are refused.
        kept = {key: value for key, value in prior["kwargs"].items() if not isinstance(value, Tensor)}
        priors[feature] = (str(prior["type"]), kept)
    schedules = {
        feature: (str(scheduler.schedule_dict[feature]), float(scheduler.cosine_params.get(feature, 0.0)))
        for feature in features
    }
    return Description(
        name=name,
        parameterization=str(model.parameterization),
        elements=tuple(model.atom_type_map),
        charges=int(model.n_atom_charges),
        bonds=int(model.n_bond_types),
        priors=priors,
        schedules=schedules,
        network=dict(model.hparams["vector_field_config"]),
    )


def _size_weights(model: Any) -> Tensor:
    """How often each number of atoms occurs, from 0 to the largest, (largest + 1,)."""
    sizes = model.n_atoms_map.long()
    weights = torch.zeros(int(sizes.max()) + 1, dtype=torch.float64)
    return weights.index_add(0, sizes, model.n_atoms_dist.probs.double())


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
