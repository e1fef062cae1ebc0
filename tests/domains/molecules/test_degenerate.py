"""Degenerate molecules, each alone and beside a good one: a counted failure or a clear refusal."""

import inspect
import math

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")
pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")

from flowtilt.domains.molecules import assessment, chemistry, data, energies, relaxation, sdf, xtb
from flowtilt.domains.molecules.assessment import (
    assess,
    assess_relaxation,
    composition,
    drift,
    total_variation,
)
from flowtilt.domains.molecules.chemistry import (
    Invalid,
    Structure,
    canonical,
    canonical_set,
    elements,
    novelty,
    perceive,
    perceive_one,
    uniqueness,
    without_bonds,
)
from flowtilt.domains.molecules.data import DataError, Molecules, MoleculeSource, gather
from flowtilt.domains.molecules.energies import attach, evaluate, molecules_of, single_points
from flowtilt.domains.molecules.relaxation import RelaxationSettings, relax, relax_one
from flowtilt.domains.molecules.sdf import SdfError, describe, holds, read_sdf, write_sdf
from flowtilt.domains.molecules.sections import UnitsConfig
from flowtilt.domains.molecules.workers import WorkerPool
from flowtilt.domains.molecules.xtb import (
    Failure,
    Molecule,
    XTBSettings,
    atomic_energy,
    check_elements,
    closest,
    failed,
    possible_energies,
    single_point,
    solve,
    supported,
    unpaired_electrons,
)

NAN, INF = math.nan, math.inf


def molecule(numbers, coordinates):
    return Molecule(np.array(numbers, dtype=np.int32), np.array(coordinates, dtype=float).reshape(-1, 3))


