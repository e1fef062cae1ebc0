"""QM9 (Ramakrishnan et al. 2014): molecules of up to nine heavy atoms with DFT geometries.

The source is the Python package ``qm9pack``, whose text files hold 130,831 molecules. They are parsed once
into a compressed file of arrays that everything else reads.
"""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from io import StringIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flowtilt.domains.molecules.sections import UnitsConfig
from flowtilt.domains.molecules.states import ATOMIC_NUMBERS, ELEMENTS, pack
from flowtilt.domains.molecules.xtb import Molecule
from flowtilt.files import atomic_path, read_npz, read_text
from flowtilt.pipeline.domain import Job
from flowtilt.seeding import seed_of

PACKAGE = "qm9pack"
PARTS = tuple(f"{PACKAGE}/data/qm9_part{part}.csv" for part in (1, 2, 3))
COLUMNS = ("Index", "SMILES", "Elements", "XYZ_Ang")

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES = (0.9, 0.05, 0.05)
"""Of the splits. A molecule's split follows from its number in QM9, so subsets keep it."""


class DataError(RuntimeError):
    """Molecular data that cannot be used; the message names the file and the fix."""


@dataclass(frozen=True)
class Record:
    """One line of the source: number in QM9, SMILES, types (atoms,) and ångström (atoms, 3)."""

    index: int
    smiles: str
    types: np.ndarray
    coordinates: np.ndarray


@dataclass(frozen=True)
class Molecules:
    """A set of molecules, their atoms one after the other.

    Attributes:
        index: number of each molecule in QM9, int32, (molecules,).
        smiles: as QM9 gives it, (molecules,).
        counts: atoms of each molecule, int32, (molecules,).
        split: position in :data:`SPLITS`, uint8, (molecules,).
        types: positions in :data:`flowtilt.domains.molecules.states.ELEMENTS`, uint8, (all atoms,).
        coordinates: ångström, float32, (all atoms, 3).
    """

    index: np.ndarray
    smiles: np.ndarray
    counts: np.ndarray
    split: np.ndarray
    types: np.ndarray
    coordinates: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __post_init__(self) -> None:
        atoms, size = int(self.counts.sum()), len(self.index)
        shapes = {name: getattr(self, name).shape for name in FIELDS}
        wanted = dict.fromkeys(FIELDS, (size,)) | {"types": (atoms,), "coordinates": (atoms, 3)}
        if shapes != wanted:
            raise ValueError(f"arrays do not belong together: shapes {shapes}, expected {wanted}")
        if not np.isfinite(self.coordinates).all() or (atoms and self.types.max() >= len(ELEMENTS)):
            raise ValueError("coordinates must be finite, and types positions in the list of elements")
        if size and (self.counts.min() < 1 or self.split.max() >= len(SPLITS)):
            raise ValueError("every molecule must have an atom, and be of one of the splits")

    def select(self, chosen: np.ndarray) -> Molecules:
        """The molecules where ``chosen`` (bools, (molecules,)) is true."""
        atoms = np.repeat(chosen, self.counts)
        kept = {name: getattr(self, name)[chosen] for name in ("index", "smiles", "counts", "split")}
        return Molecules(**kept, types=self.types[atoms], coordinates=self.coordinates[atoms])

    def of_size(self, smallest: int, largest: int) -> Molecules:
        """The molecules of ``smallest`` to ``largest`` atoms. Raises DataError if there is none."""
        chosen = (self.counts >= smallest) & (self.counts <= largest)
        if not chosen.any():
            sizes = ", ".join(map(str, np.unique(self.counts)))
            raise DataError(
                f"keys smallest and largest: no molecule of {smallest} to {largest} atoms in the data, "
                f"which has molecules of {sizes}"
            )
        return self.select(chosen)

    def of_split(self, split: Split) -> Molecules:
        """The molecules of one split."""
        return self.select(self.split == SPLITS.index(split))

    def as_molecules(self) -> list[Molecule]:
        """One by one, as energies and structures take them."""
        if not len(self):
            return []
        ends = np.cumsum(self.counts)[:-1]
        numbers = np.array(ATOMIC_NUMBERS, dtype=np.int32)[self.types]
        return [
            Molecule(z, x.astype(np.float64))
            for z, x in zip(np.split(numbers, ends), np.split(self.coordinates, ends), strict=True)
        ]

    def size_weights(self) -> Tensor:
        """How many molecules there are of each number of atoms from 0 to the largest, float64."""
        return torch.as_tensor(np.bincount(self.counts).astype(np.float64))


FIELDS = tuple(Molecules.__dataclass_fields__)


def prepare_job(job: Job) -> None:
    """The stage of :func:`prepare`."""
    prepare(job.outputs["molecules"])


def prepare(output: Path) -> None:
    """Parse QM9 from the installed package into one compressed file of the arrays of :class:`Molecules`.

    Raises:
        DataError: if the package is missing, one of its files is damaged, or a molecule has an atom
            that is not in :data:`flowtilt.domains.molecules.states.ELEMENTS`.
    """
    molecules = gather([record for path in source_files() for record in read_records(path)])
    with atomic_path(output) as temporary, temporary.open("wb") as stream:
        arrays = {name: getattr(molecules, name) for name in FIELDS}
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def load(path: Path) -> Molecules:
    """The molecules of a file of :func:`prepare`. Raises DataError if the file is missing or not whole."""
    try:
        data = read_npz(path)
        return Molecules(*(data[name] for name in FIELDS))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the stage that prepares the molecules first") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not a whole file of molecules ({error}); delete it and run again") from None


