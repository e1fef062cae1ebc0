"""FlowMol (Dunn and Koes 2024) as a base model; its package is imported only when it is chosen.

What stands in the way of its checkpoints is said by an error, and not worked around: their features have
interpolants of their own (positions, atom types, charges and bond orders each another schedule), where
:class:`flowtilt.model.FlowModel` has one path for the whole state.
"""

from __future__ import annotations

import importlib
from typing import Any

from flowtilt.domains.molecules.energies import Decoder
from flowtilt.model import FlowModel


class FlowMolError(RuntimeError):
    """FlowMol cannot be used; the message names the key and the fix."""


def load_flowmol(name: str) -> tuple[FlowModel, Decoder]:
    """One of FlowMol's pretrained models by its name, and the decoder of its states.

    Raises:
        FlowMolError: if the package is missing, or the model's features have different interpolants.
    """
    package = _package()
    model = package.load_pretrained(name)
    raise FlowMolError(
        f"key model.name: {name!r} ({type(model).__name__}) has an interpolant for each of its features, and "
        "the solvers here one for the whole state; set key model.kind to equivariant"
    )


def _package() -> Any:
    try:
        return importlib.import_module("flowmol")
    except ImportError as error:
        raise FlowMolError(
            f"key model.kind is flowmol, whose package cannot be imported ({error}); install FlowMol, with "
            "dgl and torch_scatter, from its repository Dunni3/FlowMol, or set the key to equivariant"
        ) from None
