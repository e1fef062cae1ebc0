"""Energies of batches of molecules by GFN1-xTB, and the reward that is minus the energy.

One rule for failures: a molecule without an energy has the energy NaN, the gradient zero and a reason,
which is counted. Nothing is put in its place: statistics leave it out and say how many they left out,
and it pulls a model in no direction.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from flowtilt.domains.molecules.chemistry import perceive
from flowtilt.domains.molecules.workers import Lost, WorkerPool, shared_pool
from flowtilt.domains.molecules.xtb import (
    HEAVIEST,
    Failure,
    Molecule,
    Point,
    XTBSettings,
    failed,
    single_point,
)
from flowtilt.model import Context
from flowtilt.rewards import Reward

log = logging.getLogger(__name__)


class Energies(NamedTuple):
    """Energies of a batch.

    Attributes:
        energy: hartree, float64, (batch,); NaN where the calculation failed.
        gradient: hartree/ångström, float64, (batch, atoms, 3); zero for padding and failures.
        failures: the reason, or None, of each molecule.
    """

    energy: np.ndarray
    gradient: np.ndarray
    failures: tuple[Failure | None, ...]

    def counts(self) -> Counter[Failure]:
        """How many molecules failed for each reason."""
        return Counter(failure for failure in self.failures if failure)


def molecules_of(coordinates: np.ndarray, numbers: np.ndarray) -> list[Molecule]:
    """The molecules of a padded batch, without their padding.

    Args:
        coordinates: ångström, (batch, atoms, 3).
        numbers: atomic numbers, (batch, atoms); zero where there is no atom.

    A molecule of an element that is not supported is one too: it has no energy, which is counted.

    Raises:
        ValueError: if the shapes do not belong together, or what is no atomic number is among them.
    """
    numbers, x = np.asarray(numbers), np.asarray(coordinates, dtype=np.float64)
    if numbers.ndim != 2 or x.shape != (*numbers.shape, 3):
        raise ValueError(
            f"expected atomic numbers (batch, atoms) and coordinates (batch, atoms, 3), "
            f"got {numbers.shape} and {x.shape}"
        )
    odd = [z for z in np.unique(numbers).tolist() if z not in range(HEAVIEST + 1)]
    if odd:
        raise ValueError(f"{odd} are not atomic numbers, which go from 1 to {HEAVIEST}, and 0 for padding")
    return [Molecule(z[z > 0].astype(np.int32), r[z > 0]) for z, r in zip(numbers, x, strict=True)]


def evaluate(
    coordinates: np.ndarray,
    numbers: np.ndarray,
    settings: XTBSettings | None = None,
    pool: WorkerPool | None = None,
) -> Energies:
    """Energies and gradients of a batch, computed in worker processes.

    Args:
        coordinates: ångström, (batch, atoms, 3).
        numbers: atomic numbers, (batch, atoms); zero where there is no atom.
        pool: of workers; by default one shared by this process, with a worker for each processor.

    Raises:
        ValueError: if the arrays are not such a batch; see :func:`molecules_of`.
        MissingExtra: if tblite is not installed.
    """
    settings = settings or XTBSettings()
    molecules = molecules_of(coordinates, numbers)
    points = single_points(molecules, settings, pool)
    gradient = np.zeros((*np.shape(numbers), 3))
    for own, z, point in zip(gradient, np.asarray(numbers), points, strict=True):
        own[z > 0] = point.gradient
    failures = tuple(point.failure for point in points)
    return Energies(np.array([point.energy for point in points]), gradient, failures)


def single_points(
    molecules: Sequence[Molecule], settings: XTBSettings, pool: WorkerPool | None = None
) -> list[Point]:
    """Energies and gradients of molecules of any sizes; see :func:`evaluate`."""
    tasks = [(molecule, settings) for molecule in molecules]
    results = (pool or shared_pool()).map(single_point, tasks, settings.seconds)
    points = []
    for molecule, result in zip(molecules, results, strict=True):
        if isinstance(result, Lost):
            reason = Failure.TIME if result.timed_out else Failure.CRASHED
            result = failed(len(molecule.numbers), reason, result.detail)
        if result.failure:
            log.debug("no energy: %s %s", result.failure, result.detail)
        points.append(result)
    return points


class _Energy(torch.autograd.Function):
    """Energies whose gradient on the coordinates was computed with them."""

    @staticmethod
    def forward(ctx: FunctionCtx, coordinates: Tensor, energy: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return energy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_output[:, None, None] * gradient, None, None


def attach(coordinates: Tensor, computed: Energies) -> Tensor:
    """Computed energies as a differentiable function of the coordinates that they belong to, (batch,)."""
    values, gradient = (torch.from_numpy(a).to(coordinates) for a in (computed.energy, computed.gradient))
    return _Energy.apply(coordinates, values, gradient)


class Decoder(Protocol):
    """Turns states into molecules."""

    def __call__(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Coordinates in ångström, (batch, atoms, 3), differentiable in ``x``, and atomic numbers. The atomic
        numbers are of shape (batch, atoms), zero where there is no atom."""


