"""Tables from made-up metrics: reading, statistics, verdicts, studies and what is written."""

from __future__ import annotations

import csv
import json
import math
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtilt.domains.planar.figures import draw_study
from flowtilt.domains.planar.studies import (
    StudyRuns,
    findings,
    resolves_from,
    study_panels,
    study_points,
    study_runs_of,
)
from flowtilt.domains.planar.tables import experiment_panels, experiment_table, study_table
from flowtilt.files import atomic_path
from flowtilt.pipeline.experiment import load_file, read_study
from flowtilt.pipeline.report.comparison import COMPARISON_COLUMNS, comparison, read_reported
from flowtilt.pipeline.report.measurements import (
    LONG_COLUMNS,
    SOLUTIONS,
    Method,
    ResultsError,
    Runs,
    collect,
    entries,
    row_name,
    run_folder,
    runs_of,
    split_row,
    summarise,
    with_gaps,
)
from flowtilt.pipeline.report.panels import Panel, describe, latex, markdown, pretty
from flowtilt.pipeline.report.tables import (
    headline,
    table_frame,
    write_comparison,
    write_panels,
    write_table,
)
from made_up import (
    METHODS,
    functional_metrics,
    made_up_runs,
    plain_metrics,
    write_histories,
    write_metrics,
)
from small import CONFIG, in_plane

REPORTED = CONFIG / "reported_results.csv"
TAILS = {
    row_name(method, solution): tail
    for method, tails in {
        "pretrained": (262.0, 261.0, 261.0),
        "am": (289.0, 92.0, 280.0),
        "fdc": (110.0, 91.0, 105.0),
        "tfft": (95.0, 90.0, 93.0),
    }.items()
    for solution, tail in zip(SOLUTIONS, tails, strict=True)
}


def reported_frame(*lines: tuple[str, str, str, str, float]) -> pd.DataFrame:
    """Reported values from (source, experiment, method, metric, value)."""
    names = ["source", "experiment", "method", "metric", "value"]
    return pd.DataFrame(lines, columns=names).assign(unit="cost")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    runs = made_up_runs()
    write_metrics(tmp_path, runs, plain_metrics(runs, TAILS))
    return tmp_path


@pytest.fixture
def long(results: Path) -> pd.DataFrame:
    return collect(results, made_up_runs())


# ------------------------------------------------------------------------------- reading


def test_collect_gives_every_metric_of_every_row_once(long: pd.DataFrame) -> None:
    assert list(long.columns) == list(LONG_COLUMNS)
    assert not long.duplicated(["experiment", "method", "metric", "seed"]).any()
    assert list(dict.fromkeys(long["method"]))[:4] == [
        "pretrained",
        "pretrained_exact",
        "pretrained_resolved",
        "am",
    ]
    chosen = long[(long["method"] == "am_exact") & (long["metric"] == "worst_1pct_cost")]
    assert list(chosen["value"]) == [92.0, 93.0]


def test_undefined_metric_stays_undefined(long: pd.DataFrame) -> None:
    chosen = long[(long["method"] == "am_exact") & (long["metric"] == "active_share")]
    assert chosen["value"].isna().all()


def test_missing_file_is_named_with_the_command_that_makes_it(results: Path) -> None:
    path = results / "runs/risk_averse_2d/fdc/seed1/metrics.json"
    path.unlink()
    with pytest.raises(ResultsError, match=re.escape(f"snakemake --cores all {path}")):
        collect(results, made_up_runs())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"rows": 1}',
        '{"rows": {}}',
        '{"rows": {"fdc": 1}}',
        '{"rows": {"fdc": {"kl": "1"}}}',
        '{"rows": {"fdc": {"kl": true}}}',
        '{"rows": {"fdc": {"kl": NaN}}}',
    ],
)
def test_malformed_file_is_named_with_the_fix(results: Path, content: str) -> None:
    path = results / "runs/risk_averse_2d/fdc/seed0/metrics.json"
    path.write_text(content)
    with pytest.raises(ResultsError) as caught:
        collect(results, made_up_runs())
    assert str(path) in str(caught.value)
    assert "--force" in str(caught.value)


