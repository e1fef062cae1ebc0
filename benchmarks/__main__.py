"""All benchmarks: ``python -m benchmarks``."""

from benchmarks import (
    adjoint_matching,
    control_solvers,
    images,
    molecule_adjoints,
    molecules,
    pipeline,
    stages,
)

for benchmark in (
    adjoint_matching,
    control_solvers,
    molecules,
    molecule_adjoints,
    images,
    pipeline,
    stages,
):
    benchmark.main()
    print()
