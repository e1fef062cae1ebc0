"""What each stage of a finished run cost: jobs, wall time, peak memory.

Reads the benchmark files that the workflow leaves beside its results, or the committed provenance
of the reference run where there are none.

Run:  python benchmarks/stages.py [--results results]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flowtilt.pipeline.report.costs import stage_costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    results = parser.parse_args().results
    costs = stage_costs(results / "benchmarks")
    if not costs:
        costs = json.loads((results / "provenance.json").read_text(encoding="utf-8"))["stages"]
    total = sum(c["wall_seconds"] for c in costs.values())
    print(f"{'stage':20}{'jobs':>6}{'seconds':>10}{'share':>8}{'peak MB':>9}")
    for stage, c in sorted(costs.items(), key=lambda item: -item[1]["wall_seconds"]):
        share = c["wall_seconds"] / total
        print(f"{stage:20}{c['jobs']:6}{c['wall_seconds']:10.0f}{share:8.1%}{c['peak_memory_mb']:9.0f}")
    print(f"{'all':20}{sum(c['jobs'] for c in costs.values()):6}{total:10.0f}")


if __name__ == "__main__":
    main()
