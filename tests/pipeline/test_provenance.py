"""The record of what made the results."""

from __future__ import annotations

import json
from pathlib import Path

from flowtilt.pipeline.cli import main

HEADER = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time"


def benchmark(folder: Path, rule: str, seconds: float, memory: float) -> None:
    file = folder / rule / "run.tsv"
    file.parent.mkdir(parents=True)
    values = [seconds, "0:00:01", memory, *[0.0] * 7]
    file.write_text(HEADER + "\n" + "\t".join(map(str, values)) + "\n")


def write(folder: Path, config_hash: str, *more: str) -> dict:
    output = folder / "provenance.json"
    words = [
        "--config-hash",
        config_hash,
        "--benchmarks",
        str(folder / "benchmarks"),
        "--output",
        str(output),
    ]
    assert main(["provenance", *words, *more]) == 0
    return json.loads(output.read_text())


def test_costs_of_an_earlier_run_are_added_and_its_record_is_kept(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    benchmark(first / "benchmarks", "table", 2.0, 300.0)
    benchmark(first / "benchmarks", "pretrain", 10.0, 900.0)
    benchmark(second / "benchmarks", "table", 3.0, 200.0)
    earlier = write(first, "a" * 64)
    record = write(second, "b" * 64, "--earlier", str(first / "provenance.json"))
    assert record["config_hash"] == "b" * 64
    assert record["stages"]["table"] == {"jobs": 2, "wall_seconds": 5.0, "peak_memory_mb": 300.0}
    assert record["stages"]["pretrain"] == earlier.pop("stages")["pretrain"]
    assert record["earlier"] == earlier
