"""One molecule's energy and gradient by GFN1-xTB (Grimme, Bannwarth, Shushkov 2017) with tblite.

Runs in worker processes, so it imports neither torch nor, until it is used, tblite. Coordinates are in
ångström, energies in hartree, gradients in hartree/ångström; tblite itself works in bohr.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

BOHR = 0.529177210903
"""Ångström (CODATA 2018)."""

METHOD = "GFN1-xTB"

VALENCE_ELECTRONS = {1: 1, 6: 4, 7: 5, 8: 6, 9: 7}
"""By atomic number, as the method counts them; its keys are the elements that are supported, QM9's."""

HEAVIEST = 118
"""Atomic number of the last element that is known."""

COVALENT_RADII = {1: 0.31, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57}
"""Ångström, by atomic number (Cordero et al. 2008)."""


class Failure(StrEnum):
    """Why a molecule has no energy; the value is the sentence for people, the name the key of counts."""

    NO_ATOMS = "no atoms"
    ELEMENT = "element that is not supported"
    NOT_FINITE = "coordinates that are not finite"
    TOO_CLOSE = "atoms too close"
    ELECTRONS = "charge or spin that the method cannot treat"
    NOT_CONVERGED = "self-consistent field not converged"
    OUT_OF_RANGE = "energy outside of the possible range"
    SOLVER = "error of the solver"
    TIME = "time limit"
    CRASHED = "crash of the solver"


@dataclass(frozen=True)
class XTBSettings:
    """How energies are computed, and which are believed.

    Attributes:
        charge: of every molecule, in elementary charges.
        unpaired: number of unpaired electrons. By default as few as possible: none if the number of
            electrons is even, one if it is odd (a doublet), which is also what the program ``xtb`` takes.
        max_iterations: of the self-consistent field; 250 is the method's usual limit.
        closeness: smallest distance of two atoms over the sum of their covalent radii. In QM9 it is at
            least 0.78; below a half, energies are those of a wall that no molecule was fitted to.
        binding: bounds, in hartree an atom, on the energy above that of the separated neutral atoms, and
            one hartree a molecule more either way for each charge. A self-consistent field that
            diverges can report energies like -1e7 hartree. In QM9 they are from -0.33 to -0.18 (4,605
            molecules), in distorted molecules and random atoms that pass ``closeness`` up to 0.92.
        seconds: processor time that one molecule may take; it takes milliseconds.
    """

    charge: int = 0
    unpaired: int | None = None
    max_iterations: int = 250
    closeness: float = 0.5
    binding: tuple[float, float] = (-0.5, 1.0)
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.unpaired is not None and self.unpaired < 0:
            raise ValueError(f"unpaired electrons cannot be fewer than none, got unpaired={self.unpaired}")
        if self.max_iterations < 1 or not self.seconds > 0 or not self.closeness >= 0:
            raise ValueError(
                "max_iterations and seconds must be positive and closeness not negative, got "
                f"{self.max_iterations}, {self.seconds} and {self.closeness}"
            )
        if not self.binding[0] < self.binding[1]:
            raise ValueError(f"the bounds of binding must be in order, got {self.binding}")


class Molecule(NamedTuple):
    """Atomic numbers, (atoms,) of int, and coordinates in ångström, (atoms, 3) of float64."""

    numbers: np.ndarray
    coordinates: np.ndarray


class Point(NamedTuple):
    """A molecule's energy in hartree and gradient in hartree/ångström, (atoms, 3), or why it has none.

    If there is a ``failure`` the energy is NaN and the gradient zero; ``detail`` is the solver's message.
    """

    energy: float
    gradient: np.ndarray
    failure: Failure | None = None
    detail: str = ""


def failed(atoms: int, failure: Failure, detail: str = "") -> Point:
    """The point of a molecule that has no energy."""
    return Point(math.nan, np.zeros((atoms, 3)), failure, detail)