WATER = molecule([8, 1, 1], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
SULPHIDE = molecule([16, 1, 1], [[0, 0, 0], [0.96, 0.93, 0], [-0.96, 0.93, 0]])
COLLISION, NO_ORDERS = Failure.TOO_CLOSE, Invalid.BOND_ORDERS
BAD = {
    "no atoms": (molecule([], []), Failure.NO_ATOMS, Invalid.NO_ATOMS),
    "sulphur": (SULPHIDE, Failure.ELEMENT, None),
    "helium": (molecule([2], [[0, 0, 0]]), Failure.ELEMENT, NO_ORDERS),
    "beyond the table": (molecule([119, 1], [[0, 0, 0], [1, 0, 0]]), Failure.ELEMENT, Invalid.ELEMENT),
    "padding": (molecule([0, 1], [[0, 0, 0], [1, 0, 0]]), Failure.ELEMENT, Invalid.ELEMENT),
    "negative": (molecule([-1, 1], [[0, 0, 0], [1, 0, 0]]), Failure.ELEMENT, Invalid.ELEMENT),
    "one place": (molecule([8, 1, 1], np.zeros((3, 3))), COLLISION, NO_ORDERS),
    "NaN": (molecule([1, 1], [[0, 0, 0], [NAN, 0, 0]]), Failure.NOT_FINITE, Invalid.NOT_FINITE),
    "infinite": (molecule([1, 1], [[0, 0, 0], [-INF, 0, 0]]), Failure.NOT_FINITE, Invalid.NOT_FINITE),
    "overflowing": (
        molecule([1, 1], [[0, 0, 0], [1.7e308, -1.7e308, 0]]),
        Failure.SOLVER,
        Invalid.FRAGMENTS,
    ),
}
"""With why each has no energy and no structure; None where it has one."""

FINE = {
    "an atom": (molecule([1], [[0, 0, 0]]), NO_ORDERS),
    "an odd number of electrons": (molecule([8, 1], [[0, 0, 0], [0.97, 0, 0]]), NO_ORDERS),
    "two fragments": (
        molecule([1, 1, 1, 1], [[0, 0, 0], [0.74, 0, 0], [50, 0, 0], [50.74, 0, 0]]),
        Invalid.FRAGMENTS,
    ),
    "far from the origin": (WATER._replace(coordinates=WATER.coordinates + 1e8), None),
}
"""With an energy, and why there is no structure; None where there is one."""


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as workers:
        yield workers


def test_a_batch_of_bad_molecules_loses_none_of_its_good_ones(pool):
    """In the workers: each keeps its reason, and water its energy, structure and minimum."""
    mixed = [WATER, *(one for one, *_ in BAD.values()), WATER]
    settings = RelaxationSettings(evaluations=40)
    points = single_points(mixed, XTBSettings(), pool)
    structures = perceive(mixed, pool=pool)
    relaxed = relax(mixed, settings, pool)
    failures = [None, *(failure for _, failure, _ in BAD.values()), None]
    invalid = [None, *(reason for *_, reason in BAD.values()), None]
    assert [point.failure for point in points] == [one.failure for one in relaxed] == failures
    assert [one.invalid for one in structures] == invalid
    for point, one, failure in zip(points, relaxed, failures, strict=True):
        assert math.isnan(point.energy) == math.isnan(one.gain) == (failure is not None)
        assert one.converged == (failure is None)
    assert points[0].energy == points[-1].energy == single_point((WATER, XTBSettings())).energy
    assert structures[0].smiles == structures[-1].smiles == "O"
    assert structures[2].smiles == "S"


def test_sulphur_is_counted_in_a_padded_batch(pool):
    coordinates = np.stack([WATER.coordinates, SULPHIDE.coordinates])
    numbers = np.stack([WATER.numbers, SULPHIDE.numbers])
    found = evaluate(coordinates, numbers, pool=pool)
    assert found.counts() == {Failure.ELEMENT: 1}
    assert found.energy[0] == single_point((WATER, XTBSettings())).energy
    assert math.isnan(found.energy[1])
    assert not found.gradient[1].any()
    x = torch.tensor(coordinates, requires_grad=True)
    values = attach(x, evaluate(x.numpy(force=True), np.array(numbers), pool=pool))
    (gradient,) = torch.autograd.grad(values[0], x)
    assert torch.equal(gradient[0], torch.tensor(found.gradient[0]))
    assert torch.equal(attach(x, found).isnan(), torch.tensor([False, True]))


@pytest.mark.parametrize(("one", "invalid"), FINE.values(), ids=FINE.keys())
def test_what_is_odd_but_defined_has_an_energy(one, invalid):
    point = single_point((one, XTBSettings()))
    assert point.failure is None
    assert math.isfinite(point.energy)
    assert perceive_one((one, chemistry.PerceptionSettings())).invalid is invalid
    assert relax_one((one, RelaxationSettings(evaluations=40))).gain >= 0


@pytest.mark.parametrize("name", BAD)
def test_the_metrics_of_a_set_count_its_bad_molecules(name):
    bad, failure, invalid = BAD[name]
    structures = [Structure("O"), Structure(None if invalid else "S", invalid=invalid)]
    known = composition([WATER])
    found = assess([WATER, bad], np.array([5.0, NAN]), [None, failure], structures, frozenset(), known)
    assert found["reward_molecules"] == found[f"failed_{failure.name.lower()}"] == 1
    assert found["reward_mean"] == 5
    assert invalid is None or found[f"invalid_{invalid.name.lower()}"] == 1
    assert (failure is Failure.ELEMENT) == ("failed_element" in found)


ATOMS = np.array([8, 1])
NONE = gather([data.Record(0, "C", np.zeros(1, dtype=int), np.zeros((1, 3)))]).select(np.array([False]))
REFUSED = [
    *(
        (f, (np.array([16]), XTBSettings()), r"elements \[16\] are not supported")
        for f in (unpaired_electrons, possible_energies)
    ),
    (check_elements, (np.array([16, 2, 1]),), r"elements \[2, 16\]"),
    (closest, (SULPHIDE,), r"elements \[16\]"),
    (closest, (BAD["NaN"][0],), "finite coordinates"),
    (atomic_energy, (16,), r"elements \[16\]"),
    *(
        (molecules_of, (np.zeros((1, 2, 3)), np.array([numbers])), "not atomic numbers")
        for numbers in ([1, -6], [1, 119], [1, 1.5], [1, NAN])
    ),
    (molecules_of, (np.zeros((2, 3)), ATOMS), "expected atomic numbers"),
    *((f, (np.zeros((1, 2, 3)), np.array([[1, -6]])), "not atomic numbers") for f in (evaluate,)),
    (composition, ([],), "at least one atom"),
    (composition, ([BAD["no atoms"][0]],), "at least one atom"),
    (drift, ([], composition([WATER])), "at least one atom"),
    *(
        (total_variation, pair, "sum to one")
        for pair in (
            ({}, {}),
            ({}, {1: 1.0}),
            ({1: 1.0}, {1: 0.5}),
            ({1: NAN}, {1: 1.0}),
            ({1: 2, 2: -1}, {1: 1}),
        )
    ),
    (assess, ([], np.array([]), [], [], frozenset(), None), "at least one"),
    (assess, ([WATER], np.array([INF]), [None], [Structure("O")], frozenset(), None), "either a finite"),
    (
        assess,
        ([BAD["no atoms"][0]], np.array([1.0]), [None], [Structure("O")], frozenset(), None),
        "without atoms has a reward",
    ),
    (gather, ([],), "no molecules"),
    (MoleculeSource, (NONE, UnitsConfig()), "no molecules to draw from"),
    (NONE.of_size, (1, 9), "no molecule of 1 to 9 atoms"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED)
def test_degenerate_input_is_refused(function, arguments, message):
    with pytest.raises((ValueError, DataError), match=message):
        function(*arguments)


def test_an_empty_set_of_molecules_has_none():
    assert NONE.as_molecules() == []
    assert NONE.of_split("test").as_molecules() == []
    assert NONE.size_weights().sum() == 0


@pytest.mark.parametrize("change", [{"counts": [0]}, {"split": [7]}])
def test_a_molecule_without_atoms_or_split_is_no_member_of_a_set(change):
    fields = {name: getattr(NONE, name) for name in data.FIELDS}
    one = {"index": [0], "smiles": ["C"], "counts": [0], "split": [0]} | change
    with pytest.raises(ValueError, match=r"must have an atom|do not belong together"):
        Molecules(**(fields | {name: np.array(value) for name, value in one.items()}))


def test_a_line_with_coordinates_that_are_not_finite_is_named(tmp_path):
    file = tmp_path / "part.csv"
    file.write_text("Index,SMILES,Elements,XYZ_Ang\n1,[H],['H'],\"[[0.0, nan, 0.0]]\"\n")
    with pytest.raises(DataError, match=r"part\.csv, line 2: not a molecule .*not finite"):
        list(data.read_records(file))


@pytest.mark.parametrize("name", BAD)
def test_an_sdf_holds_a_molecule_whole_or_refuses_it(tmp_path, name):
    bad, failure, invalid = BAD[name]
    structure = Structure(None, invalid=invalid) if invalid else Structure("S")
    path, properties = tmp_path / "set.sdf", describe(failed(len(bad.numbers), failure), structure)
    arguments = (path, [bad], [structure], [properties])
    if holds(bad):
        write_sdf(*arguments)
        (record,) = read_sdf(path)
        np.testing.assert_array_equal(record.molecule.numbers, bad.numbers)
        np.testing.assert_allclose(record.molecule.coordinates, bad.coordinates, atol=1e-4)
        assert record.properties["failure"] == failure.value
    else:
        with pytest.raises(SdfError, match="molecule 0 has coordinates that are not finite or exceed"):
            write_sdf(*arguments)
        assert not path.exists()


@pytest.mark.parametrize("other", [Structure("O", charges=(0,)), Structure("O", bonds=((0, 3, 1),))])
def test_the_structure_of_another_molecule_is_not_written(tmp_path, other):
    with pytest.raises(SdfError, match="structure of molecule 0 is that of another"):
        write_sdf(tmp_path / "set.sdf", [WATER], [other], [{}])


def test_sets_of_nothing_are_nan_and_not_zero():
    assert math.isnan(uniqueness([]))
    assert math.isnan(novelty([], frozenset({"C"})))
    assert novelty(["C"], frozenset()) == 1
    assert canonical("") is canonical("not SMILES") is None
    found = assess_relaxation([])
    assert found["relaxed_molecules"] == 0
    assert math.isnan(found["relaxed_converged"])
    assert math.isnan(found["relaxation_energy_mean"])
    lost = relaxation.Relaxed(NAN, WATER.coordinates, False, 0, Failure.CRASHED)
    assert math.isnan(assess_relaxation([lost])["relaxation_energy_median"])


def test_a_set_of_smiles_leaves_out_what_has_no_atoms(pool):
    assert canonical_set(["", "C", "nothing"], pool) == {"C"}
    assert canonical_set([], pool) == frozenset()


def test_a_field_that_does_not_converge_is_a_failure():
    assert single_point((WATER, XTBSettings(max_iterations=1))).failure is Failure.NOT_CONVERGED
    assert solve(WATER, 0, 0, 1).failure is Failure.NOT_CONVERGED
    assert relax_one((WATER, RelaxationSettings(xtb=XTBSettings(max_iterations=1)))).failure
    assert relax_one((WATER, RelaxationSettings(evaluations=1, gradient=1e-9))).converged is False


def test_every_public_function_is_tried_here():
    """Those that read QM9's package need its files, whose damage has tests of its own."""
    package = {data.prepare, data.prepare_job, data.load, data.source_files}
    tried = {id(value) for value in (*globals().values(), *package, data.read_records)}
    for module in (assessment, chemistry, data, energies, relaxation, sdf, xtb):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert id(function) in tried, name
    assert supported(ATOMS)
    assert not elements(BAD["padding"][0])
    assert without_bonds(BAD["no atoms"][0]).GetNumAtoms() == 0
