"""Relaxation of geometries to a nearby minimum of the GFN1-xTB energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flowtilt.domains.molecules.workers import Lost, WorkerPool, shared_pool
from flowtilt.domains.molecules.xtb import BOHR, Failure, Molecule, Point, XTBSettings, single_point

SHORTEST = 0.01
"""Radius in ångström at which a relaxation that keeps running into failing geometries gives up."""


@dataclass(frozen=True)
class RelaxationSettings:
    """When a geometry counts as relaxed, and how long to try.

    Attributes:
        gradient: largest component of the gradient at a minimum, in hartree/bohr.
        evaluations: largest number of energies with gradients.
        radius: how far a coordinate may go in one run of the optimiser, in ångström. It starts again
            from there, and with a third of the radius where it met a geometry without an energy.
        seconds: processor time that one molecule may take; it takes about a second.
    """

    gradient: float = 5e-4
    evaluations: int = 1000
    radius: float = 0.3
    seconds: float = 120.0
    xtb: XTBSettings = field(default_factory=XTBSettings)

    def __post_init__(self) -> None:
        if not all(value > 0 for value in (self.gradient, self.evaluations, self.radius, self.seconds)):
            raise ValueError(f"every setting of a relaxation must be positive, got {self}")


class Relaxed(NamedTuple):
    """A relaxation's outcome.

    Attributes:
        gain: initial minus final energy, in hartree; NaN if there is no initial energy.
        coordinates: of the lowest energy found, ångström, (atoms, 3).
        converged: whether these are a minimum to the tolerance of the settings.
        failure: why there is no initial energy, or None.
    """

    gain: float
    coordinates: np.ndarray
    converged: bool
    evaluations: int
    failure: Failure | None = None


def relax(
    molecules: Sequence[Molecule], settings: RelaxationSettings | None = None, pool: WorkerPool | None = None
) -> list[Relaxed]:
    """Relax molecules in worker processes.

    Args:
        molecules: as :func:`flowtilt.domains.molecules.energies.molecules_of` gives them.
        pool: of workers; by default one shared by this process, with a worker for each processor.

    Raises:
        MissingExtra: if tblite is not installed.
    """
    settings = settings or RelaxationSettings()
    tasks = [(molecule, settings) for molecule in molecules]
    results = (pool or shared_pool()).map(relax_one, tasks, settings.seconds)
    found = []
    for molecule, result in zip(molecules, results, strict=True):
        if isinstance(result, Lost):
            reason = Failure.TIME if result.timed_out else Failure.CRASHED
            result = Relaxed(math.nan, molecule.coordinates, False, 0, reason)
        found.append(result)
    return found


class _Stopped(Exception):
    """Ends the optimiser from inside of the function that it minimises."""


class _Energy:
    """The energy as the optimiser sees it, of flat coordinates in bohr; keeps the lowest point."""

    def __init__(self, molecule: Molecule, settings: RelaxationSettings) -> None:
        self.numbers, self.coordinates = molecule
        self.settings = settings
        self.evaluations = 0
        self.lowest = self.at(self.coordinates)

    def at(self, coordinates: np.ndarray) -> Point:
        self.evaluations += 1
        return single_point((Molecule(self.numbers, coordinates), self.settings.xtb))

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        coordinates = flat.reshape(-1, 3) * BOHR
        if self.exhausted or (point := self.at(coordinates)).failure:
            raise _Stopped
        if point.energy < self.lowest.energy:
            self.lowest, self.coordinates = point, coordinates.copy()
        return point.energy, point.gradient.ravel() * BOHR

    @property
    def exhausted(self) -> bool:
        return self.evaluations >= self.settings.evaluations

    @property
    def converged(self) -> bool:
        return float(np.abs(self.lowest.gradient).max()) * BOHR <= self.settings.gradient


def relax_one(task: tuple[Molecule, RelaxationSettings]) -> Relaxed:
    """Relax one molecule, in this process. Each run of the optimiser, L-BFGS-B, stays in a box: a step into
    atoms that collide has no energy, and its first step from a steep start would be a long one."""
    from scipy.optimize import minimize

    molecule, settings = task
    energy = _Energy(molecule, settings)
    start = energy.lowest
    if start.failure:
        return Relaxed(math.nan, molecule.coordinates, False, energy.evaluations, start.failure)
    radius = settings.radius
    while not (energy.converged or energy.exhausted or radius < SHORTEST):
        before = energy.lowest.energy
        centre = energy.coordinates.ravel() / BOHR
        box = np.stack([centre - radius / BOHR, centre + radius / BOHR], axis=1)
        options = {"gtol": settings.gradient, "ftol": 0.0, "maxcor": 20, "maxiter": settings.evaluations}
        try:
            minimize(energy, centre, jac=True, method="L-BFGS-B", bounds=box, options=options)
        except _Stopped:
            radius /= 3
        else:
            radius = settings.radius if energy.lowest.energy < before else radius / 3
    gain = start.energy - energy.lowest.energy
    return Relaxed(gain, energy.coordinates, energy.converged, energy.evaluations)
