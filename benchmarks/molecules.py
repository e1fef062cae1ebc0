"""Energies of molecules: what two worker processes bring, and tblite beside dxtb.

Molecules are QM9's, of 9 to 12 and of 18 atoms. The same batch is evaluated by one worker and by two in
turn, and the ratio of the times is reported. Seconds depend on the machine, and the ratio on whether two
processors were to be had, which is measured with it. The row of this process is a plain loop, whose
distance from one worker is what the pool costs.

dxtb, the differentiable program of the papers, needs an older NumPy and so an environment of its own,
whose interpreter is named with --dxtb; its row is energies and gradients of the same molecules.

Run:  python benchmarks/molecules.py [--molecules 64] [--dxtb ENVIRONMENT/bin/python]
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

from flowtilt.domains.molecules.chemistry import perceive
from flowtilt.domains.molecules.energies import single_points
from flowtilt.domains.molecules.relaxation import relax
from flowtilt.domains.molecules.workers import WorkerPool
from flowtilt.domains.molecules.xtb import BOHR, Molecule, XTBSettings, single_point

NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
SIZES = {"9 to 12 atoms": range(9, 13), "18 atoms": range(18, 19)}

DXTB = """
import json, sys, time
import dxtb, torch

torch.set_num_threads(1)
rows = []
for numbers, positions in json.load(sys.stdin):
    started = time.perf_counter()
    z, x = torch.tensor(numbers), torch.tensor(positions, dtype=torch.double, requires_grad=True)
    calculator = dxtb.calculators.GFN1Calculator(z, dtype=torch.double, opts={"verbosity": 0})
    energy = calculator.get_energy(x)
    (gradient,) = torch.autograd.grad(energy, x)
    rows.append([time.perf_counter() - started, energy.item(), gradient.abs().max().item()])
json.dump(rows, sys.stdout)
"""


def molecules_of(sizes: range, count: int) -> list[Molecule]:
    """Molecules of QM9 of some sizes, evenly from one of its files."""
    part = 1 if sizes.stop < 15 else 2
    path = Path(str(distribution("qm9pack").locate_file(f"qm9pack/data/qm9_part{part}.csv")))
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if int(row["N_atoms"]) in sizes]
    return [
        Molecule(
            np.array([NUMBERS[symbol] for symbol in ast.literal_eval(row["Elements"])]),
            np.array(ast.literal_eval(row["XYZ_Ang"]), dtype=float),
        )
        for row in rows[:: max(1, len(rows) // count)][:count]
    ]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def throughput(molecules: Sequence[Molecule], rounds: int) -> None:
    """Print times of a plain loop, one worker and two, and their ratios."""
    settings = XTBSettings()
    with WorkerPool(1) as one, WorkerPool(2) as two:
        ways: dict[str, Callable[[], object]] = {
            "this process": lambda: [single_point((molecule, settings)) for molecule in molecules],
            "one worker": lambda: single_points(molecules, settings, one),
            "two workers": lambda: single_points(molecules, settings, two),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()  # warm up
        used = processor_seconds(two)
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(seconds(way))
        used = processor_seconds(two) - used
        for name, measured in times.items():
            print(f"  {name:14s}{1e3 * statistics.median(measured) / len(molecules):8.2f} ms a molecule")
        ratio("two workers over one", times["one worker"], times["two workers"])
        ratio("one worker over none", times["this process"], times["one worker"])
        print(f"  the two workers had {used / sum(times['two workers']):.2f} processors")
        perceive(molecules, pool=two)  # warm up
        structures = seconds(lambda: perceive(molecules, pool=two)) / len(molecules)
        some = molecules[:8]
        relaxed = seconds(lambda: relax(some, pool=two)) / len(some)
    print(f"  structures    {1e3 * structures:8.2f} ms a molecule, two workers")
    print(f"  relaxations   {1e3 * relaxed:8.2f} ms a molecule, two workers")


def processor_seconds(pool: WorkerPool) -> float:
    """What the workers of a pool have used so far, from Linux's files on processes."""
    ticks = 0
    for worker in pool._workers:
        fields = (
            Path(f"/proc/{worker.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        )
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def ratio(name: str, slow: Sequence[float], fast: Sequence[float]) -> None:
    """Print the median of the ratios within each round, and their range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    print(f"  {name}: {statistics.median(ratios):.2f} times (from {min(ratios):.2f} to {max(ratios):.2f})")


def beside_dxtb(python: str, molecules: Sequence[Molecule]) -> None:
    """Print differences of energies and the ratio of times, on the same molecules in the same minute."""
    task = [(m.numbers.tolist(), (m.coordinates / BOHR).tolist()) for m in molecules]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", DXTB],
        input=json.dumps(task),
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    theirs, energies, gradients = zip(*json.loads(done.stdout), strict=True)
    settings = XTBSettings()
    ours, points = [], []
    for molecule in molecules:
        started = time.perf_counter()
        points.append(single_point((molecule, settings)))
        ours.append(time.perf_counter() - started)
    difference = np.array(energies) - [point.energy for point in points]
    relative = np.abs(difference / energies).max()
    steepest = np.array([np.abs(point.gradient).max() * BOHR for point in points])
    print(f"  dxtb          {1e3 * statistics.median(theirs):8.2f} ms a molecule, with its gradient")
    ratio("dxtb over tblite", theirs, ours)
    print(f"  energies differ by up to {np.abs(difference).max():.1e} hartree, {relative:.1e} of the energy")
    print(f"  largest gradients by up to {np.abs(steepest - gradients).max():.1e} hartree/bohr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--molecules", type=int, default=64, help="in each batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dxtb", metavar="PYTHON", help="interpreter of an environment that has dxtb")
    arguments, _ = parser.parse_known_args()
    for name, sizes in SIZES.items():
        molecules = molecules_of(sizes, arguments.molecules)
        print(f"GFN1-xTB energy and gradient, QM9 molecules of {name}, batches of {len(molecules)}")
        throughput(molecules, arguments.rounds)
        if arguments.dxtb:
            beside_dxtb(arguments.dxtb, molecules[:20])


if __name__ == "__main__":
    main()
