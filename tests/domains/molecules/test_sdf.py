import sys

import numpy as np
import pytest

import xtb_program
from flowtilt.domains.molecules.chemistry import Invalid, PerceptionSettings, Structure, perceive_one
from flowtilt.domains.molecules.sdf import SdfError, describe, read_sdf, write_sdf
from flowtilt.domains.molecules.workers import MissingExtra
from flowtilt.domains.molecules.xtb import Failure, Molecule, Point, failed

Chem = pytest.importorskip("rdkit.Chem", reason="the extra 'molecules' is not installed")

CASES = xtb_program.stored()
MOLECULES = [Molecule(np.array(c.numbers), np.array(c.coordinates, dtype=float)) for c in CASES]
STRUCTURES = [perceive_one((molecule, PerceptionSettings())) for molecule in MOLECULES]
POINTS = [
    failed(len(c.numbers), Failure.NOT_CONVERGED) if c.energy is None else Point(c.energy, np.zeros(0))
    for c in CASES
]
PROPERTIES = [describe(point, structure) for point, structure in zip(POINTS, STRUCTURES, strict=True)]


def test_what_is_written_is_read_back(tmp_path):
    write_sdf(tmp_path / "molecules.sdf", MOLECULES, STRUCTURES, PROPERTIES)
    records = read_sdf(tmp_path / "molecules.sdf")
    assert len(records) == len(MOLECULES)
    assert {s.invalid is None for s in STRUCTURES} == {True, False}
    for record, molecule, structure, case in zip(records, MOLECULES, STRUCTURES, CASES, strict=True):
        np.testing.assert_array_equal(record.molecule.numbers, molecule.numbers)
        np.testing.assert_allclose(record.molecule.coordinates, molecule.coordinates, rtol=0, atol=1e-4)
        assert record.bonds == structure.bonds
        assert record.properties["method"] == "GFN1-xTB"
        assert record.properties.get("smiles") == structure.smiles
        if case.energy is None:
            assert record.properties["failure"] == "self-consistent field not converged"
            assert "energy_hartree" not in record.properties
        else:
            assert float(record.properties["energy_hartree"]) == case.energy


def test_others_read_the_same_structures(tmp_path):
    write_sdf(tmp_path / "molecules.sdf", MOLECULES, STRUCTURES, PROPERTIES)
    with Chem.SDMolSupplier(str(tmp_path / "molecules.sdf")) as supplier:  # sanitised, as most read it
        read = [mol and Chem.MolToSmiles(mol, isomericSmiles=False) for mol in supplier]
    expected = [structure.smiles for structure in STRUCTURES]
    assert [a for a, b in zip(read, expected, strict=True) if b] == [b for b in expected if b]


def test_a_valid_and_a_failed_molecule_are_described():
    valid = Structure("C", invalid=None)
    broken = Structure(None, invalid=Invalid.FRAGMENTS)
    assert describe(Point(-4.0, np.zeros(0)), valid) == {
        "method": "GFN1-xTB",
        "energy_hartree": -4.0,
        "smiles": "C",
    }
    assert describe(failed(2, Failure.TOO_CLOSE), broken) == {
        "method": "GFN1-xTB",
        "failure": "atoms too close",
        "invalid": "more than one fragment",
    }


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e5])
def test_coordinates_that_the_format_cannot_hold_leave_no_file(tmp_path, wrong):
    path = tmp_path / "molecules.sdf"
    bad = MOLECULES[1]._replace(coordinates=MOLECULES[1].coordinates + wrong)
    with pytest.raises(SdfError, match="molecule 1 has coordinates that are not finite or exceed"):
        write_sdf(path, [MOLECULES[0], bad], STRUCTURES[:2], PROPERTIES[:2])
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_survives_a_failure(tmp_path):
    path = tmp_path / "molecules.sdf"
    write_sdf(path, MOLECULES[:2], STRUCTURES[:2], PROPERTIES[:2])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_sdf(path, MOLECULES[:3], STRUCTURES[:2], PROPERTIES[:2])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_missing_or_cut_off_is_named(tmp_path):
    path = tmp_path / "molecules.sdf"
    with pytest.raises(SdfError, match=r"molecules\.sdf: no such file"):
        read_sdf(path)
    write_sdf(path, MOLECULES[:3], STRUCTURES[:3], PROPERTIES[:3])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(SdfError, match=r"molecules\.sdf: not whole, it does not end in \$\$\$\$; delete"):
        read_sdf(path)
    path.write_text("".join(lines[: len(lines) // 2] + lines[-1:]))
    with pytest.raises(SdfError, match=r"molecules\.sdf: molecule \d cannot be read"):
        read_sdf(path)


def test_no_molecules_make_an_empty_file(tmp_path):
    write_sdf(tmp_path / "none.sdf", [], [], [])
    assert read_sdf(tmp_path / "none.sdf") == []


def test_without_rdkit_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(MissingExtra, match=r"flowtilt\[molecules\]"):
        read_sdf(tmp_path / "molecules.sdf")
