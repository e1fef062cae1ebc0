"""Tables of experiments in the plane: every method's network, exact and finite-resolution row."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from flowtilt.domains.planar import hierarchy, solver_study
from flowtilt.domains.planar.claims import falling_steps, own_objective
from flowtilt.domains.planar.rows import FLOOR
from flowtilt.domains.planar.studies import Point, StudyRuns, findings, study_panels, study_points
from flowtilt.pipeline.health import HEALTH
from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.comparison import comparison, reported_columns, verdict_note
from flowtilt.pipeline.report.measurements import Runs, collect_runs, entries, runs_of, summarise, with_gaps
from flowtilt.pipeline.report.panels import Panel, over_seeds
from flowtilt.pipeline.report.tables import listed, panels_of, table_frame

_FLOOR_NOTE = (
    "The reference of divergences is the pretrained network's own density, and e^-"
    f"{FLOOR:g} of that of the data's distribution where it is lower: where it saw no data a network says "
    "anything, hundreds of nats below the distribution."
)

_FLOORED_NOTE = (
    f"{_FLOOR_NOTE} The mass on the floor is a row's own where the floor or the grid's border stands for the "
    "network; there the divergence is known from below alone."
)


ROW_NOTE = (
    "Rows: each method's network; the same steps solved exactly on a grid (exact); and solved there "
    "with the tilt's exponent blurred as a network blurs it (finite resolution). G is what a method "
    "maximises: the tail mean of the reward (am: its mean) less the KL weight times the KL divergence "
    "from the pretrained model. The gap is the exact row's G less the row's own, on the same seed. "
    f"{_FLOORED_NOTE}"
)


FUNCTIONAL_ROW_NOTE = (
    "Rows: each method's network; the same steps solved exactly on a grid (exact); and the largest G of "
    "any distribution on that grid (optimum). G is what a method maximises, for networks by their own "
    "density on the same grid, and so is the KL divergence. The gap closed is the share of the "
    f"way from the pretrained distribution to the optimum. {_FLOORED_NOTE}"
)


def experiment_panels(long: pd.DataFrame, runs: Runs, reported: pd.DataFrame) -> list[Panel]:
    """The table of one experiment: the results beside reported values, then the details."""
    summary = entries(summarise(with_gaps(long)))
    beside = reported_columns(comparison(long, reported))
    known = list(dict.fromkeys(e.metric for e in summary))
    first = [runs.tail_metric, "gap_closed", "sliced_w2", "sliced_w2_own", *beside, runs.mean_metric, "kl"]
    first += ["floored_mass", "objective", "gap"]
    first = [metric for metric in dict.fromkeys(first) if metric in known]
    rest = [metric for metric in known if metric not in (*first, *HEALTH, "relative_gap")]
    caption = f"{runs.title or runs.name}: {over_seeds(len(runs.seeds))}"
    return panels_of(summary, {caption: first, "Details": rest}, beside)


def experiment_table(results: str | Path, runs: Runs, reported: pd.DataFrame) -> Table:
    """The table of an ordinary experiment."""
    long = collect_runs(results, [runs])
    said = listed([*falling_steps(long, runs), *own_objective(long, runs)])
    rows = ROW_NOTE if runs.has_tail else FUNCTIONAL_ROW_NOTE
    note = f"{said}{rows} {verdict_note(comparison(long, reported))}".rstrip()
    return Table(table_frame(long, reported), experiment_panels(long, runs, reported), note)


def study_table(results: str | Path, study: StudyRuns) -> Table:
    """The table of a study; the text says what was found."""
    long = collect_runs(results, study.cases)
    points = study_points(long, study)
    frame = pd.DataFrame(points, columns=list(Point._fields)).astype({"axis": float})
    said = listed([*findings(points, study), *_lowered(long, study.cases)])
    return Table(frame, study_panels(points, study), f"{said}{ROW_NOTE}")


def _lowered(long: pd.DataFrame, cases: Iterable[Runs]) -> list[str]:
    """One sentence for each network of a study that lowers its own objective on some seed, and for exact
    steps that do."""
    return [
        f"{runs.name.split('/')[-1]}: {sentence}"
        for runs in cases
        for sentence in [*falling_steps(long, runs), *own_objective(long, runs)]
        if "lower" in sentence
    ]


def hierarchy_table(shown: Shown) -> Table:
    """The table of a study whose cases are functionals."""
    lines = hierarchy.reached(shown.collected, shown.experiments)
    frame = pd.DataFrame(lines, columns=list(hierarchy.Reached._fields))
    return Table(frame, [hierarchy.hierarchy_panel(lines, shown.title)], _note(shown, hierarchy.NOTE))


def solvers_table(shown: Shown) -> Table:
    """The table of a study that compares control solvers; histories are read as well."""
    runs = solver_study.solver_runs(shown.results, shown.collected, shown.experiments)
    points = solver_study.solver_points(runs)
    frame = pd.DataFrame(points, columns=list(solver_study.SolverPoint._fields))
    return Table(frame, [solver_study.solvers_panel(points, shown.title)], _note(shown, solver_study.NOTE))


def _note(shown: Shown, own: str) -> str:
    return f"{listed(_lowered(shown.collected, map(runs_of, shown.experiments)))}{own} {_FLOOR_NOTE}"
