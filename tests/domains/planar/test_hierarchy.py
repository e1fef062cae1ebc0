"""The hierarchy's table: tiers and curvatures from the code, what is reached from the results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from flowtilt.domains.planar.hierarchy import hierarchy_panel, reached
from flowtilt.functionals.registry import DIVERGENCES, UTILITIES
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.measurements import collect_runs, runs_of
from made_up import functional_metrics, write_metrics
from small import CONFIG, in_plane

FILE = CONFIG / "experiments" / "hierarchy_2d.yaml"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    results = tmp_path_factory.mktemp("results")
    cases = list(load_file(FILE, in_plane(seeds=2)).values())
    for case in cases:
        write_metrics(results, runs_of(case), functional_metrics)
    found = reached(collect_runs(results, map(runs_of, cases)), cases)
    assert len(hierarchy_panel(found, "Hierarchy").lines) == len(cases)
    return pd.DataFrame(found).set_index("label")


@pytest.mark.slow
def test_every_registered_functional_has_a_line(lines: pd.DataFrame) -> None:
    named = {part for name in lines["name"] for part in name.split(" + ")}
    assert {*UTILITIES, *DIVERGENCES} == named
    assert "no case" not in set(lines["verdict"])


@pytest.mark.slow
def test_a_functional_without_a_case_has_a_tier_and_no_numbers(tmp_path: Path) -> None:
    without = {**in_plane(seeds=1), "skip": {"hierarchy_2d": {"cases": ["diverse_modes"]}}}
    cases = list(load_file(FILE, without).values())
    for case in cases:
        write_metrics(tmp_path, runs_of(case), functional_metrics)
    found = reached(collect_runs(tmp_path, map(runs_of, cases)), cases)
    panel = hierarchy_panel(found, "Hierarchy")
    assert len(panel.lines) == len(cases) + 1
    lines = pd.DataFrame(found).set_index("label")
    assert list(lines.index[lines["verdict"] == "no case"]) == ["diverse_modes"]
    line = lines.loc["diverse_modes"]
    entry = UTILITIES["diverse_modes"]
    assert (line["tier"], line["needs"], line["seeds"]) == (entry.tier, entry.needs, 0)
    assert line["curvature"] in ("linear", "concave", "convex", "neither")
    assert line[["before", "after", "optimum", "closed", "closed_by_single"]].isna().all()


def test_single_solves_stand_beside_fdc_where_they_are_enough(lines: pd.DataFrame) -> None:
    single = lines[lines["single"] != ""]
    assert dict(single["single"]) == {"expected_reward": "am", "cvar": "tfft", "sq": "tfft"}
    assert single["closed_by_single"].to_numpy() == pytest.approx(80.0)
    for label, kind in single["single"].items():
        assert kind in lines.loc[label, "solvers"].split(", ")


def test_gap_is_the_share_of_the_way_to_the_optimum(lines: pd.DataFrame) -> None:
    """From 0 to 10 the made-up networks reach 8 and the exact rows 9.5, on either seed."""
    assert lines["closed"].to_numpy() == pytest.approx(80.0)
    assert lines["closed_by_exact_steps"].to_numpy() == pytest.approx(95.0)
    assert lines["sd"].to_numpy() == pytest.approx(0.0)
    assert (lines["seeds"] == 2).all()


def test_what_falls_short_is_said_by_tier(lines: pd.DataFrame) -> None:
    assert set(lines.loc[lines["tier"] == "general", "verdict"]) == {"reached"}
    assert set(lines.loc[lines["tier"] != "general", "verdict"]) == {"short of 90 %"}


@pytest.mark.parametrize(
    ("label", "tier", "curvature", "solvers"),
    [
        ("expected_reward", "linear", "linear", "am, fdc"),
        ("cvar", "convex", "convex", "tfft, fdc"),
        ("sq", "general", "concave", "tfft, fdc"),
        ("mean_variance", "general", "convex", "fdc"),
        ("entropy", "convex", "concave", "fdc"),
        ("reward_and_entropy", "convex", "concave", "fdc"),
        ("log_barrier", "convex", "concave", "fdc"),
        ("design_log_det", "convex", "concave", "fdc"),
        ("wasserstein1", "general", "convex", "fdc"),
        ("mmd", "convex", "convex", "fdc"),
        ("diverse_modes", "general", "convex", "fdc"),
    ],
)
def test_tiers_and_curvatures(
    lines: pd.DataFrame, label: str, tier: str, curvature: str, solvers: str
) -> None:
    assert tuple(lines.loc[label, ["tier", "curvature", "solvers"]]) == (tier, curvature, solvers)


def test_table_is_written(tmp_path: Path) -> None:
    from flowtilt.pipeline.report.tables import write_table

    for case in load_file(FILE, in_plane(seeds=1)).values():
        write_metrics(tmp_path, runs_of(case), functional_metrics)
    write_table(FILE, in_plane(seeds=1), tmp_path, CONFIG / "reported_results.csv", tmp_path / "hierarchy_2d")
    frame = pd.read_csv(tmp_path / "hierarchy_2d.csv")
    assert {"label", "tier", "curvature", "before", "after", "optimum", "closed", "verdict"} <= set(frame)
    text = (tmp_path / "hierarchy_2d.md").read_text()
    assert "gap closed" in text
    assert "am: 80.00" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| diverse_modes"))
    assert line.endswith("| reached |")
