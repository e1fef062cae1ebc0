"""All benchmarks: ``python -m benchmarks``."""

from benchmarks import adjoint_matching, stages

for benchmark in (adjoint_matching, stages):
    benchmark.main()
    print()
