"""The independent program ``xtb`` as an oracle, and what it said of some molecules.

Make the stored answers again, with the program and the packages pandas and qm9pack installed:

    python tests/xtb_program.py
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

STORED = Path(__file__).parent / "data" / "gfn1_xtb.json"
COMMAND = ["xtb", "molecule.xyz", "--gfn", "1", "--sp"]
SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
NUMBERS = {symbol: number for number, symbol in SYMBOLS.items()}
QM9 = [
    1,
    2,
    3,
    4,
    6,
    8,
    13,
    36,
    53,
    106,
    184,
    211,
    214,
    282,
    442,
    829,
    2532,
    7201,
    21754,
    21968,
    58213,
    133850,
]
"""Numbers of molecules in QM9, of 3 to 22 atoms, with rings, cages, fluorine, a nitro group, a zwitterion."""


@dataclass
class Case:
    """A molecule and the program's energy in hartree, or None if it did not converge."""

    name: str
    numbers: list[int]
    coordinates: list[list[float]]
    charge: int = 0
    unpaired: int | None = None
    energy: float | None = None
    smiles: str | None = None


def installed() -> bool:
    return shutil.which(COMMAND[0]) is not None


def energy(case: Case) -> float | None:
    """What the program says of a molecule."""
    lines = [
        f"{SYMBOLS[z]} {x:.12f} {y:.12f} {w:.12f}"
        for z, (x, y, w) in zip(case.numbers, case.coordinates, strict=True)
    ]
    options = ["--chrg", str(case.charge)]
    options += [] if case.unpaired is None else ["--uhf", str(case.unpaired)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, COMMAND[1]).write_text(
            "\n".join([str(len(lines)), case.name, *lines, ""]), encoding="utf-8"
        )
        done = subprocess.run(
            [*COMMAND, *options],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.findall(r"TOTAL ENERGY\s+(-?\d+\.\d+) Eh", done.stdout)
    converged = done.returncode == 0 and "did not converge" not in done.stdout + done.stderr
    return float(found[-1]) if found and converged else None


def stored() -> list[Case]:
    return [Case(**case) for case in json.loads(STORED.read_text())["cases"]]


def broken() -> list[Case]:
    """Geometries that a generative model may make, and open shells and charges."""
    rng = np.random.default_rng(0)
    methane = from_qm9()[1]
    noisy = np.array(methane.coordinates) + 0.15 * rng.standard_normal((5, 3))
    scattered = 4.0 * rng.standard_normal((9, 3))
    tetrahedron = (0.6 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])).tolist()
    return [
        Case("distorted methane", methane.numbers, noisy.round(6).tolist()),
        Case("methyl radical", methane.numbers[:-1], methane.coordinates[:-1]),
        Case("hydroxyl radical", [8, 1], [[0, 0, 0], [0, 0, 0.97]]),
        Case("triplet oxygen", [8, 8], [[0, 0, 0], [0, 0, 1.21]], unpaired=2),
        Case("singlet oxygen", [8, 8], [[0, 0, 0], [0, 0, 1.21]]),
        Case("ammonium", [7, 1, 1, 1, 1], [[0, 0, 0], *tetrahedron], charge=1),
        Case("hydroxide", [8, 1], [[0, 0, 0], [0, 0, 0.97]], charge=-1),
        Case("stretched nitrogen", [7, 7], [[0, 0, 0], [0, 0, 1.8]]),
        Case("two waters", [8, 1, 1, 8, 1, 1], [[x, y, z + d] for d in (0, 3.0) for x, y, z in WATER]),
        Case("scattered atoms", [6, 7, 8, 9, 8, 9, 9, 7, 8], scattered.round(6).tolist()),
    ]


WATER = [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]]


def from_qm9() -> dict[int, Case]:
    """The molecules of :data:`QM9`, by their number there."""
    import pandas as pd

    columns = ["Index", "SMILES", "Elements", "XYZ_Ang"]
    folder = Path(str(distribution("qm9pack").locate_file("qm9pack/data")))
    cases = {}
    for part in (1, 2, 3):
        table = pd.read_csv(folder / f"qm9_part{part}.csv", usecols=columns)
        for _, index, smiles, elements, coordinates in table[table.Index.isin(QM9)].itertuples():
            numbers = [NUMBERS[symbol] for symbol in ast.literal_eval(elements)]
            positions = ast.literal_eval(coordinates)
            cases[index] = Case(f"QM9 {index}", numbers, positions, smiles=smiles)
    return cases


def main() -> None:
    version = subprocess.run([COMMAND[0], "--version"], capture_output=True, text=True, check=True).stdout
    cases = [*from_qm9().values(), *broken()]
    for case in cases:
        case.energy = energy(case)
    stored = {
        "program": re.search(r"xtb version \S+", version)[0],
        "command": " ".join([*COMMAND, "--chrg", "CHARGE", "[--uhf UNPAIRED]"]),
        "made_by": "python tests/xtb_program.py",
        "units": "coordinates in ångström, energies in hartree; null did not converge",
    }
    STORED.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(asdict(case))}" for case in cases)
    head = json.dumps(stored, ensure_ascii=False, indent=1)[:-2]
    STORED.write_text(f'{head},\n "cases": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