def test_only_the_pretrained_model_may_lack_an_exact_row(results: Path) -> None:
    for seed in (0, 1):
        path = results / f"runs/risk_averse_2d/exact/seed{seed}/metrics.json"
        rows = json.loads(path.read_text())["rows"]
        del rows["pretrained_exact"]
        path.write_text(json.dumps({"rows": rows}))
    assert "pretrained_exact" not in set(collect(results, made_up_runs())["method"])
    path.write_text(json.dumps({"rows": {k: v for k, v in rows.items() if k != "am_exact"}}))
    with pytest.raises(ResultsError, match=re.escape("no row 'am_exact'")):
        collect(results, made_up_runs())


def test_reported_values_of_the_project_are_read() -> None:
    table = read_reported(REPORTED)
    chosen = table[(table["experiment"] == "risk_averse_2d") & (table["method"] == "fdc")]
    assert list(chosen["value"]) == [90.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("source,experiment,method,metric,value\n", "no column unit"),
        ("source,experiment,method,metric,value,unit\na,b,c,d,many,cost\n", "line 2"),
        ("source,experiment,method,metric,value,unit\na,b,c,d,inf,cost\n", "line 2"),
        ("source,experiment,method,metric,value,unit\n" + "a,b,c,d,1,cost\n" * 2, "twice"),
        ("source,experiment,method,metric,value,uncertainty,unit\na,b,c,d,1,-1,cost\n", "uncertainty"),
        ("source,experiment,method,metric,value,uncertainty,unit\na,b,c,d,1,few,cost\n", "line 2"),
        ("", "not a CSV table"),
    ],
)
def test_bad_reported_values_are_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "reported.csv"
    path.write_text(content)
    with pytest.raises(ResultsError, match=message) as caught:
        read_reported(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ResultsError, match="no such file"):
        read_reported(tmp_path / "none.csv")


def test_tables_import_without_torch() -> None:
    code = "import sys, flowtilt.pipeline.report.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------- statistics


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_summary_is_mean_and_sample_sd(values: list[float]) -> None:
    frame = pd.DataFrame([("e", "am", "kl", s, v) for s, v in enumerate(values)], columns=list(LONG_COLUMNS))
    (entry,) = entries(summarise(frame))
    assert entry.value == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-6)
    assert entry.seeds == len(values)
    if len(values) == 1:
        assert math.isnan(entry.sd)
    else:
        assert entry.sd == pytest.approx(np.std(values, ddof=1), rel=1e-9, abs=1e-6)


def test_one_undefined_seed_makes_the_mean_undefined() -> None:
    lines = [("e", "am", "kl", 0, 1.0), ("e", "am", "kl", 1, math.nan)]
    (entry,) = entries(summarise(pd.DataFrame(lines, columns=list(LONG_COLUMNS))))
    assert math.isnan(entry.value)


def test_gap_is_taken_seed_by_seed() -> None:
    values = {"am": (1.0, 5.0), "am_exact": (4.0, 6.0), "am_resolved": (4.0, 8.0)}
    lines = [("e", row, "objective", s, v) for row, pair in values.items() for s, v in enumerate(pair)]
    summary = {(e.row, e.metric): e for e in entries(summarise(with_gaps(_long(lines))))}
    assert summary["am", "gap"].value == 2.0
    assert summary["am", "gap"].sd == pytest.approx(math.sqrt(2))
    assert summary["am_resolved", "gap"].value == -1.0
    assert summary["am", "relative_gap"].value == pytest.approx((75 + 100 / 6) / 2)
    assert ("am_exact", "gap") not in summary


def _long(lines: list[tuple[str, str, str, int, float]]) -> pd.DataFrame:
    return pd.DataFrame(lines, columns=list(LONG_COLUMNS))


@given(
    st.sampled_from(["am", "fdc_k5", "exactly", "tfft"]), st.sampled_from(["network", "exact", "resolved"])
)
def test_row_names_split_back(method: str, solution: str) -> None:
    assert split_row(row_name(method, solution)) == (method, solution)


