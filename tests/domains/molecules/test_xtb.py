import math
from dataclasses import replace

import numpy as np
import pytest

import xtb_program
from flowtilt.domains.molecules.xtb import (
    BOHR,
    COVALENT_RADII,
    VALENCE_ELECTRONS,
    Failure,
    Molecule,
    Point,
    XTBSettings,
    atomic_energy,
    closest,
    possible_energies,
    single_point,
    solve,
    unpaired_electrons,
)

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")

CASES = xtb_program.stored()
CONVERGED = [case for case in CASES if case.energy is not None]
WATER = Molecule(np.array([8, 1, 1]), np.array(xtb_program.WATER))


def by_name(name):
    return next(case for case in CASES if case.name == name)


def point(case, **settings):
    molecule = Molecule(np.array(case.numbers), np.array(case.coordinates, dtype=float))
    return single_point((molecule, XTBSettings(charge=case.charge, unpaired=case.unpaired, **settings)))


@pytest.mark.parametrize("case", CONVERGED, ids=lambda case: case.name)
def test_energies_are_those_of_the_independent_program(case):
    assert point(case).energy == pytest.approx(case.energy, abs=1e-6)


@pytest.mark.skipif(not xtb_program.installed(), reason="the program xtb is not installed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stored_energies_are_what_the_program_says(case):
    if case.energy is None:
        assert xtb_program.energy(case) is None
    else:
        assert xtb_program.energy(case) == pytest.approx(case.energy, abs=1e-9)


@pytest.mark.parametrize(
    "name", ["QM9 3", "QM9 829", "QM9 21968", "distorted methane", "methyl radical", "ammonium"]
)
def test_gradients_are_central_differences(name):
    case = by_name(name)
    x = np.array(case.coordinates, dtype=float)
    step = 1e-3 * BOHR
    numeric = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        ahead, behind = (point(replace(case, coordinates=x + s)).energy for s in (shift, -shift))
        numeric[index] = (ahead - behind) / (2 * step)
    in_bohr = (point(case).gradient - numeric) * BOHR
    assert np.abs(in_bohr).max() < 1e-5


def test_nothing_depends_on_where_a_molecule_is_or_how_it_is_turned():
    case = by_name("QM9 211")
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    here = point(case)
    there = point(replace(case, coordinates=np.array(case.coordinates) @ rotation.T + [3.0, -2.0, 1.0]))
    assert there.energy == pytest.approx(here.energy, abs=1e-8)
    np.testing.assert_allclose(there.gradient, here.gradient @ rotation.T, atol=1e-6)
    np.testing.assert_allclose(here.gradient.sum(0), 0, atol=1e-8)


FAILURES = {
    "no atoms": (Molecule(np.array([], dtype=int), np.zeros((0, 3))), {}, Failure.NO_ATOMS),
    "not a number": (WATER._replace(coordinates=WATER.coordinates * np.nan), {}, Failure.NOT_FINITE),
    "infinite": (WATER._replace(coordinates=np.full((3, 3), np.inf)), {}, Failure.NOT_FINITE),
    "collapsed": (WATER._replace(coordinates=WATER.coordinates * 0.0), {}, Failure.TOO_CLOSE),
    "colliding": (WATER._replace(coordinates=WATER.coordinates * 0.49), {}, Failure.TOO_CLOSE),
    "even electrons, one unpaired": (WATER, {"unpaired": 1}, Failure.ELECTRONS),
    "odd electrons, none unpaired": (WATER, {"charge": 1, "unpaired": 0}, Failure.ELECTRONS),
    "more unpaired than there are": (WATER, {"unpaired": 10}, Failure.ELECTRONS),
    "no electrons left": (WATER, {"charge": 8}, Failure.ELECTRONS),
    "below no electrons": (WATER, {"charge": 9}, Failure.ELECTRONS),
    "too few iterations": (WATER, {"max_iterations": 2}, Failure.NOT_CONVERGED),
    "too high": (WATER, {"binding": (-0.6, -0.3)}, Failure.OUT_OF_RANGE),
    "too low": (WATER, {"binding": (-0.1, 1.0)}, Failure.OUT_OF_RANGE),
}


@pytest.mark.parametrize(("molecule", "settings", "failure"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_have_a_reason_no_energy_and_no_gradient(molecule, settings, failure):
    energy, gradient, found, _ = single_point((molecule, XTBSettings(**settings)))
    assert found is failure
    assert math.isnan(energy)
    np.testing.assert_array_equal(gradient, np.zeros((len(molecule.numbers), 3)))


def test_scattered_atoms_do_not_converge_here_as_in_the_program():
    case = by_name("scattered atoms")
    assert case.energy is None
    found = point(case)
    assert found.failure is Failure.NOT_CONVERGED
    assert "not converged in 250 cycles" in found.detail


def test_a_divergence_reported_as_converged_is_refused(monkeypatch):
    wild = Point(-1e7, np.ones((3, 3)))
    monkeypatch.setattr("flowtilt.domains.molecules.xtb.solve", lambda *_: wild)
    bounds = (-20.0, 0.0)
    monkeypatch.setattr("flowtilt.domains.molecules.xtb.possible_energies", lambda *_: bounds)
    found = single_point((WATER, XTBSettings()))
    assert found.failure is Failure.OUT_OF_RANGE
    assert found.detail == "-10000000.0 hartree, not from -20.0 to 0.0"
    assert not found.gradient.any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(monkeypatch, wrong):
    right = single_point((WATER, XTBSettings()))
    atomic_energy(1), atomic_energy(8)  # before the solver is replaced
    bad = right._replace(gradient=np.full((3, 3), wrong))
    monkeypatch.setattr("flowtilt.domains.molecules.xtb.solve", lambda *_: bad)
    assert single_point((WATER, XTBSettings())).failure is Failure.SOLVER


def test_an_error_of_the_solver_is_a_failure_with_its_message():
    found = solve(WATER, 0, 1, 250)
    assert found.failure is Failure.SOLVER
    assert "not compatible" in found.detail


@pytest.mark.parametrize("case", CONVERGED, ids=lambda case: case.name)
def test_stored_energies_are_well_inside_of_the_possible_range(case):
    numbers = np.array(case.numbers)
    low, high = possible_energies(numbers, XTBSettings(charge=case.charge))
    slack = 0.1 * len(numbers)
    assert low + slack < case.energy < high - slack


def test_the_range_follows_from_the_atoms():
    low, high = possible_energies(np.array([8, 1, 1]), XTBSettings(charge=-2))
    atoms = atomic_energy(8) + 2 * atomic_energy(1)
    assert (low, high) == (pytest.approx(atoms - 3 * 0.5 - 2), pytest.approx(atoms + 3 * 1.0 + 2))


def test_open_shells_are_doublets_unless_told():
    assert unpaired_electrons(np.array([8, 1, 1]), XTBSettings()) == 0
    assert unpaired_electrons(np.array([8, 1]), XTBSettings()) == 1
    assert unpaired_electrons(np.array([8, 1]), XTBSettings(charge=-1)) == 0
    assert unpaired_electrons(np.array([8, 8]), XTBSettings(unpaired=2)) == 2
    triplet, singlet = (by_name(f"{name} oxygen") for name in ("triplet", "singlet"))
    assert triplet.energy != pytest.approx(singlet.energy, abs=1e-3)  # so the choice is seen


def test_distances_are_measured_in_covalent_radii():
    far = Molecule(np.array([6, 1, 8]), np.array([[0, 0, 0], [0, 0, 1.07], [9.0, 0, 0]]))
    assert closest(far) == pytest.approx(1.07 / (0.76 + 0.31))
    assert closest(Molecule(np.array([6]), np.zeros((1, 3)))) == math.inf
    assert COVALENT_RADII.keys() == VALENCE_ELECTRONS.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unpaired": -1}, "unpaired=-1"),
        ({"max_iterations": 0}, "must be positive"),
        ({"seconds": 0.0}, "must be positive"),
        ({"closeness": -0.1}, "closeness not negative"),
        ({"closeness": math.nan}, "closeness not negative"),
        ({"binding": (1.0, -0.5)}, "in order"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        XTBSettings(**settings)
