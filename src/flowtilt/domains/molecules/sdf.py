"""Molecules in the field's own format, SDF, with what else is known of them as properties."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowtilt.domains.molecules.chemistry import Structure, elements, without_bonds
from flowtilt.domains.molecules.workers import MissingExtra, missing_extra
from flowtilt.domains.molecules.xtb import METHOD, Molecule, Point
from flowtilt.files import atomic_path, read_text

if TYPE_CHECKING:
    from rdkit.Chem import Mol

LARGEST = 9999.0
"""Coordinate in ångström beyond which the columns of the format overflow."""


class SdfError(ValueError):
    """A file that is not a whole SDF, or a molecule that none can hold."""


class Record(NamedTuple):
    """A molecule of an SDF.

    Attributes:
        molecule: with coordinates to 1e-4 ångström.
        bonds: pairs of atoms and orders; none if the molecule has no valid structure.
    """

    molecule: Molecule
    bonds: tuple[tuple[int, int, int], ...]
    properties: dict[str, str]


def describe(point: Point, structure: Structure) -> dict[str, str | float]:
    """Properties of a molecule: its energy and method, SMILES, and why it has neither if so."""
    found: dict[str, str | float] = {"method": METHOD}
    found |= {"failure": point.failure.value} if point.failure else {"energy_hartree": point.energy}
    invalid = structure.invalid
    found |= {"invalid": invalid.value} if invalid else {"smiles": str(structure.smiles)}
    return found


def write_sdf(
    path: str | os.PathLike[str],
    molecules: Sequence[Molecule],
    structures: Sequence[Structure],
    properties: Sequence[Mapping[str, str | float]],
) -> None:
    """Write molecules to an SDF (V2000), whole or not at all.

    Args:
        molecules: of elements at finite coordinates within 9999 ångström; see :func:`holds`.
        structures: of each molecule; one that is not valid is written without bonds.
        properties: of each molecule, for instance of :func:`describe`; numbers are written in full.

    Raises:
        SdfError: if the format cannot hold a molecule.
        MissingExtra: if RDKit is not installed.
    """
    Chem = _rdkit()
    with atomic_path(path) as temporary, Chem.SDWriter(str(temporary)) as writer:
        writer.SetKekulize(False)  # bonds have the orders of one Kekulé structure already
        for index, (molecule, structure, own) in enumerate(
            zip(molecules, structures, properties, strict=True)
        ):
            if not holds(molecule):
                raise SdfError(
                    f"{path}: molecule {index} has coordinates that are not finite or exceed {LARGEST} "
                    "ångström, or atoms of no element, which an SDF cannot hold; leave it out"
                )
            if not _fits(structure, len(molecule.numbers)):
                raise SdfError(
                    f"{path}: the structure of molecule {index} is that of another; mend the order"
                )
            mol = _bonded(molecule, structure)
            mol.SetProp("_Name", str(index))
            for name, value in own.items():
                mol.SetProp(name, value if isinstance(value, str) else repr(float(value)))
            writer.write(mol)


def holds(molecule: Molecule) -> bool:
    """Whether an SDF can hold a molecule: its elements, and coordinates that fit the format's columns."""
    return elements(molecule) and bool((np.abs(molecule.coordinates) < LARGEST).all())


def _fits(structure: Structure, atoms: int) -> bool:
    ends = [end for first, second, _ in structure.bonds for end in (first, second)]
    return len(structure.charges) in (0, atoms) and all(0 <= end < atoms for end in ends)


def _bonded(molecule: Molecule, structure: Structure) -> Mol:
    from rdkit import Chem

    orders = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
    mol = without_bonds(molecule)
    for atom, charge in zip(mol.GetAtoms(), structure.charges, strict=False):
        atom.SetFormalCharge(charge)
    for first, second, order in structure.bonds:
        mol.AddBond(first, second, orders[order])
    mol.UpdatePropertyCache(strict=False)
    return mol


def read_sdf(path: str | os.PathLike[str]) -> list[Record]:
    """The molecules of an SDF, in its order.

    Raises:
        SdfError: naming the file, if it is missing or a molecule cannot be read.
        MissingExtra: if RDKit is not installed.
    """
    Chem = _rdkit()
    if not Path(path).is_file():
        raise SdfError(f"{path}: no such file")
    text = read_text(path, SdfError).rstrip()
    if not text:  # of no molecules, which RDKit takes for an error
        return []
    if not text.endswith("$$$$"):
        raise SdfError(f"{path}: not whole, it does not end in $$$$; delete the file and write it again")
    records = []
    with Chem.SDMolSupplier(str(path), sanitize=False, removeHs=False, strictParsing=True) as supplier:
        for index, mol in enumerate(supplier):
            if mol is None:
                raise SdfError(f"{path}: molecule {index} cannot be read; delete the file and write it again")
            records.append(_record(mol))
    return records


def _record(mol: Mol) -> Record:
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int32)
    coordinates = np.array(mol.GetConformer().GetPositions(), dtype=np.float64).reshape(-1, 3)
    bonds = tuple(
        (bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), round(bond.GetBondTypeAsDouble()))
        for bond in mol.GetBonds()
    )
    return Record(Molecule(numbers, coordinates), bonds, mol.GetPropsAsDict(autoConvertStrings=False))


def _rdkit() -> Any:
    try:
        from rdkit import Chem
    except ImportError as error:
        raise MissingExtra(missing_extra(error)) from None
    return Chem