def source_files() -> list[Path]:
    """The text files of the installed package, as its own list of checksums has them. Raises DataError if the
    package is missing or one of its files is damaged."""
    again = f"pip install --force-reinstall {PACKAGE}"
    try:
        files = {str(file): file for file in distribution(PACKAGE).files or ()}
    except PackageNotFoundError:
        raise DataError(f"package {PACKAGE}, which holds QM9, is missing: pip install {PACKAGE}") from None
    paths = []
    for name in PARTS:
        file = files.get(name)
        path = Path(str(file.locate())) if file else Path(name)
        if file is None or not path.is_file():
            raise DataError(f"{path}: missing from package {PACKAGE}; reinstall it: {again}")
        with path.open("rb") as stream:  # its checksum in the form in which installed packages are listed
            digest = hashlib.file_digest(stream, file.hash.mode).digest() if file.hash else b""
        if file.hash and base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            raise DataError(f"{path}: damaged, its checksum is not that of package {PACKAGE}; {again}")
        paths.append(path)
    return paths


def read_records(path: Path) -> Iterator[Record]:
    """The molecules of one of the package's text files. Raises DataError, naming the file and the line, if it
    is not such a file."""
    again = f"reinstall it: pip install --force-reinstall {PACKAGE}"
    try:
        text = read_text(path, DataError)
    except (OSError, DataError) as error:
        raise DataError(f"{path}: not a file of {PACKAGE} ({error}); {again}") from None
    with StringIO(text) as stream:
        table = csv.DictReader(stream)
        if not set(COLUMNS) <= set(table.fieldnames or ()):
            raise DataError(
                f"{path}: not a file of {PACKAGE}, it has no columns {', '.join(COLUMNS)}; {again}"
            )
        for row in table:
            where = f"{path}, line {table.line_num}"
            try:
                index, smiles, elements, coordinates = (row[name] for name in COLUMNS)
                symbols = elements.strip("[]").replace("'", "").split(",")
                numbers = coordinates.replace("[", "").replace("]", "").split(",")
                positions = np.array(numbers, dtype=np.float64).reshape(len(symbols), 3)
                number = int(index)
                if not np.isfinite(positions).all():
                    raise ValueError("coordinates that are not finite")
            except (KeyError, ValueError, AttributeError) as error:
                raise DataError(f"{where}: not a molecule of {PACKAGE} ({error!r}); {again}") from None
            yield Record(number, smiles, _types(symbols, where), positions)


def _types(symbols: list[str], where: str) -> np.ndarray:
    unknown = sorted(set(symbols).difference(ELEMENTS))
    if unknown:
        raise DataError(
            f"{where}: atoms {', '.join(unknown)} are not among {', '.join(ELEMENTS)}; "
            "remove the molecule, or add the element to flowtilt.domains.molecules.states.ELEMENTS"
        )
    return np.array([ELEMENTS.index(symbol) for symbol in symbols])


def gather(records: list[Record]) -> Molecules:
    """Records as one set, each with its split. Raises DataError if there is none."""
    if not records:
        raise DataError(f"no molecules; package {PACKAGE} may be damaged: reinstall it")
    # A molecule's split is from a uniform number that follows from its number in QM9.
    uniform = [seed_of("qm9 split", record.index) / 2**63 for record in records]
    split = np.searchsorted(np.cumsum(SHARES)[:-1], uniform, side="right")
    return Molecules(
        index=np.array([r.index for r in records], dtype=np.int32),
        smiles=np.array([r.smiles for r in records]),
        counts=np.array([len(r.types) for r in records], dtype=np.int32),
        split=split.astype(np.uint8),
        types=np.concatenate([r.types for r in records]).astype(np.uint8),
        coordinates=np.concatenate([r.coordinates for r in records]).astype(np.float32),
    )


class MoleculeSource:
    """Draws of packed molecules for training, each with its mask.

    Args:
        window: share of the molecules, sorted by size, that a batch is drawn from. 1 draws from all;
            a small window gives batches of nearly one size, with little padding, and leaves each
            molecule as likely as any other.
    """

    def __init__(self, molecules: Molecules, units: UnitsConfig, window: float = 1.0) -> None:
        if not 0 < window <= 1:
            raise ValueError(f"window must be in (0, 1], got {window}")
        if not len(molecules):
            raise DataError("no molecules to draw from; widen the keys smallest and largest")
        largest = int(molecules.counts.max())
        mask = torch.arange(largest) < torch.as_tensor(molecules.counts.astype(np.int64))[:, None]
        types = torch.zeros(mask.shape, dtype=torch.long)
        types[mask] = torch.as_tensor(molecules.types.astype(np.int64))
        coordinates = torch.zeros(*mask.shape, 3)
        coordinates[mask] = torch.as_tensor(molecules.coordinates)
        order = torch.as_tensor(np.argsort(molecules.counts, kind="stable"))
        self.mask = mask[order]
        self.states = pack(coordinates, types, mask, units)[order]
        self.window = max(1, round(window * len(order)))

    def __call__(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` molecules at random, with replacement; padded to the largest of them."""
        size = len(self.mask)
        start = torch.randint(size, (1,), generator=generator)
        chosen = (start + torch.randint(self.window, (count,), generator=generator)) % size
        mask = self.mask[chosen]
        atoms = int(mask.sum(1).max())
        return self.states[chosen, :atoms], mask[:, :atoms]
