"""Control solvers beside each other: how near each comes to a known optimum, and what that cost.

Gaps are from the metrics of the runs, costs from their histories: seconds differ from one time to the
next, and metrics do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.report.measurements import (
    by_row,
    mean_sd,
    read_history,
    row_name,
    run_folder,
    runs_of,
    totals_of,
    with_gaps,
)
from flowtilt.pipeline.report.panels import Panel, over_seeds, pretty


class SolverRun(NamedTuple):
    """One method of one case on one seed.

    ``gap`` is how far G is below the optimum in percent of the optimum's size, ``closed`` the share of the
    way there from the pretrained distribution in percent. Updates are of each solve, passes and seconds of
    all. Of the solves' banks there are the smallest effective sample size, and the largest primal-dual gap of
    their weights without sign; NaN without a bank.
    """

    case: str
    method: str
    kind: str
    solver: str
    solves: int
    updates: int
    seed: int
    gap: float
    closed: float
    network_passes: float
    seconds: float
    effective_sample_size: float
    relative_gap: float


class SolverPoint(NamedTuple):
    """One method of one case over its seeds: means, and standard deviations that are NaN for one seed."""

    case: str
    method: str
    kind: str
    solver: str
    solves: int
    updates: int
    gap: float
    gap_sd: float
    closed: float
    closed_sd: float
    network_passes: float
    seconds: float
    seconds_sd: float
    effective_sample_size: float
    relative_gap: float
    seeds: int


def costs_of(history: Path) -> dict[str, float]:
    """What the solves of a run took, from its history, and what the weights of their banks were worth.

    Solves of a run that this one continues are in that run's history, and not counted here.

    Raises:
        ResultsError: if the file is missing or malformed.
    """
    table = read_history(history, ("network_passes", "seconds"))
    totals = totals_of(table, "network_passes", "seconds")
    found = {name: float(totals[name]) for name in ("network_passes", "seconds")}
    # Rounding may leave a gap of either sign.
    for name, worst in (("effective_sample_size", "min"), ("relative_gap", "max")):
        found[name] = float(table[name].abs().agg(worst)) if name in table else math.nan
    return found


def solver_runs(results: str | Path, long: pd.DataFrame, cases: Sequence[Experiment]) -> list[SolverRun]:
    """Every run of the cases, in their order, by method and seed. Raises ResultsError if a history is missing
    or malformed."""
    reached, closed = by_row(long, "functional"), by_row(with_gaps(long), "gap_closed")
    runs = []
    for case in cases:
        folders = runs_of(case)
        for name, method in case.methods.items():
            if method.kind == "pretrained":
                continue
            for seed in case.seeds:
                optimum = reached[case.name, row_name(name, "optimum"), seed]
                missed = optimum - reached[case.name, name, seed]
                history = run_folder(results, folders, name, "network", seed) / "history.csv"
                run = SolverRun(
                    case=case.name.split("/")[-1],
                    method=name,
                    kind=method.kind,
                    solver=case.solver_of(name).kind,
                    solves=method.iterations or 1,
                    updates=case.updates_of(name),
                    seed=seed,
                    gap=100 * missed / abs(optimum) if optimum else math.nan,
                    closed=closed[case.name, name, seed],
                    **costs_of(history),
                )
                runs.append(run)
    return runs


def solver_points(runs: Sequence[SolverRun]) -> list[SolverPoint]:
    """Means over seeds; but the smallest effective sample size, and the largest primal-dual gap."""
    groups: dict[tuple[str, str], list[SolverRun]] = {}
    for run in runs:
        groups.setdefault((run.case, run.method), []).append(run)
    points = []
    for group in groups.values():
        first = group[0]
        points.append(
            SolverPoint(
                *(first.case, first.method, first.kind, first.solver, first.solves, first.updates),
                *mean_sd([run.gap for run in group]),
                *mean_sd([run.closed for run in group]),
                float(np.mean([run.network_passes for run in group])),
                *mean_sd([run.seconds for run in group]),
                min(run.effective_sample_size for run in group),
                max(run.relative_gap for run in group),
                len(group),
            )
        )
    return points


NOTE = (
    "Gap: how far G is below the largest of any distribution on the grid, in percent of that one's size; "
    "gap closed: the share of the way there from the pretrained distribution. The size of an entropy depends "
    "on the cells of the grid, the gap closed does not. Networks are measured by their own density on the "
    "grid. Updates are of each solve; am and tfft have one, fdc several. Passes and seconds are summed over "
    "solves. Passes are states through the network, in millions, a backward pass to the parameters "
    "counted as two and to the input as one, the bank of weighted fitting included. Values and gradients "
    "of what is tilted by are in the seconds alone: for the entropy that is the likelihood of each sample "
    "in weighted fitting's bank, and a score in Adjoint Matching. Neither the offline batch of tfft nor "
    "the distribution that fdc linearises at is in either. Seconds are those of one core of the machine that "
    "ran them, and alone in this table differ from one run to the next. Of the banks' weights the smallest "
    "effective sample size and the largest relative primal-dual gap of all solves and seeds are given."
)

SOLVER_WORDS = {
    "adjoint_matching": "Adjoint Matching",
    "weighted_fitting": "weighted fitting",
    "annealed_fitting": "annealed fitting",
}


def solvers_panel(points: Sequence[SolverPoint], title: str) -> Panel:
    """The table as text."""
    header = [
        *("case", "method", "solver", "solves", "updates", "gap (%)", "gap closed (%)"),
        *("passes (millions)", "seconds", "smallest ESS", "largest primal-dual gap"),
    ]
    cells = [
        [
            *(point.case, point.kind, SOLVER_WORDS[point.solver], str(point.solves), str(point.updates)),
            pretty(point.gap, point.gap_sd),
            pretty(point.closed, point.closed_sd),
            pretty(point.network_passes / 1e6),
            pretty(point.seconds, point.seconds_sd),
            "" if math.isnan(point.effective_sample_size) else f"{point.effective_sample_size:.0f}",
            "" if math.isnan(point.relative_gap) else f"{point.relative_gap:.1e}",
        ]
        for point in points
    ]
    seeds = over_seeds(max((point.seeds for point in points), default=1))
    return Panel(f"{title}: {seeds}", header, cells).without_empty_columns()
