"""The table of costs: means over seeds of made-up benchmarks, what is missing, and what is malformed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.costs import (
    Cost,
    Measured,
    cost_panel,
    costs_of,
    read_benchmark,
    read_costs,
    stage_costs,
)
from flowtilt.pipeline.report.measurements import ResultsError
from small import CONFIG, in_plane

HEADER = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
RISK, HIERARCHY, ITERATIONS = (
    CONFIG / "experiments" / f"{name}.yaml" for name in ("risk_averse_2d", "hierarchy_2d", "iterations_2d")
)
MOLECULES = CONFIG / "experiments" / "molecules_qm9.yaml"
FINETUNE = "planar_finetune"
MEASURE, MEASURES = (f"planar_measure_{name}/{name}" for name in ("risk_averse_2d", "hierarchy_2d"))
"""Benchmarks of the rules that measure the runs of a file together."""


def write(folder: Path, job: str, seconds: float, memory: object = "-") -> Path:
    """A benchmark in Snakemake's format; ``job`` is its path without the ending."""
    file = folder / f"{job}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{HEADER}{seconds}\t0:00:00\t{memory}\t-\t-\t-\t0.00\t0.00\t0.00\t0.1\n")
    return file


def by_name(lines: list[Cost]) -> dict[tuple[str, str], Cost]:
    return {(line.experiment, line.method): line for line in lines}


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """Two seeds of the risk-averse experiment; seed s of each job took s seconds more than seed 0."""
    for seed in (0, 1):
        for method, seconds in (("am", 20.0), ("fdc", 40.0), ("tfft", 20.0)):
            write(
                tmp_path,
                f"planar_finetune/risk_averse_2d/{method}/seed{seed}",
                seconds + seed,
                500 + 10 * seed,
            )
        write(tmp_path, f"{MEASURE}/seed{seed}", 4.0 + seed, 600)
        write(tmp_path, f"planar_exact/risk_averse_2d/seed{seed}", 7.0 + seed, 800)
    return tmp_path


def test_means_over_seeds(benchmarks: Path) -> None:
    lines = by_name(costs_of(benchmarks, load_file(RISK, in_plane(seeds=2)).values()))
    am, fdc = lines["risk_averse_2d", "am"], lines["risk_averse_2d", "fdc"]
    assert (am.finetune, am.relative, am.memory, am.seeds, am.updates) == (20.5, 1.0, 510.0, 2, 200)
    assert am.finetune_sd == pytest.approx(math.sqrt(0.5))
    assert fdc.relative == pytest.approx(40.5 / 20.5)
    assert (am.assess, fdc.assess, am.solve, fdc.solve) == (4.5, 4.5, 7.5, 7.5)
    # No batch was measured: of those that take it the two ratios are the same.
    assert fdc.alone == fdc.relative
    pretrained = lines["risk_averse_2d", "pretrained"]
    assert math.isnan(pretrained.finetune)
    assert (pretrained.assess, pretrained.seeds, pretrained.updates) == (4.5, 2, 0)


def test_the_offline_batch_stands_once_and_in_the_ratio_of_those_that_take_it(benchmarks: Path) -> None:
    """Of fdc by exponents, of tfft and of all annealed rows; am draws its own trajectories."""
    for seed in (0, 1):
        write(benchmarks, f"planar_offline/risk_averse_2d/seed{seed}", 3.0 + seed)
        write(benchmarks, f"planar_threshold/risk_averse_2d/tfft/seed{seed}", 0.5)
    lines = costs_of(benchmarks, load_file(RISK, in_plane(seeds=2)).values())
    found = by_name(lines)
    am, fdc, tfft = (found["risk_averse_2d", method] for method in ("am", "fdc", "tfft"))
    assert math.isnan(am.batch)
    assert (am.alone, am.relative) == (1.0, 1.0)
    assert (fdc.batch, tfft.batch, tfft.threshold) == (3.5, 3.5, 0.5)
    assert fdc.alone == pytest.approx(40.5 / 20.5)
    assert fdc.relative == pytest.approx(44.0 / 20.5)
    assert tfft.alone == pytest.approx(21.0 / 20.5)
    assert tfft.relative == pytest.approx(24.5 / 20.5)
    panel = cost_panel(lines, "Risk")
    at = panel.header.index("offline batch (s)")
    assert {line[0]: line[at] for line in panel.lines if line[at]} == {"fdc": "3.500"}
    takers = {method for (_, method), line in found.items() if not math.isnan(line.batch)}
    assert takers == {"fdc", "tfft", "am_annealed", "tfft_annealed", "resampled", "resampled_tfft"}


def test_updates_of_annealed_fitting_are_those_that_its_stages_took(tmp_path: Path) -> None:
    for seed, rows in ((0, 6), (1, 8)):
        file = tmp_path / f"runs/risk_averse_2d/am_annealed/seed{seed}/history.csv"
        file.parent.mkdir(parents=True)
        file.write_text("active_share\n" + "1.0\n" * rows)
    lines = by_name(costs_of(tmp_path / "benchmarks", load_file(RISK, in_plane(seeds=2)).values()))
    assert lines["risk_averse_2d", "am_annealed"].updates == 7
    assert lines["risk_averse_2d", "tfft_annealed"].updates == 150  # nothing is there yet
    assert lines["risk_averse_2d", "am"].updates == 200


