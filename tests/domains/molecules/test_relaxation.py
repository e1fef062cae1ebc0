import math

import numpy as np
import pytest

import xtb_program
from flowtilt.domains.molecules.relaxation import RelaxationSettings, relax, relax_one
from flowtilt.domains.molecules.workers import WorkerPool
from flowtilt.domains.molecules.xtb import BOHR, Failure, Molecule, XTBSettings, single_point

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")

CASES = {case.name: case for case in xtb_program.stored()}


def molecule(name, noise=0.0):
    case = CASES[name]
    shift = noise * np.random.default_rng(0).standard_normal((len(case.numbers), 3))
    return Molecule(np.array(case.numbers), np.array(case.coordinates, dtype=float) + shift)


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("name", ["QM9 3", "QM9 8", "QM9 211", "QM9 106"])
def test_relaxed_geometries_are_minima_below_their_start(name, noise):
    start = molecule(name, noise)
    found = relax_one((start, RelaxationSettings()))
    first = single_point((start, XTBSettings()))
    last = single_point((start._replace(coordinates=found.coordinates), XTBSettings()))
    assert found.converged
    assert found.failure is None
    assert found.gain == pytest.approx(first.energy - last.energy, abs=1e-9)
    assert found.gain > 0
    assert np.abs(last.gradient).max() * BOHR <= 5e-4


def test_a_distorted_molecule_relaxes_to_the_same_energy():
    near, far = (
        relax_one((molecule("QM9 1", noise), RelaxationSettings(gradient=1e-5))) for noise in (0, 0.2)
    )
    energies = [
        single_point((molecule("QM9 1")._replace(coordinates=found.coordinates), XTBSettings())).energy
        for found in (near, far)
    ]
    assert energies[0] == pytest.approx(energies[1], abs=1e-6)
    assert far.gain > near.gain


def test_the_minimum_of_a_diatomic_is_that_of_a_scan():
    """The bond length of nitrogen from a relaxation and from energies on a grid."""
    found = relax_one((molecule("stretched nitrogen"), RelaxationSettings(gradient=1e-6)))
    length = np.linalg.norm(found.coordinates[0] - found.coordinates[1])
    lengths = np.linspace(1.05, 1.15, 41)
    energies = [
        single_point((Molecule(np.array([7, 7]), np.array([[0, 0, 0], [0, 0, r]])), XTBSettings())).energy
        for r in lengths
    ]
    parabola = np.polynomial.Polynomial.fit(lengths, energies, 4)
    inside = [root.real for root in parabola.deriv().roots() if abs(root.imag) < 1e-9]
    assert min(abs(length - root) for root in inside) < 1e-4


def test_a_relaxation_that_meets_colliding_atoms_goes_on_with_shorter_steps():
    settings = RelaxationSettings(radius=3.0, xtb=XTBSettings(closeness=0.75))
    found = relax_one((molecule("stretched nitrogen"), settings))
    assert found.converged


def test_too_few_evaluations_do_not_converge_and_keep_the_best():
    start = molecule("QM9 211", 0.1)
    found = relax_one((start, RelaxationSettings(evaluations=5)))
    assert not found.converged
    assert found.evaluations == 5
    assert found.failure is None
    assert found.gain > 0


def test_a_start_without_an_energy_is_a_failure():
    collapsed = molecule("QM9 1")._replace(coordinates=np.zeros((5, 3)))
    found = relax_one((collapsed, RelaxationSettings()))
    assert found.failure is Failure.TOO_CLOSE
    assert math.isnan(found.gain)
    assert not found.converged


@pytest.mark.slow
def test_relaxations_run_in_the_pool_as_they_do_here():
    molecules = [molecule("QM9 3", 0.1), molecule("QM9 211", 0.1), molecule("QM9 1", 0.1)]
    alone = [relax_one((one, RelaxationSettings())) for one in molecules]
    with WorkerPool(2) as pool:
        together = relax(molecules, pool=pool)
    assert [found.gain for found in together] == [found.gain for found in alone]


def test_a_relaxation_that_takes_too_long_is_lost():
    with WorkerPool(1) as pool:
        (found,) = relax([molecule("QM9 7201", 0.2)], RelaxationSettings(seconds=0.05), pool)
    assert found.failure is Failure.TIME
    assert math.isnan(found.gain)
    assert not found.converged


@pytest.mark.parametrize("key", ["gradient", "evaluations", "radius", "seconds"])
def test_settings_must_be_positive(key):
    with pytest.raises(ValueError, match=f"positive.*{key}=0"):
        RelaxationSettings(**{key: 0})