# ------------------------------------------------------------------------------- wording


@pytest.mark.parametrize(
    ("value", "sd", "text"),
    [
        (288.1234, 1.234, "288.1 ± 1.2"),
        (288.1234, 12.34, "288 ± 12"),
        (1234567.0, 0.01, "1234567 ± 0"),
        (0.123456, 0.00123, "0.1235 ± 0.0012"),
        (0.5, 0.0, "0.5000 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (0.0, math.nan, "0"),
        (0.0, 0.0123, "0.000 ± 0.012"),
        (-0.0001, 0.1, "0.00 ± 0.10"),
        (-12.345, math.nan, "-12.35"),
        (1e-9, math.nan, "0.000000"),
        (math.nan, math.nan, "n/a"),
        (100.0, 1e-14, "100.0 ± 0"),
    ],
)
def test_pretty(value: float, sd: float, text: str) -> None:
    assert pretty(value, sd) == text


@given(st.floats(-1e9, 1e9), st.one_of(st.just(math.nan), st.floats(0, 1e9)))
def test_pretty_reads_back_within_its_rounding(value: float, sd: float) -> None:
    shown = float(pretty(value, sd).split(" ± ")[0])
    room = max(0.06 * sd if math.isfinite(sd) else 0.0, 1e-3 * abs(value), 1e-6)
    assert abs(shown - value) <= room


def test_descriptions() -> None:
    assert describe("worst_1pct_cost").header == "worst-1 % mean (cost)"
    assert describe("top_0.2pct_reward") == ("top-0.2 % mean", "reward", "higher")
    assert describe("something_new").header == "something new"


def test_latex_is_escaped_and_rectangular() -> None:
    panel = Panel(
        "50 % of a_b", ["method", "worst-1 % mean (cost)"], [["a_b & c", "-1.0 ± 0.2"], ["#{}$", ""]]
    )
    text = latex([panel])
    body = text.splitlines()
    assert text.startswith("% needs")
    assert r"a\_b \& c & $-1.0 \pm 0.2$ \\" in body
    assert r"method & \shortstack[r]{worst-1 \% mean\\(cost)} \\" in body
    assert text.count("{") == text.count("}")
    assert text.count(r"\begin{tabular}{lr}") == text.count(r"\end{tabular}") == 1
    assert "±" not in text
    rows = [line for line in body if " & " in line]
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 for line in rows)


def test_markdown_escapes_bars() -> None:
    assert markdown([Panel("", ["a", "b"], [["x|y", "1"]])]).splitlines()[2] == r"| x\|y | 1 |"


# ------------------------------------------------------------------------- an experiment


def test_experiment_table_puts_reported_values_beside_ours(long: pd.DataFrame) -> None:
    first, details = experiment_panels(long, made_up_runs(), read_reported(REPORTED))
    gains = ["gain over pretrained", "reported gain (fdc)", "verdict"]
    assert first.header[:6] == ["method", "worst-1 % mean (cost)", "reported (fdc)", *gains]
    assert first.header[-2:] == ["G (reward)", "gap to exact (reward)"]
    rows = {line[0]: line for line in first.lines}
    assert list(rows)[:4] == ["pretrained", "pretrained, exact", "pretrained, at finite resolution", "am"]
    assert rows["am"][1:6] == ["289.50 ± 0.71", "288.2", "27.00 ± 0", "25.7", "same direction"]
    assert rows["am, exact"][1:6] == ["92.50 ± 0.71", "", "", "", ""]
    assert rows["am"][-1] == "197.0 ± 0"
    assert rows["am, exact"][-1] == ""
    assert "G of the tail (reward)" in details.header
    assert "active samples (share)" not in details.header  # in the panel of all domains


def test_two_sources_give_two_columns(long: pd.DataFrame) -> None:
    names = ("risk_averse_2d", "am", "worst_1pct_cost")
    reported = reported_frame(("a", *names, 1.0), ("b", *names, 289.0)).assign(same=True)
    first, _ = experiment_panels(long, made_up_runs(), reported)
    assert first.header[2:6] == ["reported (a)", "verdict", "reported (b)", "verdict"]
    assert next(line for line in first.lines if line[0] == "am")[2:6] == ["1", "differs", "289", "match"]