def test_what_was_not_measured_is_empty(benchmarks: Path, tmp_path: Path) -> None:
    (benchmarks / "planar_finetune/risk_averse_2d/am/seed0.tsv").unlink()
    (benchmarks / f"{MEASURE}/seed1.tsv").unlink()
    (am,) = (line for line in costs_of(benchmarks, load_file(RISK).values()) if line.method == "am")
    assert (am.seeds, am.finetune, am.assess) == (1, 21.0, 4.0)
    assert math.isnan(am.finetune_sd)
    prefix = tmp_path / "costs"
    words = ["--benchmarks", str(tmp_path / "none"), "--output-prefix", str(prefix)]
    assert main(["costs", str(RISK), str(HIERARCHY), *words]) == 0
    table = pd.read_csv(prefix.with_suffix(".csv"))
    assert (table["part"] == "runs").all()
    assert table[["finetune", "relative", "memory", "assess", "solve"]].isna().all(axis=None)
    assert "| am | 200 |  |  |  |  |  |  |  |  |  | 16.00 | 0 | 0 |" in prefix.with_suffix(".md").read_text()


def test_experiments_that_were_not_run_again_are_kept(benchmarks: Path, tmp_path: Path) -> None:
    """An earlier run of both files, and one of the first alone, in which each job took a second more."""
    for folder in ("first", "second"):
        (tmp_path / folder / "runs" / "risk_averse_2d").mkdir(parents=True)
    (tmp_path / "first" / "runs" / "hierarchy_2d" / "am").mkdir(parents=True)
    for folder, more in (("first", 0.0), ("second", 1.0)):
        write(tmp_path, f"{folder}/benchmarks/planar_finetune/risk_averse_2d/am/seed0", 20.0 + more, 500)
    write(tmp_path, f"first/benchmarks/{MEASURES}/seed0", 9.0, 700)

    def table(folder: str, *more: str) -> pd.DataFrame:
        prefix = tmp_path / folder / "costs"
        words = ["--benchmarks", str(tmp_path / folder / "benchmarks"), "--output-prefix", str(prefix)]
        assert main(["costs", str(RISK), str(HIERARCHY), *words, *more]) == 0
        return pd.read_csv(f"{prefix}.csv")

    first = table("first")
    second = table("second", "--earlier", str(tmp_path / "first" / "costs.csv"))
    kept = [
        frame[frame["experiment"].astype(str).str.startswith("hierarchy_2d")] for frame in (first, second)
    ]
    pd.testing.assert_frame_equal(*kept)
    assert kept[0]["assess"].notna().any()
    assert second[second["method"] == "am"]["finetune"].iloc[0] == 21.0
    totals = second[second["part"] == "rules"].set_index("rule")
    assert totals.loc[FINETUNE, ["jobs", "wall_seconds", "peak_memory_mb"]].tolist() == [
        2,
        41.0,
        500.0,
    ]
    assert totals.loc["planar_measure_hierarchy_2d", "wall_seconds"] == 9.0
    assert "kept from an earlier one" in (tmp_path / "second" / "costs.md").read_text()
    with pytest.raises(ResultsError, match=r"RISK\.csv: not a table of costs"):
        read_costs(tmp_path / "RISK.csv")


