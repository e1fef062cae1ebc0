"""What is shown of experiments in the plane: tables and figures of a file, by the kind of its table."""

from __future__ import annotations

from flowtilt.domains.planar import tables
from flowtilt.domains.planar.experiment import FunctionalExperiment, tail_experiment
from flowtilt.domains.planar.studies import study_runs_of
from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.base import as_named as reported
from flowtilt.pipeline.report.measurements import runs_of

__all__ = ["draw", "reported", "table"]


def table(shown: Shown) -> Table:
    """The table of an experiment, or of a study: along its axis, of functionals, or of solvers."""
    if shown.study is None:
        return tables.experiment_table(shown.results, runs_of(shown.experiments[0]), shown.reported)
    if shown.table == "hierarchy":
        return tables.hierarchy_table(shown)
    if shown.table == "solvers":
        return tables.solvers_table(shown)
    return tables.study_table(shown.results, study_runs_of(shown.study, shown.experiments))


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment, or of a study by the kind of its table."""
    from flowtilt.domains.planar import figures

    first = shown.experiments[0]
    if shown.table == "solvers":
        figures.draw_solvers(shown, prefix)
    elif shown.table == "hierarchy":
        figures.draw_hierarchy(shown, prefix)
    elif shown.study is not None:
        figures.draw_study(shown.results, study_runs_of(shown.study, shown.experiments), prefix)
    elif isinstance(first, FunctionalExperiment):
        figures.draw_functional(shown, prefix)
    else:
        height = figures.height_of(tail_experiment(first))
        figures.draw_experiment(shown.results, runs_of(first), height, shown.reported, prefix)
