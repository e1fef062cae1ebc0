"""What is reported of a set of generated molecules, as one flat dictionary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike

from flowtilt.domains.molecules.chemistry import Invalid, Structure, novelty, uniqueness
from flowtilt.domains.molecules.relaxation import Relaxed
from flowtilt.domains.molecules.xtb import Failure, Molecule
from flowtilt.metrics.tails import upper_tail_mean

BEST_SHARES = {"best_10_percent": 0.1, "best_0.2_percent": 0.002}
"""Upper tails of the reward that are reported, by the names of their means."""

FEW = 1000
"""Valid molecules whose uniqueness is reported too: that of many falls with the size of their space."""


@dataclass(frozen=True)
class Composition:
    """What a set of molecules is made of.

    Attributes:
        atoms: share of all atoms by atomic number.
        sizes: share of all molecules by number of atoms.
        heavy_atoms: mean number of atoms that are not hydrogen, of a molecule.
        atomic_number: mean over all atoms.
    """

    atoms: Mapping[int, float]
    sizes: Mapping[int, float]
    heavy_atoms: float
    atomic_number: float


def composition(molecules: Sequence[Molecule]) -> Composition:
    """The composition of a set of molecules. Raises ValueError if there is no atom in it."""
    numbers = [molecule.numbers for molecule in molecules]
    every = np.concatenate(numbers) if numbers else np.array([], dtype=int)
    if not every.size:
        raise ValueError("a composition needs at least one atom")
    return Composition(
        _shares(every.tolist()),
        _shares([len(z) for z in numbers]),
        float(np.mean([(z > 1).sum() for z in numbers])),
        float(every.mean()),
    )


def _shares(values: Sequence[int]) -> dict[int, float]:
    return {value: count / len(values) for value, count in sorted(Counter(values).items())}


def total_variation(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Total variation distance of two distributions, in [0, 1]. Raises ValueError if one is none: empty,
    negative, or not summing to one."""
    for shares in (first, second):
        if not (abs(sum(shares.values()) - 1) < 1e-6 and min(shares.values()) >= 0):
            raise ValueError("a total variation distance needs shares that sum to one")
    return 0.5 * sum(abs(first.get(k, 0.0) - second.get(k, 0.0)) for k in first.keys() | second.keys())


def assess(
    molecules: Sequence[Molecule],
    rewards: np.ndarray,
    failures: Sequence[Failure | None],
    structures: Sequence[Structure],
    known: frozenset[str],
    reference: Composition,
) -> dict[str, float]:
    """Metrics of a set of molecules.

    Energies are in hartree. A mean over no molecule is NaN, which the counts beside it explain.

    Args:
        rewards: minus their energies, (molecules,), NaN where the calculation failed.
        failures: why, or None, for each.
        structures: their structures, valid or not.

    Returns:
        ``molecules``; ``reward_*`` over all converged molecules and ``valid_reward_*`` over the valid
        ones among them, each a mean, tail means and how many they are of; ``energy_per_atom``, the mean
        over converged molecules; ``converged``, ``validity``, ``uniqueness``, that of the first
        :data:`FEW` valid ones, and ``novelty``, shares;
        ``failed_*`` and ``invalid_*``, counts by reason; and the drift of the composition.

    Raises:
        ValueError: if the arguments are of different lengths, or a reward and its failure disagree.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    lengths = {len(molecules), len(rewards), len(failures), len(structures)}
    if len(lengths) > 1 or not molecules:
        raise ValueError(f"expected one of each for every molecule, and at least one, got {sorted(lengths)}")
    converged = np.isfinite(rewards)
    if any(bool(ok) is (failure is not None) for ok, failure in zip(converged, failures, strict=True)):
        raise ValueError("a molecule must have either a finite reward or a failure")
    if any(ok and not len(molecule.numbers) for ok, molecule in zip(converged, molecules, strict=True)):
        raise ValueError("a molecule without atoms has a reward; it must have a failure")
    valid = np.array([structure.invalid is None for structure in structures])
    smiles = [s.smiles for s in structures if s.smiles is not None]
    per_atom = [
        -reward / len(molecule.numbers)
        for reward, molecule in zip(rewards, molecules, strict=True)
        if np.isfinite(reward)
    ]
    return {
        "molecules": float(len(molecules)),
        **_tails("reward", rewards[converged]),
        **_tails("valid_reward", rewards[converged & valid]),
        "energy_per_atom": _mean(per_atom),
        "converged": float(converged.mean()),
        "validity": float(valid.mean()),
        "uniqueness": uniqueness(smiles),
        f"uniqueness_of_{FEW}": uniqueness(smiles[:FEW]),
        "novelty": novelty(smiles, known),
        **_counts("failed", failures, Failure),
        **_counts("invalid", [structure.invalid for structure in structures], Invalid),
        **drift(molecules, reference),
    }


def _tails(name: str, rewards: np.ndarray) -> dict[str, float]:
    tails = {
        f"{name}_{tail}": upper_tail_mean(rewards, share) if rewards.size else math.nan
        for tail, share in BEST_SHARES.items()
    }
    return {f"{name}_molecules": float(rewards.size), f"{name}_mean": _mean(rewards), **tails}


def _counts(
    name: str, found: Sequence[StrEnum | None], reasons: type[Failure] | type[Invalid]
) -> dict[str, float]:
    """Of every reason, but of unknown elements where there are some: models draw none, users' files may."""
    counts = Counter(found)
    told = [reason for reason in reasons if reason.name != "ELEMENT" or counts[reason]]
    return {f"{name}_{reason.name.lower()}": float(counts[reason]) for reason in told}


def drift(molecules: Sequence[Molecule], reference: Composition) -> dict[str, float]:
    """How the composition of molecules differs from that of a reference.

    Returns:
        total variation distances of the shares of elements and of sizes, the means of heavy atoms a
        molecule and of atomic numbers, and what the reference has instead.

    Raises:
        ValueError: if there is no atom in the molecules.
    """
    own = composition(molecules)
    return {
        "elements_total_variation": total_variation(own.atoms, reference.atoms),
        "sizes_total_variation": total_variation(own.sizes, reference.sizes),
        "heavy_atoms": own.heavy_atoms,
        "heavy_atoms_reference": reference.heavy_atoms,
        "atomic_number": own.atomic_number,
        "atomic_number_reference": reference.atomic_number,
    }


def assess_relaxation(relaxed: Sequence[Relaxed]) -> dict[str, float]:
    """Metrics of relaxations: how much energy molecules have above the minimum that they relax to.

    Returns:
        ``relaxed_molecules``, how many were tried; ``relaxed_converged``, the share that reached a
        minimum; mean and median of ``relaxation_energy`` over these, in hartree, NaN if there are none.
    """
    gains = [one.gain for one in relaxed if one.converged]
    return {
        "relaxed_molecules": float(len(relaxed)),
        "relaxed_converged": len(gains) / len(relaxed) if relaxed else math.nan,
        "relaxation_energy_mean": _mean(gains),
        "relaxation_energy_median": float(np.median(gains)) if gains else math.nan,
    }


def _mean(values: ArrayLike) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else math.nan
