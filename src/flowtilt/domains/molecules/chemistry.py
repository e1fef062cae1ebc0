"""What a geometry is as a chemical structure: bonds, validity, SMILES; uniqueness and novelty of sets.

Bonds come from the geometry alone, by the method that RDKit has from xyz2mol (Kim and Kim 2015): two
atoms are bonded if their distance is below a factor times the sum of their covalent radii, and the
orders are those that give every atom a valence it can have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowtilt.domains.molecules.workers import Lost, WorkerPool, shared_pool
from flowtilt.domains.molecules.xtb import HEAVIEST, Molecule

if TYPE_CHECKING:
    from rdkit.Chem import Atom, Mol

SMILES_AT_ONCE = 500
SECONDS_OF_SMILES = 60.0


class Invalid(StrEnum):
    """Why a geometry is not a valid molecule; the value is for people, the name the key of counts."""

    NO_ATOMS = "no atoms"
    ELEMENT = "what is no element"
    NOT_FINITE = "coordinates that are not finite"
    FRAGMENTS = "more than one fragment"
    BOND_ORDERS = "no bond orders that give every atom a possible valence and the molecule no charge"
    CHARGED = "charges other than those of nitro groups and their like"
    RADICAL = "unpaired electrons"
    SANITISATION = "refused by RDKit's sanitisation"
    SEARCH = "too many combinations of bond orders"
    TIME = "time limit"
    CRASHED = "crash of the perception"


@dataclass(frozen=True)
class PerceptionSettings:
    """How bonds are perceived, and what counts as neutral.

    Attributes:
        factors: of the sum of covalent radii below which atoms are bonded, tried in turn until one gives
            a valid molecule. No single one does for QM9: a factor of 1.3 ties atoms across small rings
            and cages, a factor of 1.15 cuts long bonds of oxygen to nitrogen. Of QM9's 4,005 molecules
            of up to twelve atoms both together accept all but four zwitterions, 1.3 alone 99.2 %, and
            1.3 without formal charges 97.6 %.
        formal_charges: whether a structure may have the charges that neutral groups are written with:
            a positive nitrogen without hydrogens, bonded to a negative end of oxygen or nitrogen (nitro
            groups, N-oxides, azides). Of any charges at all, a charge of the molecule of zero is made
            of random atoms too easily.
        searches: limit on the combinations of valences that are tried, of which there are
            exponentially many.
        seconds: processor time that one molecule may take; it takes a millisecond.
    """

    factors: tuple[float, ...] = (1.3, 1.15)
    formal_charges: bool = True
    searches: int = 100_000
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.factors or not all(factor > 0 for factor in self.factors):
            raise ValueError(f"factors must be positive numbers, at least one, got {self.factors}")
        if self.searches < 1 or not self.seconds > 0:
            raise ValueError(f"limits must be positive, got {self.searches=} and {self.seconds=}")


class Structure(NamedTuple):
    """A valid molecule's structure, or why there is none.

    Attributes:
        smiles: canonical, without stereochemistry and explicit hydrogens; None if not valid.
        bonds: pairs of atoms and the order of their bond, of one of the Kekulé structures.
        invalid: the reason, or None.
        detail: RDKit's message, if it had one.
    """

    smiles: str | None
    bonds: tuple[tuple[int, int, int], ...] = ()
    charges: tuple[int, ...] = ()
    invalid: Invalid | None = None
    detail: str = ""


class _Refused(Exception):
    def __init__(self, invalid: Invalid, detail: str = "") -> None:
        super().__init__(invalid, detail)
        self.invalid, self.detail = invalid, detail


def perceive(
    molecules: Sequence[Molecule], settings: PerceptionSettings | None = None, pool: WorkerPool | None = None
) -> list[Structure]:
    """Structures of molecules; valid are those of one fragment, neutral, and without radicals.

    Args:
        molecules: as :func:`flowtilt.domains.molecules.energies.molecules_of` gives them.
        pool: of workers; by default one shared by this process, with a worker for each processor.

    Raises:
        MissingExtra: if RDKit is not installed.
    """
    settings = settings or PerceptionSettings()
    tasks = [(molecule, settings) for molecule in molecules]
    results = (pool or shared_pool()).map(perceive_one, tasks, settings.seconds)
    return [
        Structure(None, invalid=Invalid.TIME if r.timed_out else Invalid.CRASHED, detail=r.detail)
        if isinstance(r, Lost)
        else r
        for r in results
    ]


def perceive_one(task: tuple[Molecule, PerceptionSettings]) -> Structure:
    """The structure of one molecule, in this process; if it has none, the reason at the first factor."""
    molecule, settings = task
    if len(molecule.numbers) == 0:
        return Structure(None, invalid=Invalid.NO_ATOMS)
    if not elements(molecule):
        return Structure(None, invalid=Invalid.ELEMENT)
    if not np.isfinite(molecule.coordinates).all():
        return Structure(None, invalid=Invalid.NOT_FINITE)
    refusals = []
    for factor in settings.factors:
        try:
            return _structure(molecule, factor, settings)
        except _Refused as refused:
            refusals.append(refused)
        except (ValueError, RuntimeError) as error:  # RDKit's own, of whatever else it cannot have
            refusals.append(_Refused(Invalid.SANITISATION, str(error)))
    return Structure(None, invalid=refusals[0].invalid, detail=refusals[0].detail)


def elements(molecule: Molecule) -> bool:
    """Whether its numbers are all those of elements."""
    return bool(((molecule.numbers >= 1) & (molecule.numbers <= HEAVIEST)).all())


def _structure(molecule: Molecule, factor: float, settings: PerceptionSettings) -> Structure:
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        mol = _with_bonds(molecule, factor, settings.searches)
        charges = tuple(atom.GetFormalCharge() for atom in mol.GetAtoms())
        if any(charges) and not (settings.formal_charges and _paired(mol)):
            raise _Refused(Invalid.CHARGED)
        if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
            raise _Refused(Invalid.RADICAL)
        smiles = canonical(Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False))
        if smiles is None:
            raise _Refused(Invalid.SANITISATION, "its own SMILES cannot be read back")
        Chem.Kekulize(mol, clearAromaticFlags=True)
        bonds = tuple(
            (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), round(b.GetBondTypeAsDouble())) for b in mol.GetBonds()
        )
        return Structure(smiles, bonds, charges)


def _with_bonds(molecule: Molecule, factor: float, searches: int) -> Mol:
    """The molecule as RDKit sees it: one fragment with bond orders, sanitised."""
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    mol = without_bonds(molecule)
    try:
        rdDetermineBonds.DetermineConnectivity(mol, useVdw=True, covFactor=factor)
        if len(Chem.GetMolFrags(mol)) > 1:
            raise _Refused(Invalid.FRAGMENTS)
        # Without this choice RDKit writes a nitro group as a radical that it then refuses.
        rdDetermineBonds.DetermineBondOrders(
            mol, charge=0, allowChargedFragments=True, embedChiral=False, maxIterations=searches
        )
        Chem.SanitizeMol(mol)
    except Chem.MolSanitizeException as error:
        raise _Refused(Invalid.SANITISATION, str(error)) from None
    except (ValueError, RuntimeError) as error:
        exceeded = type(error).__name__ == "MaxFindBondOrdersItersExceeded" or "Max Iterations" in str(error)
        raise _Refused(Invalid.SEARCH if exceeded else Invalid.BOND_ORDERS, str(error)) from None
    return mol


def without_bonds(molecule: Molecule) -> Mol:
    """An editable molecule of RDKit with atoms and coordinates alone."""
    from rdkit import Chem

    mol = Chem.RWMol()
    conformer = Chem.Conformer(len(molecule.numbers))
    for index, (number, position) in enumerate(zip(*molecule, strict=True)):
        atom = Chem.Atom(int(number))
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
        conformer.SetAtomPosition(index, [float(value) for value in position])
    mol.AddConformer(conformer, assignId=True)
    return mol


def _paired(mol: Mol) -> bool:
    """Whether all formal charges are those of pairs that :class:`PerceptionSettings` allows."""
    return all(
        any(_pair(atom, other) or _pair(other, atom) for other in atom.GetNeighbors())
        for atom in mol.GetAtoms()
        if atom.GetFormalCharge()
    )


def _pair(positive: Atom, negative: Atom) -> bool:
    return bool(
        positive.GetAtomicNum() == 7
        and positive.GetFormalCharge() == 1
        and all(atom.GetAtomicNum() > 1 for atom in positive.GetNeighbors())
        and negative.GetAtomicNum() in (7, 8)
        and negative.GetFormalCharge() == -1
        and negative.GetDegree() == 1
    )


def canonical(smiles: str) -> str | None:
    """Canonical SMILES without stereochemistry, or None if it is not one of any atom, in this process."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        return Chem.MolToSmiles(mol, isomericSmiles=False) if mol is not None and mol.GetNumAtoms() else None


