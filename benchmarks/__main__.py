"""All benchmarks: ``python -m benchmarks``."""

from benchmarks import adjoint_matching, control_solvers, molecules, pipeline, stages

for benchmark in (adjoint_matching, control_solvers, molecules, pipeline, stages):
    benchmark.main()
    print()
