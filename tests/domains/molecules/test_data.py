import base64
import csv
import hashlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from closed_forms import generator
from flowtilt.domains.molecules import data
from flowtilt.domains.molecules.data import DataError, Molecules, MoleculeSource, gather, load, prepare
from flowtilt.domains.molecules.sections import UnitsConfig
from flowtilt.domains.molecules.states import ELEMENTS, unpack

WATER = ("3", "O", ["O", "H", "H"], [[-0.034, 0.978, 0.008], [0.065, 0.021, 0.002], [0.872, 1.301, 0.001]])
AMMONIA = (
    "2",
    "N",
    ["N", "H", "H", "H"],
    [[-0.04, 1.024, 0.063], [0.017, 0.013, -0.027], [0.916, 1.359, -0.029], [-0.52, 1.344, -0.776]],
)
FLUORINE = ("9", "FF", ["F", "F"], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.42]])


def write_part(path, molecules):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["Index", "SMILES", "N_atoms", "Elements", "XYZ_Ang", "Dipole_debye"])
        for index, smiles, symbols, coordinates in molecules:
            elements = "[" + ",".join(f"'{s}'" for s in symbols) + "]"
            table.writerow([index, smiles, len(symbols), elements, str(coordinates).replace(" ", ""), "1.8"])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package like the real one, with a molecule in each of its files."""
    site = tmp_path / "site"
    parts = dict(zip(data.PARTS, ([AMMONIA], [WATER], [FLUORINE]), strict=True))
    info = site / "qm9pack-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qm9pack\nVersion: 1.0\n")
    lines = []
    for name, molecules in parts.items():
        write_part(site / name, molecules)
        digest = hashlib.sha256((site / name).read_bytes()).digest()
        checksum = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        lines.append(f"{name},sha256={checksum},{(site / name).stat().st_size}")
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("sys.path", [str(site)])
    return site


def test_every_molecule_of_the_package_is_in_the_file(package, tmp_path):
    prepare(tmp_path / "qm9.npz")
    molecules = load(tmp_path / "qm9.npz")
    assert molecules.index.tolist() == [2, 3, 9]
    assert molecules.smiles.tolist() == ["N", "O", "FF"]
    assert molecules.counts.tolist() == [4, 3, 2]
    assert [ELEMENTS[k] for k in molecules.types] == [s for m in (AMMONIA, WATER, FLUORINE) for s in m[2]]
    expected = np.concatenate([m[3] for m in (AMMONIA, WATER, FLUORINE)])
    np.testing.assert_allclose(molecules.coordinates, expected, rtol=0, atol=1e-6)
    assert molecules.coordinates.dtype == np.float32


def test_a_package_that_is_not_there_is_named_with_its_installation(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(DataError, match="is missing: pip install qm9pack"):
        prepare(tmp_path / "qm9.npz")
    assert not (tmp_path / "qm9.npz").exists()


def test_a_missing_part_of_the_package_is_named(package, tmp_path):
    (package / data.PARTS[1]).unlink()
    with pytest.raises(DataError, match=r"qm9_part2\.csv: missing from package qm9pack; reinstall it: pip"):
        prepare(tmp_path / "qm9.npz")


def test_a_damaged_part_of_the_package_is_named(package, tmp_path):
    part = package / data.PARTS[2]
    part.write_bytes(part.read_bytes().replace(b"1.42", b"1.43"))
    with pytest.raises(DataError, match=r"qm9_part3\.csv: damaged.*pip install --force-reinstall qm9pack"):
        prepare(tmp_path / "qm9.npz")
    assert not (tmp_path / "qm9.npz").exists()


def test_atoms_outside_the_alphabet_are_named_with_their_line(tmp_path):
    chlorine = ("4", "Cl", ["Cl", "H"], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.27]])
    write_part(tmp_path / "part.csv", [WATER, chlorine])
    with pytest.raises(DataError, match=r"part\.csv, line 3: atoms Cl are not among H, C, N, O, F"):
        list(data.read_records(tmp_path / "part.csv"))


@pytest.mark.parametrize(
    "damage",
    [("1.301", "x"), (",0.001]]", "]]"), ("3,O,3,", "three,O,3,")],
    ids=["no number", "a number short", "no index"],
)
def test_a_line_that_is_no_molecule_is_named(tmp_path, damage):
    path = tmp_path / "part.csv"
    write_part(path, [WATER])
    text = path.read_text()
    assert damage[0] in text
    path.write_text(text.replace(*damage))
    with pytest.raises(DataError, match=r"part\.csv, line 2: not a molecule of qm9pack"):
        list(data.read_records(path))


def test_a_file_without_a_column_is_named(tmp_path):
    path = tmp_path / "part.csv"
    write_part(path, [WATER])
    path.write_text(path.read_text().replace("XYZ_Ang", "XYZ"))
    with pytest.raises(DataError, match=r"part\.csv: not a file of qm9pack, it has no columns .*XYZ_Ang"):
        list(data.read_records(path))


def test_a_file_that_is_missing_or_damaged_is_named_with_the_fix(package, tmp_path):
    path = tmp_path / "qm9.npz"
    with pytest.raises(DataError, match=r"qm9\.npz: no such file"):
        load(path)
    prepare(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:200] + bytes(50) + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"qm9\.npz: not a whole file of molecules .*delete it"):
            load(path)


def set_of(sizes):
    """Made-up molecules; the atoms of molecule i lie on a line, at its number times 0.01 and more."""
    return gather(
        [
            data.Record(i, "C", np.full(n, i % 5), np.arange(3.0 * n).reshape(n, 3) * 0.1 + 0.01 * i)
            for i, n in enumerate(sizes)
        ]
    )


def test_arrays_that_do_not_belong_together_are_refused():
    good = set_of([2, 3])
    fields = {name: getattr(good, name) for name in data.FIELDS}
    for change in (
        {"counts": np.array([2, 4])},
        {"coordinates": good.coordinates * np.nan},
        {"types": good.types + 5},
        {"smiles": good.smiles[:1]},
    ):
        with pytest.raises(ValueError):
            Molecules(**(fields | change))


def test_subsets_have_the_molecules_asked_for_with_their_own_atoms():
    molecules = set_of([3, 5, 4, 7, 5])
    subset = molecules.of_size(4, 5)
    assert subset.index.tolist() == [1, 2, 4]
    assert subset.types.tolist() == [1] * 5 + [2] * 4 + [4] * 5
    np.testing.assert_array_equal(subset.coordinates[5:9], molecules.coordinates[8:12])
    assert subset.size_weights().tolist() == [0, 0, 0, 0, 1, 2]
    with pytest.raises(DataError, match=r"no molecule of 8 to 12 atoms in the data, .* of 3, 4, 5, 7"):
        molecules.of_size(8, 12)


def test_splits_have_their_shares_and_stay_with_a_molecule():
    molecules = set_of([2] * 20_000)
    shares = np.bincount(molecules.split, minlength=3) / len(molecules)
    # Five standard errors of the share of one half.
    np.testing.assert_allclose(shares, data.SHARES, rtol=0, atol=5 * (0.25 / len(molecules)) ** 0.5)
    parts = [molecules.of_split(split) for split in data.SPLITS]
    assert sorted(np.concatenate([part.index for part in parts]).tolist()) == list(range(20_000))
    some = molecules.select(molecules.index % 7 == 0)
    np.testing.assert_array_equal(some.split, molecules.split[::7])


def test_draws_are_whole_molecules_each_as_likely_as_any_other():
    sizes = [3, 5, 4, 7, 5, 3, 6, 4, 5, 5]
    molecules = set_of(sizes)
    units = UnitsConfig(type_scale=0.3)
    for window in (1.0, 0.3):
        source, rng = MoleculeSource(molecules, units, window), generator(0)
        seen = np.zeros(len(sizes))
        batches = 1500
        for _ in range(batches):
            x, mask = source(8, rng)
            assert mask.sum(1).max() == x.shape[1] == mask.shape[1]
            coordinates, _ = unpack(x, mask, units)
            # Molecules of one size and type differ in nothing else here once they are centred.
            for n, k in zip(mask.sum(1).tolist(), x[:, 0, 3:].argmax(1).tolist(), strict=True):
                seen[[i for i in range(len(sizes)) if sizes[i] == n and i % 5 == k]] += 1
            first = int(mask[0].sum())
            spread = torch.arange(3.0 * first).reshape(first, 3) * 0.1
            torch.testing.assert_close(coordinates[0, :first], spread - spread.mean(0), rtol=0, atol=1e-5)
        kinds = [(n, i % 5) for i, n in enumerate(sizes)]
        expected = np.array([kinds.count(kind) for kind in kinds]) / len(sizes)
        # Batches are independent, and a share of one has at most the variance of a single draw.
        np.testing.assert_allclose(seen / (8 * batches), expected, rtol=0, atol=5 * 0.5 / batches**0.5)


def test_a_small_window_gives_batches_of_nearly_one_size():
    molecules = set_of(np.arange(1000) % 10 + 3)
    source, rng = MoleculeSource(molecules, UnitsConfig(), window=0.02), generator(0)
    spans = [torch.unique(source(32, rng)[1].sum(1)).numel() for _ in range(50)]
    assert max(spans) <= 2
    with pytest.raises(ValueError, match="window must be in"):
        MoleculeSource(molecules, UnitsConfig(), window=0.0)


@pytest.mark.skipif(find_spec("qm9pack") is None, reason="needs the package qm9pack")
def test_the_real_package_is_whole_and_begins_with_methane():
    paths = data.source_files()
    assert len(paths) == 3
    methane = next(data.read_records(paths[0]))
    assert methane.smiles == "C"
    assert [ELEMENTS[k] for k in methane.types] == ["C", "H", "H", "H", "H"]
    # The length of its bonds, by spectroscopy 1.087 Å at equilibrium, to a hundredth.
    bonds = np.linalg.norm(methane.coordinates[1:] - methane.coordinates[0], axis=1)
    np.testing.assert_allclose(bonds, 1.087, atol=0.01)
