"""Molecules as one tensor: coordinates and atom types side by side, padded to one number of atoms.

A batch of states has shape (batch, atoms, 3 + types): the first three columns are coordinates over
:attr:`UnitsConfig.length`, the others the one-hot atom type times :attr:`UnitsConfig.type_scale`. What
says which rows are atoms is the context, a mask (batch, atoms) of bools, true for atoms; rows of padding are
zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowtilt.domains.molecules.sections import UnitsConfig

ELEMENTS = ("H", "C", "N", "O", "F")
"""Atom types, in the order of the type columns."""

ATOMIC_NUMBERS = (1, 6, 7, 8, 9)
"""Of :data:`ELEMENTS`."""

WIDTH = 3 + len(ELEMENTS)
"""Columns of a state."""


def centred(coordinates: Tensor, mask: Tensor) -> Tensor:
    """Coordinates (batch, atoms, 3) with each molecule's mean over its atoms at zero, as its padding."""
    weights = mask.unsqueeze(-1).to(coordinates)
    mean = (coordinates * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    return (coordinates - mean) * weights


def pack(coordinates: Tensor, types: Tensor, mask: Tensor, units: UnitsConfig) -> Tensor:
    """States of molecules, (batch, atoms, 3 + types), with their centres of mass at zero.

    Args:
        coordinates: in ångström, (batch, atoms, 3); any value where there is no atom.
        types: positions in :data:`ELEMENTS`, long, (batch, atoms); any of them where there is no atom.
        mask: which rows are atoms, (batch, atoms).
    """
    one_hot = F.one_hot(types, len(ELEMENTS)).to(coordinates) * mask.unsqueeze(-1)
    return torch.cat([centred(coordinates, mask) / units.length, one_hot * units.type_scale], dim=2)


def unpack(x: Tensor, mask: Tensor, units: UnitsConfig) -> tuple[Tensor, Tensor]:
    """Coordinates in ångström, (batch, atoms, 3), and the likeliest types, long, (batch, atoms), of states.
    Both are zero where there is no atom."""
    coordinates = x[..., :3] * units.length * mask.unsqueeze(-1)
    return coordinates, x[..., 3:].argmax(-1) * mask
