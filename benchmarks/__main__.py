"""All benchmarks: ``python -m benchmarks``."""

from benchmarks import adjoint_matching, control_solvers, stages

for benchmark in (adjoint_matching, control_solvers, stages):
    benchmark.main()
    print()
