"""Experiments on molecules small enough to run whole in a unit test: an untrained network, few atoms."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowtilt.checkpoints import save_weights
from flowtilt.domains.molecules import data
from flowtilt.domains.molecules.build import build_model
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.pipeline.configuration import merge
from flowtilt.pipeline.experiment import load_file
from small import CONFIG

# In units of one ångström most molecules of an untrained network have an energy, and some do not.
TINY: dict[str, Any] = {
    "seeds": 1,
    "subset": {"largest": 5},
    "units": {"length": 1.0},
    "reward": {"max_iterations": 60},
    "network": {"layers": 1, "width": 8, "vectors": 4, "pair_width": 4, "heads": 2, "radial": 4},
    "pretrain": {
        "updates": 3,
        "batch": 4,
        "compiled": False,
        "bfloat16": False,
        "check": {"every": 2, "samples": 20},
    },
    "offline": {"samples": 40},
    "solver": {"updates": 3, "batch": 4, "pool": 8, "steps": 4},
    "evaluation": {"samples": 30, "ode_steps": 2, "relaxed": 2},
}


def tiny(weights: Path | None = None, /, **changes: Any) -> MoleculeExperiment:
    """The shipped experiment at a size of seconds, with a checkpoint and with some keys changed."""
    overrides = TINY
    if weights is not None:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        overrides = merge(overrides, {"checkpoint": {"path": str(weights), "sha256": digest}})
    overrides = merge(overrides, changes)
    file = CONFIG / "experiments" / "molecules_qm9.yaml"
    (experiment,) = load_file(file, {"molecules": overrides}).values()
    assert isinstance(experiment, MoleculeExperiment)
    return experiment


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Weights of an untrained network that has molecules of 3, 4 and 5 atoms, and a record beside them."""
    sizes = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(build_model(tiny().flow, sizes, seed), path)
    path.with_suffix(".json").write_text('{"weights": "of an untrained network"}\n')
    return path


GEOMETRIES = {
    "O": ("OHH", [[0.0, 0.0, 0.118], [0.0, 0.755, -0.471], [0.0, -0.755, -0.471]]),
    "C#N": ("CNH", [[0.0, 0.0, -0.501], [0.0, 0.0, 0.652], [0.0, 0.0, -1.567]]),
    "C=O": ("COHH", [[0, 0, -0.53], [0, 0, 0.675], [0, 0.934, -1.117], [0, -0.934, -1.117]]),
    "N": ("NHHH", [[0, 0, 0.116], [0, 0.94, -0.271], [0.814, -0.47, -0.271], [-0.814, -0.47, -0.271]]),
    "C": (
        "CHHHH",
        [[0, 0, 0], [0.63, 0.63, 0.63], [-0.63, -0.63, 0.63], [-0.63, 0.63, -0.63], [0.63, -0.63, -0.63]],
    ),
}
"""Real molecules of up to five atoms, by SMILES: elements and coordinates in ångström."""


def write_molecules(path: Path, copies: int = 12) -> Path:
    """A file in the layout of QM9's arrays, with copies of :data:`GEOMETRIES`."""
    records = []
    for index in range(copies * len(GEOMETRIES)):
        smiles, (symbols, coordinates) = list(GEOMETRIES.items())[index % len(GEOMETRIES)]
        types = np.array([data.ELEMENTS.index(symbol) for symbol in symbols])
        records.append(data.Record(index, smiles, types, np.array(coordinates, dtype=float)))
    whole = data.gather(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: getattr(whole, name) for name in data.FIELDS})
    return path