def test_written_table_reads_back_in_full_precision(results: Path, long: pd.DataFrame) -> None:
    write_panels(results / "tables/risk", *experiment_table(results, made_up_runs(), read_reported(REPORTED)))
    frame = table_frame(long, read_reported(REPORTED))
    with (results / "tables/risk.csv").open(newline="") as stream:
        read = list(csv.DictReader(stream))
    for column in ("value", "sd", "reported"):
        np.testing.assert_array_equal([float(line[column] or "nan") for line in read], frame[column])
    assert {"gap", "relative_gap"} <= {line["metric"] for line in read}
    assert {line["solution"] for line in read} == {"network", "exact", "resolved"}
    assert sorted(p.name for p in (results / "tables").iterdir()) == ["risk.csv", "risk.md", "risk.tex"]
    assert "± " in (results / "tables/risk.md").read_text(encoding="utf-8")


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    runs = made_up_runs(seeds=(3,))
    write_metrics(tmp_path, runs, plain_metrics(runs, TAILS))
    write_panels(tmp_path / "t", *experiment_table(tmp_path, runs, read_reported(REPORTED)))
    assert pd.read_csv(tmp_path / "t.csv")["sd"].isna().all()
    text = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "one seed" in text
    assert "±" not in text


def test_failure_leaves_the_earlier_table(results: Path) -> None:
    write_panels(results / "t", *experiment_table(results, made_up_runs(), read_reported(REPORTED)))
    before = {p.name: p.read_bytes() for p in results.glob("t.*")}
    (results / "runs/risk_averse_2d/am/seed0/metrics.json").write_text("{")
    with pytest.raises(ResultsError):
        write_panels(results / "t", *experiment_table(results, made_up_runs(), read_reported(REPORTED)))
    assert {p.name: p.read_bytes() for p in results.glob("t.*")} == before


def functional_runs(results: Path, changes: dict[str, float]) -> Runs:
    """An experiment on functionals, two seeds, whose networks change G by 8, but those named on seed 1."""
    runs = made_up_runs("entropy_2d", "reward", mass=1.0, solutions=("network", "exact", "optimum"), title="")
    runs = replace(runs, tail_metric="functional", solved_apart=False)

    def value(method: str, solution: str, seed: int) -> dict[str, float | None]:
        metrics = functional_metrics(method, solution, seed)
        if solution == "network" and seed == 1 and method in changes:
            metrics["functional"] = 1.0 + changes[method]
        return metrics

    write_metrics(results, runs, value)
    return runs


def test_a_network_that_lowers_its_own_objective_is_named(tmp_path: Path) -> None:
    """Under the gap that is closed on average, a seed on which G falls would not be seen."""
    runs = functional_runs(tmp_path, {"fdc": -0.5, "tfft": 0.5})
    write_panels(tmp_path / "t", *experiment_table(tmp_path, runs, read_reported(REPORTED)))
    text = (tmp_path / "t.md").read_text()
    assert "- fdc lowers its own G on 1 of 2 seeds: it changes by 3.8 ± 6.0 from that" in text
    assert "- G rises over that of the pretrained distribution on every seed under am, tfft." in text


def test_on_a_tail_the_objective_is_compared_with_the_pretrained_one(results: Path) -> None:
    """Costs: the made-up am has a mean of 144.5 where 131 is that of the pretrained model; G is 10 less."""
    write_panels(results / "t", *experiment_table(results, made_up_runs(), read_reported(REPORTED)))
    text = (results / "t.md").read_text()
    assert "- am lowers its own G on 2 of 2 seeds" in text
    assert "every seed under fdc, tfft." in text


