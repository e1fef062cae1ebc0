"""All benchmarks: ``python -m benchmarks``."""

from benchmarks import adjoint_matching, control_solvers, molecules, stages

for benchmark in (adjoint_matching, control_solvers, molecules, stages):
    benchmark.main()
    print()
