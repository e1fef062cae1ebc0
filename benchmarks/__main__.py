"""All benchmarks: ``python -m benchmarks``."""

from benchmarks import (
    adjoint_matching,
    control_solvers,
    molecule_adjoints,
    molecules,
    pictures,
    pipeline,
    stages,
)

for benchmark in (
    adjoint_matching,
    control_solvers,
    molecules,
    molecule_adjoints,
    pictures,
    pipeline,
    stages,
):
    benchmark.main()
    print()