def _canonical_all(smiles: Sequence[str]) -> list[str | None]:
    return [canonical(one) for one in smiles]


def canonical_set(smiles: Iterable[str], pool: WorkerPool | None = None) -> frozenset[str]:
    """A set to look novelty up in: SMILES of any form made canonical; what cannot be read is left out."""
    every = list(smiles)
    chunks = [every[start : start + SMILES_AT_ONCE] for start in range(0, len(every), SMILES_AT_ONCE)]
    found: set[str] = set()
    for chunk in (pool or shared_pool()).map(_canonical_all, chunks, SECONDS_OF_SMILES):
        if isinstance(chunk, Lost):
            raise RuntimeError(f"SMILES could not be made canonical: the worker {chunk.detail}")
        found.update(one for one in chunk if one is not None)
    return frozenset(found)


def uniqueness(smiles: Sequence[str]) -> float:
    """Share of distinct ones among the canonical SMILES of valid molecules; NaN if there are none."""
    return len(set(smiles)) / len(smiles) if smiles else math.nan


def novelty(smiles: Iterable[str], known: frozenset[str]) -> float:
    """Share of the distinct canonical SMILES that are not in ``known``; NaN if there are none.

    Args:
        known: of :func:`canonical_set`.
    """
    distinct = set(smiles)
    return len(distinct - known) / len(distinct) if distinct else math.nan