def test_studies_name_what_lowers_its_own_objective(tmp_path: Path) -> None:
    study = width_study(tmp_path, {0.1: 300.0, 0.2: 100.0})
    with_base = replace(study, cases=tuple(replace(c, methods=METHODS[:2]) for c in study.cases))
    for runs, tail in zip(with_base.cases, (300.0, 100.0), strict=True):
        tails = {row_name(m, solution): 262.0 for m in ("pretrained", "am") for solution in SOLUTIONS}
        write_metrics(tmp_path, runs, plain_metrics(runs, tails | {"am": tail}))
    write_panels(tmp_path / "t", *study_table(tmp_path, with_base))
    text = (tmp_path / "t.md").read_text()
    assert text.count("lowers its own G") == 1
    assert f"- {with_base.cases[0].name.split('/')[-1]}: am lowers its own G on 2 of 2 seeds" in text


def test_headline_without_a_mean_shows_the_objective_and_its_divergence(tmp_path: Path) -> None:
    """Where there is no reward, what is reported is not what was maximised."""
    runs = functional_runs(tmp_path, {})
    long = collect(tmp_path, runs)
    long = long[long["metric"] != "mean_reward"]
    own = [("entropy_2d", m.name, "entropy", s, 8.0 + s) for m in runs.methods for s in runs.seeds]
    long = pd.concat([long, pd.DataFrame(own, columns=list(LONG_COLUMNS))], ignore_index=True)
    reported = reported_frame(("fdc", "entropy_2d", "fdc", "entropy", 7.0)).assign(unit="nats")
    path = tmp_path / "comparison.csv"
    comparison(long, reported).to_csv(path, index=False)
    lines = headline(path).splitlines()
    header = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert header[-5:] == [
        "G",
        "exact G",
        "optimum G",
        "KL from pretrained (nats)",
        "exact KL from pretrained (nats)",
    ]
    fdc = [cell.strip() for cell in lines[6].strip("|").split("|")]
    assert fdc[0] == "fdc"
    assert fdc[-5:] == ["8.50 ± 0.71", "10.00 ± 0.71", "10.50 ± 0.71", "0.5000 ± 0", "0.5000 ± 0"]