TypeShares = Callable[[Tensor, Context], Tensor]
"""How much of each atom of states is of which element, (batch, atoms, elements), in the order of
:data:`flowtilt.domains.molecules.states.ELEMENTS`: linear in the states, and zero where there is no atom."""

StateEnergy = Callable[[Tensor, Context], Tensor]
"""An energy in hartree of states and their context, (batch,), differentiable in the states."""


class Invalidity(Reward):
    """1 for states that decode to no valid molecule, and 0 for others, in shares of molecules.

    Args:
        workers: processes to use; by default one for each processor.
    """

    differentiable = False

    def __init__(self, decode: Decoder, workers: int | None = None) -> None:
        self.decode = decode
        self._workers = workers
        self._latest: tuple[Tensor, Tensor] | None = None

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        """Those of the latest states are kept: a bank is asked for them more than once."""
        if self._latest is None or not (self._latest[0].shape == x.shape and self._latest[0].equal(x)):
            coordinates, numbers = (array.numpy(force=True) for array in self.decode(x, context))
            found = perceive(molecules_of(coordinates, numbers), pool=shared_pool(self._workers))
            invalid = [structure.invalid is not None for structure in found]
            self._latest = x.clone(), torch.tensor(invalid, dtype=x.dtype, device=x.device)
        return self._latest[1].clone()


class XTBReward(Reward):
    """Minus the GFN1-xTB total energy, in hartree, of the molecules that states decode to.

    Its gradient is the analytic one of the method through the decoder's coordinates. On atom types, which
    are discrete, it has none of its own. But a molecule's energy is that of its separated atoms and that of
    their binding, and the first is linear in the types: ``separated`` gives its gradient, and that of the
    binding is left out there. Values are those of the decoded molecules either way. It evaluates in float64
    and returns the type of the states.

    Args:
        workers: processes to use; by default one for each processor.
        separated: the energy of a state's separated atoms, whose gradient on the types is added; without it
            there is no gradient on them.
        failed_value: what a molecule without an energy has for a reward, in hartree, with the gradient zero;
            without it the evaluation has failed.

    Attributes:
        failures: how many of them failed, by reason.
    """

    def __init__(
        self,
        decode: Decoder,
        settings: XTBSettings | None = None,
        workers: int | None = None,
        separated: StateEnergy | None = None,
        failed_value: float | None = None,
    ) -> None:
        self.decode = decode
        self.failed_value, self.may_fail = failed_value, failed_value is None
        self.separated = separated
        self.settings = settings or XTBSettings()
        self.evaluated = 0
        self.failures: Counter[Failure] = Counter()
        self._workers = workers
        self._latest: dict[bytes, tuple[float, np.ndarray, Failure | None]] = {}

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        coordinates, numbers = self.decode(x, context)
        energies = attach(coordinates, self._computed(coordinates, numbers))
        if self.separated is not None:
            atoms = self.separated(x, context)
            energies = energies + (atoms - atoms.detach())
        if self.failed_value is not None:
            return (-energies).masked_fill(energies.isnan(), self.failed_value)
        return -energies

    def _computed(self, coordinates: Tensor, numbers: Tensor) -> Energies:
        """Energies of a batch; molecules of the last batch that had new ones are not computed again. A solver
        asks for the values of a pool of molecules, and then for the gradients of some of them."""
        positions, kinds = (array.numpy(force=True) for array in (coordinates, numbers))
        keys = [x.tobytes() + z.tobytes() for x, z in zip(positions, kinds, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._latest]
        if new:
            fresh = evaluate(positions[new], kinds[new], self.settings, shared_pool(self._workers))
            self._count(fresh)
            rows = dict(zip((keys[i] for i in new), zip(*fresh, strict=True), strict=True))
            self._latest = {key: rows.get(key) or self._latest[key] for key in keys}
        known = [self._latest[key] for key in keys]
        energies, gradients, failures = zip(*known, strict=True) if known else ((), (), ())
        return Energies(np.array(energies), np.array(gradients).reshape(*kinds.shape, 3), failures)

    def _count(self, computed: Energies) -> None:
        counts = computed.counts()
        self.evaluated += len(computed.energy)
        self.failures += counts
        if counts and counts.total() == len(computed.energy):
            reasons = ", ".join(f"{failure} ({count})" for failure, count in counts.most_common())
            log.warning("all %d molecules of a batch have no energy: %s", counts.total(), reasons)