def test_memory_of_a_short_job_is_unknown(tmp_path: Path) -> None:
    (line,) = read_benchmark(write(tmp_path, "finetune/job", 0.4))
    assert line.seconds == 0.4
    assert math.isnan(line.memory)
    assert stage_costs(tmp_path) == {"finetune": {"jobs": 1, "wall_seconds": 0.4, "peak_memory_mb": 0.0}}
    assert read_benchmark(write(tmp_path, "finetune/job", 2, 99.5)) == [Measured(2.0, 99.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "No columns"),
        (HEADER, "no line of numbers"),
        (HEADER.replace("max_rss", "rss") + "1\t0\t1\t1\t1\t1\t0\t0\t0\t0\n", "no column 'max_rss'"),
        (HEADER + "fast\t0\t1\t1\t1\t1\t0\t0\t0\t0\n", "fast"),
        (HEADER + "-1\t0\t1\t1\t1\t1\t0\t0\t0\t0\n", "seconds"),
        (HEADER + "-\t0\t1\t1\t1\t1\t0\t0\t0\t0\n", "seconds"),
    ],
)
def test_a_malformed_benchmark_is_named(
    benchmarks: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = benchmarks / "planar_finetune/risk_averse_2d/am/seed0.tsv"
    file.write_text(text)
    for read in (lambda: stage_costs(benchmarks), lambda: costs_of(benchmarks, load_file(RISK).values())):
        with pytest.raises(ResultsError, match="not a benchmark of Snakemake") as caught:
            read()
        assert str(file) in str(caught.value)
        assert words in str(caught.value)
        assert "delete it" in str(caught.value)
    out = str(benchmarks / "costs")
    assert main(["costs", str(RISK), "--benchmarks", str(benchmarks), "--output-prefix", out]) == 1
    assert str(file) in capsys.readouterr().err
    assert not Path(f"{out}.csv").exists()


def test_functionals_are_relative_to_the_expected_reward(tmp_path: Path) -> None:
    for case, seconds in (("expected_reward", 10.0), ("renyi", 60.0), ("wasserstein1", 25.0)):
        write(tmp_path, f"planar_finetune/hierarchy_2d/{case}/fdc/seed0", seconds, 700)
    write(tmp_path, f"{MEASURES}/seed0", 4.0, 600)
    cases = load_file(HIERARCHY)
    lines = costs_of(tmp_path, cases.values())
    assert list(dict.fromkeys(line.experiment for line in lines)) == list(cases)
    named = by_name(lines)
    assert named["hierarchy_2d/renyi", "fdc"].relative == 6.0
    assert math.isnan(named["hierarchy_2d/renyi", "fdc"].solve)
    transport = named["hierarchy_2d/wasserstein1", "fdc"]
    assert (transport.finetune, transport.relative, transport.assess) == (25.0, 2.5, 4.0)
    assert transport.updates == 4 * cases["hierarchy_2d/wasserstein1"].updates_of("fdc")
    panel = cost_panel([line for line in lines if line.method == "fdc"], "Hierarchy")
    assert [line[0] for line in panel.lines] == [name.partition("/")[2] for name in cases]
    assert [line[-3] for line in panel.lines] == [
        "4.000",
        *[""] * (len(cases) - 1),
    ]  # one job for all of them


def test_a_method_that_continues_another_counts_its_own_updates(tmp_path: Path) -> None:
    lines = {line.method: line for line in costs_of(tmp_path, load_file(ITERATIONS).values())}
    each = lines["fdc_k1"].updates
    assert [lines[f"fdc_k{k}"].updates / each for k in (2, 5, 10, 20)] == [1, 3, 5, 10]


def test_totals_by_rule(benchmarks: Path) -> None:
    prefix = benchmarks / "out" / "costs"
    words = [
        "--benchmarks",
        str(benchmarks),
        "--override",
        json.dumps(in_plane(seeds=2)),
        "--output-prefix",
        str(prefix),
    ]
    assert main(["costs", str(RISK), *words]) == 0
    table = pd.read_csv(prefix.with_suffix(".csv")).query("part == 'rules'").set_index("rule")
    assert table.loc[FINETUNE, ["jobs", "wall_seconds", "peak_memory_mb"]].tolist() == [
        6,
        163.0,
        510.0,
    ]
    assert table.loc["planar_exact", "wall_seconds"] == 15.0
    text = prefix.with_suffix(".md").read_text()
    assert f"| all | 10 | {163 + 9 + 15:.1f} | 800.0 |" in text
    assert "booktabs" in prefix.with_suffix(".tex").read_text()


def test_what_trains_nothing_has_its_cost_a_sample_and_where_tuning_is_even(tmp_path: Path) -> None:
    """On molecules, whose passes are counted: am takes 20,000, and a plain sample 4 times 5."""
    (experiment,) = load_file(MOLECULES, {"molecules": {"seeds": 2}}).values()
    runs = tmp_path / "runs" / "molecules_qm9"
    for seed in (0, 1):
        (runs / f"am/seed{seed}").mkdir(parents=True)
        (runs / f"am/seed{seed}/history.csv").write_text("active_share,network_passes\n1,20000\n")
        (runs / f"best_of_4/seed{seed}").mkdir(parents=True)
        row = {"best_of_4": {"sample_passes": 80.0, "sample_rewards": 4.0 + 2 * seed}}
        (runs / f"best_of_4/seed{seed}/metrics.json").write_text(json.dumps({"rows": row}))
        write(tmp_path / "benchmarks", f"molecules_keep/molecules_qm9/best_of_4/seed{seed}", 30.0 + seed)
        for stage, method in (("evaluate", "best_of_4"), ("sample", "am"), ("evaluate", "am")):
            write(tmp_path / "benchmarks", f"molecules_{stage}/molecules_qm9/{method}/seed{seed}", 10.0)
    lines = costs_of(tmp_path / "benchmarks", [experiment])
    found = {line.method: line for line in lines}
    best, am, data = found["best_of_4"], found["am"], found["data"]
    assert (best.sample_passes, best.sample_rewards, best.keep) == (80, 5, 30.5)
    assert (am.sample_passes, am.sample_rewards) == (20, 0)
    assert best.even == 20000 / (80 - 20)
    assert math.isnan(am.even)
    assert math.isnan(data.sample_passes)
    assert math.isnan(found["best_of_16"].sample_passes)  # not run
    assert (best.assess, am.assess) == (10, 20)  # its samples are drawn as they are kept
    panel = cost_panel(lines, "Molecules")
    shown = dict(zip(panel.header, next(line for line in panel.lines if line[0] == "best_of_4"), strict=True))
    assert shown["keeping samples (s)"] == "30.50"
    assert (shown["network passes a sample"], shown["even at samples"]) == ("80.00", "333.3")
