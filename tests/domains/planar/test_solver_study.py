"""The comparison of control solvers: gaps from metrics, costs from histories."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from flowtilt.domains.planar.solver_study import (
    SolverRun,
    costs_of,
    solver_points,
    solver_runs,
    solvers_panel,
)
from flowtilt.pipeline.experiment import Experiment, load_file
from flowtilt.pipeline.report.measurements import ResultsError, collect_runs, runs_of
from flowtilt.pipeline.report.tables import write_table
from made_up import functional_metrics, write_histories, write_metrics
from small import CONFIG, in_plane

FILE = CONFIG / "experiments" / "solvers_2d.yaml"
(SOLVES,) = {method.iterations for method in load_file(FILE)["solvers_2d/entropy"].methods.values()}


def write_study(results: Path, seeds: int) -> list[Experiment]:
    cases = list(load_file(FILE, in_plane(seeds=seeds)).values())
    for case in cases:
        write_metrics(results, runs_of(case), functional_metrics)
        write_histories(results, case)
    return cases


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[SolverRun]:
    results = tmp_path_factory.mktemp("results")
    cases = write_study(results, 2)
    return solver_runs(results, collect_runs(results, map(runs_of, cases)), cases)


def test_every_method_of_every_case_has_a_run_a_seed(runs: list[SolverRun]) -> None:
    kinds = {"expected_reward": "am", "lower_tail": "tfft", "upper_tail": "tfft", "entropy": "fdc"}
    assert {(run.case, run.kind) for run in runs} == set(kinds.items())
    budgets = {(run.solver, run.updates) for run in runs}
    assert len(runs) == 4 * len(budgets) * 2
    for solver in ("adjoint_matching", "weighted_fitting"):
        assert len({updates for name, updates in budgets if name == solver}) == 2


def test_gap_is_to_the_optimum_of_the_same_seed(runs: list[SolverRun]) -> None:
    """From seed to 10 + seed the made-up networks reach 8 + seed."""
    for run in runs:
        assert run.gap == pytest.approx(100 * 2 / (10 + run.seed))
        assert run.closed == pytest.approx(80.0)


def test_costs_of_a_run_add_up_over_its_solves(runs: list[SolverRun]) -> None:
    for run in runs:
        assert run.solves == (SOLVES if run.case == "entropy" else 1)
        assert (run.network_passes, run.seconds) == (2000 * run.solves, 2.0 * run.solves)
        if run.solver == "weighted_fitting":
            assert run.effective_sample_size == 1000 - 100 * run.solves - run.seed
            assert run.relative_gap == pytest.approx(1e-9 * run.solves)
        else:
            assert math.isnan(run.effective_sample_size)
            assert math.isnan(run.relative_gap)


def test_points_are_means_over_seeds_but_for_the_worst_bank(runs: list[SolverRun]) -> None:
    points = solver_points(runs)
    assert len(points) == len(runs) // 2
    for point in points:
        assert point.seeds == 2
        assert point.gap == pytest.approx((20 + 200 / 11) / 2)
        assert point.gap_sd == pytest.approx((20 - 200 / 11) / math.sqrt(2))
    weighted = [p for p in points if (p.case, p.solver) == ("entropy", "weighted_fitting")]
    assert SOLVES > 1
    assert [p.effective_sample_size for p in weighted] == [999.0 - 100 * SOLVES] * 2
    panel = solvers_panel(points, "Solvers")
    assert len(panel.lines) == len(points)
    assert panel.caption == "Solvers: mean ± sd over 2 seeds"


def test_table_is_written_with_its_note(tmp_path: Path) -> None:
    write_study(tmp_path, 1)
    write_table(FILE, in_plane(seeds=1), tmp_path, CONFIG / "reported_results.csv", tmp_path / "solvers_2d")
    frame = pd.read_csv(tmp_path / "solvers_2d.csv")
    assert {"gap", "closed", "network_passes", "seconds", "effective_sample_size"} <= set(frame)
    assert "one core of the machine" in (tmp_path / "solvers_2d.md").read_text()


def test_a_history_that_is_missing_or_broken_says_how_to_make_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs/solvers_2d/entropy/am/seed0"
    history = folder / "history.csv"
    with pytest.raises(ResultsError, match=r"history.csv: no such file; make it with `snakemake"):
        costs_of(history)
    folder.mkdir(parents=True)
    history.write_text("update,seconds\n0,1.0\n")
    with pytest.raises(ResultsError, match="no column network_passes"):
        costs_of(history)
    history.write_text("network_passes,seconds\n1,soon\n")
    with pytest.raises(ResultsError, match=r"not a history .*make it again with"):
        costs_of(history)