def test_headline_shows_ours_beside_theirs(long: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "comparison.csv"
    comparison(long, read_reported(REPORTED)).to_csv(path, index=False)
    lines = headline(path).splitlines()
    assert lines[0] == "**risk_averse_2d, worst-1 % mean: mean ± sd over 2 seeds; lower is better**"
    cells = [cell.strip() for cell in lines[5].strip("|").split("|")]
    assert cells == [
        "am",
        "289.50 ± 0.71",
        "288.2",
        "27.00 ± 0",
        "25.7",
        "same direction",
        "92.50 ± 0.71",
        "280.50 ± 0.71",
        "144.75 ± 0.35",
    ]
    cells = [cell.strip() for cell in lines[7].strip("|").split("|")]
    assert cells[:6] == ["tfft", "95.50 ± 0.71", "", "", "", ""]
    assert len(lines) == 8
    with pytest.raises(ResultsError, match="no column"):
        headline(REPORTED)


# ------------------------------------------------------------------------------- studies


def width_study(results: Path, tails: dict[float, float], exact: float = 100.0) -> StudyRuns:
    """A study of one landscape whose network tails are given by width."""
    cases = []
    for width, tail in tails.items():
        runs = made_up_runs(f"widths/stripes-{width}", methods=METHODS[1:2], of="risk_averse_2d", value=width)
        values = {"am": tail, "am_exact": exact, "am_resolved": tail}
        write_metrics(results, runs, plain_metrics(runs, values))
        cases.append(runs)
    return StudyRuns("widths", "Widths", "half-width", tuple(cases), 0.05)


@pytest.mark.parametrize(
    ("misses", "expected"),
    [
        ([(0.1, 0.5), (0.2, 0.05), (0.4, -0.01)], 0.2),
        ([(0.1, 0.01), (0.2, 0.06), (0.4, 0.0)], 0.4),
        ([(0.4, 0.0), (0.2, 0.0), (0.1, 0.0)], 0.1),
        ([(0.1, 0.0), (0.4, -0.2)], None),
        ([(0.1, 0.0), (0.4, math.nan)], None),
        ([], None),
    ],
)
def test_resolved_width_needs_all_larger_ones(
    misses: list[tuple[float, float]], expected: float | None
) -> None:
    assert resolves_from(misses, 0.05) == expected


def test_study_says_where_the_network_resolves(tmp_path: Path) -> None:
    study = width_study(tmp_path, {0.05: 290.0, 0.4: 101.0, 0.2: 104.0})
    points = study_points(collect_study(tmp_path, study), study)
    assert [p.axis for p in points if (p.row, p.metric) == ("am", "kl")] == [0.05, 0.2, 0.4]
    said = findings(points, study)
    assert said[0] == (
        "risk_averse_2d, am: the network's worst-1 % mean is within 5 % of the exact row's at "
        "half-width ≥ 0.2; at 0.05 it is off by +189 %."
    )
    assert len(said) == 2
    (panel,) = study_panels(points, study)
    assert panel.header[:3] == ["half-width", "method", "worst-1 % mean (cost), network"]
    assert [line[0] for line in panel.lines] == ["0.05", "0.2", "0.4"]


def test_study_that_never_resolves_says_so(tmp_path: Path) -> None:
    study = width_study(tmp_path, {0.05: 290.0, 0.2: 100.0, 0.4: 150.0})
    said = findings(study_points(collect_study(tmp_path, study), study), study)
    assert "is at no half-width within 5 %" in said[0]
    assert "at 0.4 it is off by +49.8 %" in said[0]


def collect_study(results: Path, study: StudyRuns) -> pd.DataFrame:
    return pd.concat([collect(results, case) for case in study.cases], ignore_index=True)


def test_iterations_stand_beside_the_line_of_reference(tmp_path: Path) -> None:
    methods = (
        Method("fdc_k1", "fdc", 1.0),
        Method("fdc_k10", "fdc", 10.0),
        Method("fdc_k2", "fdc", 2.0),
        Method("tfft", "tfft"),
    )
    runs = made_up_runs("iterations/novelty", "reward", methods=methods, of="novelty_2d")
    network = {"fdc_k1": 100.0, "fdc_k2": 300.0, "fdc_k10": 200.0, "tfft": 250.0}
    tails = {
        row_name(m, solution): v for m, v in network.items() for solution in ("network", "exact", "resolved")
    }
    write_metrics(tmp_path, runs, plain_metrics(runs, tails))
    study = StudyRuns("iterations", "Iterations", "K", (runs,))
    points = study_points(collect_study(tmp_path, study), study)
    (panel,) = study_panels(points, study)
    assert [line[:2] for line in panel.lines] == [
        ["1", "fdc_k1"],
        ["2", "fdc_k2"],
        ["10", "fdc_k10"],
        ["reference", "tfft"],
    ]
    said = findings(points, study)
    assert said[0] == (
        "novelty_2d: fdc has its best G of the tail at K = 2: 290.50 ± 0.71, 50.00 above tfft."
    )
    assert len(said) == 3
    write_panels(tmp_path / "tables/iterations", *study_table(tmp_path, study))
    frame = pd.read_csv(tmp_path / "tables/iterations.csv")
    assert frame.loc[frame["row"] == "tfft", "axis"].isna().all()
    assert set(frame.loc[frame["series"] == "fdc", "axis"]) == {1.0, 2.0, 10.0}
    text = (tmp_path / "tables/iterations.md").read_text(encoding="utf-8")
    assert f"- {said[0]}" in text


def test_methods_that_train_nothing_stand_in_a_study_without_rows_at_finite_resolution(
    tmp_path: Path,
) -> None:
    methods = (*METHODS, Method("best_of_4", "best_of"), Method("steered", "steered"))
    cases = [
        made_up_runs(f"widths/{width}", methods=methods, of="risk_averse_2d", value=width)
        for width in (0.1, 0.2)
    ]
    tails = {row_name(m.name, solution): 90.0 for m in methods for solution in SOLUTIONS}
    for runs in cases:
        write_metrics(tmp_path, runs, plain_metrics(runs, tails))
        for seed in runs.seeds:
            file = run_folder(tmp_path, runs, "am", "resolved", seed) / "metrics.json"
            rows = json.loads(file.read_text())["rows"]
            del rows["best_of_4_resolved"], rows["steered_resolved"]
            file.write_text(json.dumps({"rows": rows}))
    study = StudyRuns("widths", "Widths", "half-width", tuple(cases), 0.05)
    _, (panel,), note = study_table(tmp_path, study)
    assert [line[1] for line in panel.lines if line[0] == "0.1"] == [m.name for m in methods]
    (line,) = (line for line in panel.lines if line[:2] == ["0.1", "steered"])
    shown = dict(zip(panel.header, line, strict=True))
    assert shown["worst-1 % mean (cost), exact"] == "90.50 ± 0.71"
    assert shown["worst-1 % mean (cost), finite resolution"] == ""
    assert "am: the network's" in note
    assert "steered" not in note  # what is said is of networks
    draw_study(tmp_path, study, tmp_path / "widths")
    assert (tmp_path / "widths.png").is_file()
    # A row that is to be there and is not stops the table, as ever.
    file = run_folder(tmp_path, cases[0], "am", "exact", 0) / "metrics.json"
    rows = json.loads(file.read_text())["rows"]
    del rows["am_exact"]
    file.write_text(json.dumps({"rows": rows}))
    with pytest.raises(ResultsError, match="no row 'am_exact'"):
        collect(tmp_path, cases[0])


# ----------------------------------------------------------------- the project's own files


@pytest.mark.slow
def test_tables_of_all_the_projects_experiments(tmp_path: Path) -> None:
    other = ("molecules", "text_to_image")  # their own tests are elsewhere
    files = [f for f in sorted((CONFIG / "experiments").glob("*.yaml")) if not f.stem.startswith(other)]
    overrides = in_plane(seeds=2)
    names = []
    for file in files:
        for experiment in load_file(file, overrides).values():
            runs = runs_of(experiment)
            tails = {row_name(m.name, solution): 90.0 for m in runs.methods for solution in SOLUTIONS}
            metrics = plain_metrics(runs, tails) if runs.has_tail else functional_metrics
            write_metrics(tmp_path, runs, metrics)
            write_histories(tmp_path, experiment)
            names.append(runs.name)
        write_table(file, overrides, tmp_path, REPORTED, tmp_path / "tables" / file.stem)
        assert {p.suffix for p in (tmp_path / "tables").glob(f"{file.stem}.*")} == {".csv", ".md", ".tex"}
    write_comparison(
        files, overrides, tmp_path, REPORTED, tmp_path / "comparison.csv", tmp_path / "by_seed.csv"
    )
    frame = pd.read_csv(tmp_path / "comparison.csv", keep_default_na=False)
    assert tuple(frame.columns) == COMPARISON_COLUMNS
    assert list(dict.fromkeys(frame["experiment"])) == names
    judged = frame[frame["verdict"] != ""]
    assert list(dict.fromkeys(judged["experiment"])) == ["novelty_2d", "ot_2d", "risk_averse_2d"]
    assert (frame.loc[frame["source"] == "flowtilt", "reported"] == "").all()


def test_studies_know_what_varies() -> None:
    def loaded(name: str) -> StudyRuns:
        file = CONFIG / "experiments" / f"{name}.yaml"
        study = read_study(file)
        assert study is not None
        return study_runs_of(study, load_file(file).values())

    widths, iterations = loaded("resolution_2d"), loaded("iterations_2d")
    assert widths.tolerance == 0.05
    assert iterations.tolerance is None
    assert {case.of for case in widths.cases} == {"risk_averse_2d", "novelty_2d"}
    assert all(case.position(m) == case.value for case in widths.cases for m in case.methods)
    places = {m.name: iterations.cases[0].position(m) for m in iterations.cases[0].methods}
    assert places["tfft"] is None
    assert places["fdc_k5"] == 5.0


# --------------------------------------------------------------------------------- files


def test_atomic_path_renames_on_success_and_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.npz"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".npz"
        assert not target.exists()
        temporary.write_text("first")
    assert target.read_text() == "first"
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text(f"second{1 / 0}")
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_leaves_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "file")}
    assert len(modes) == 1