def single_point(task: tuple[Molecule, XTBSettings]) -> Point:
    """Energy and gradient of one molecule. Raises ImportError if tblite is not installed."""
    molecule, settings = task
    if problem := _unfit(molecule, settings):
        return failed(len(molecule.numbers), problem)
    unpaired = unpaired_electrons(molecule.numbers, settings)
    if unpaired is None:
        return failed(len(molecule.numbers), Failure.ELECTRONS)
    point = solve(molecule, settings.charge, unpaired, settings.max_iterations)
    if point.failure:
        return point
    low, high = possible_energies(molecule.numbers, settings)
    if not low <= point.energy <= high:
        detail = f"{point.energy} hartree, not from {low} to {high}"
        return failed(len(molecule.numbers), Failure.OUT_OF_RANGE, detail)
    if not np.isfinite(point.gradient).all():
        return failed(len(molecule.numbers), Failure.SOLVER, "the gradient is not finite")
    return point


def unpaired_electrons(numbers: np.ndarray, settings: XTBSettings) -> int | None:
    """Unpaired electrons of a molecule, or None if charge and spin do not fit its electrons. This and the
    functions below raise a ValueError for an element that is not supported."""
    check_elements(numbers)
    electrons = sum(VALENCE_ELECTRONS[int(z)] for z in numbers) - settings.charge
    unpaired = electrons % 2 if settings.unpaired is None else settings.unpaired
    fits = electrons >= max(1, unpaired) and (electrons - unpaired) % 2 == 0
    return unpaired if fits else None


def _unfit(molecule: Molecule, settings: XTBSettings) -> Failure | None:
    """What forbids a calculation from the geometry alone."""
    numbers, x = molecule
    if len(numbers) == 0:
        return Failure.NO_ATOMS
    if not supported(numbers):
        return Failure.ELEMENT
    if not np.isfinite(x).all():
        return Failure.NOT_FINITE
    return Failure.TOO_CLOSE if closest(molecule) < settings.closeness else None


def supported(numbers: np.ndarray) -> bool:
    """Whether all elements are among those of :data:`VALENCE_ELECTRONS`."""
    return all(int(z) in VALENCE_ELECTRONS for z in numbers)


def check_elements(numbers: np.ndarray) -> None:
    """Refuse elements that are not supported. Raises ValueError, naming them."""
    if not supported(numbers):
        unknown = sorted({int(z) for z in numbers} - VALENCE_ELECTRONS.keys())
        raise ValueError(f"elements {unknown} are not supported, only {sorted(VALENCE_ELECTRONS)}")


def closest(molecule: Molecule) -> float:
    """Smallest distance of two atoms over the sum of their covalent radii; infinite for one atom."""
    numbers, x = molecule
    check_elements(numbers)
    if not np.isfinite(x).all():
        raise ValueError("distances need finite coordinates")
    radii = np.array([COVALENT_RADII[int(z)] for z in numbers])
    first, second = np.triu_indices(len(numbers), k=1)
    distances = np.linalg.norm(x[first] - x[second], axis=1)
    return float((distances / (radii[first] + radii[second])).min(initial=np.inf))


def possible_energies(numbers: np.ndarray, settings: XTBSettings) -> tuple[float, float]:
    """Bounds in hartree on the energy of a molecule, from its atoms; see :class:`XTBSettings`."""
    check_elements(numbers)
    atoms = sum(atomic_energy(int(z)) for z in numbers)
    low, high = (len(numbers) * bound for bound in settings.binding)
    return atoms + low - abs(settings.charge), atoms + high + abs(settings.charge)


@functools.cache
def atomic_energy(number: int) -> float:
    """Energy in hartree of a single neutral atom with as few unpaired electrons as possible."""
    check_elements(np.array([number]))
    atom = Molecule(np.array([number]), np.zeros((1, 3)))
    return solve(atom, 0, VALENCE_ELECTRONS[number] % 2, 250).energy


def solve(molecule: Molecule, charge: int, unpaired: int, max_iterations: int) -> Point:
    """Energy and gradient as tblite reports them, without any check of the molecule or the result."""
    from tblite.exceptions import TBLiteRuntimeError, TBLiteValueError
    from tblite.interface import Calculator

    numbers, x = molecule
    try:
        calculator = Calculator(METHOD, np.asarray(numbers), x / BOHR, charge=float(charge), uhf=unpaired)
        calculator.set("verbosity", 0)
        calculator.set("max-iter", max_iterations)
        result: Any = calculator.singlepoint()
        return Point(float(result["energy"]), np.asarray(result["gradient"]) / BOHR)
    except (TBLiteRuntimeError, TBLiteValueError) as error:
        message = str(error)
        kind = Failure.NOT_CONVERGED if "not converged" in message else Failure.SOLVER
        return failed(len(numbers), kind, message)
