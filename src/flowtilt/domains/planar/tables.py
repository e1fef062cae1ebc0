"""What is shown of experiments in the plane: every method's network, exact and finite-resolution row."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from flowtilt.domains.planar import hierarchy, solver_study
from flowtilt.domains.planar.experiment import FunctionalExperiment, tail_experiment
from flowtilt.domains.planar.rows import FLOOR
from flowtilt.domains.planar.studies import (
    Point,
    StudyRuns,
    findings,
    study_panels,
    study_points,
    study_runs_of,
)
from flowtilt.pipeline.health import HEALTH, KEEPING
from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.base import as_named as reported
from flowtilt.pipeline.report.claims import share, spread
from flowtilt.pipeline.report.comparison import comparison, reported_columns, verdict_note
from flowtilt.pipeline.report.measurements import (
    Runs,
    collect_runs,
    entries,
    models_of,
    of_row,
    row_name,
    runs_of,
    summarise,
    with_gaps,
)
from flowtilt.pipeline.report.panels import Panel, over_seeds
from flowtilt.pipeline.report.tables import listed, panels_of, table_frame
from flowtilt.pipeline.sections import TUNED

__all__ = ["draw", "reported", "table"]

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


def table(shown: Shown) -> Table:
    """The table of an experiment, or of a study: along its axis, of functionals, or of solvers."""
    if shown.study is None:
        return experiment_table(shown.results, runs_of(shown.experiments[0]), shown.reported)
    if shown.table == "hierarchy":
        lines = hierarchy.reached(shown.collected, shown.experiments)
        frame = pd.DataFrame(lines, columns=list(hierarchy.Reached._fields))
        return Table(frame, [hierarchy.hierarchy_panel(lines, shown.title)], _note(shown, hierarchy.NOTE))
    if shown.table == "solvers":
        runs = solver_study.solver_runs(shown.results, shown.collected, shown.experiments)
        points = solver_study.solver_points(runs)
        frame = pd.DataFrame(points, columns=list(solver_study.SolverPoint._fields))
        panel = solver_study.solvers_panel(points, shown.title)
        return Table(frame, [panel], _note(shown, solver_study.NOTE))
    return study_table(shown.results, study_runs_of(shown.study, shown.experiments))


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment, or of a study by the kind of its table."""
    from flowtilt.domains.planar import figures, figures_functionals
    from flowtilt.pipeline.report.style import save_figure

    first = shown.experiments[0]
    if shown.table == "solvers":
        found = solver_study.solver_runs(shown.results, shown.collected, shown.experiments)
        save_figure(figures_functionals.solvers_figure(found, shown.title), f"{prefix}.png")
    elif shown.table == "hierarchy":
        # Functionals without a case have nothing to draw.
        lines = [line for line in hierarchy.reached(shown.collected, shown.experiments) if line.seeds]
        save_figure(figures_functionals.hierarchy_figure(lines, shown.title), f"{prefix}.png")
    elif shown.study is not None:
        figures.draw_study(shown.results, study_runs_of(shown.study, shown.experiments), prefix)
    elif isinstance(first, FunctionalExperiment):
        figures.draw_functional(shown, prefix)
    else:
        height = figures.height_of(tail_experiment(first))
        figures.draw_experiment(shown.results, models_of(first), height, shown.reported, prefix)


def experiment_panels(long: pd.DataFrame, runs: Runs, values: pd.DataFrame) -> list[Panel]:
    """The table of one experiment: the results beside reported values, then the details."""
    summary = entries(summarise(with_gaps(long)))
    beside = reported_columns(comparison(long, values))
    known = list(dict.fromkeys(e.metric for e in summary))
    first = [runs.tail_metric, "gap_closed", "sliced_w2", "sliced_w2_own", *beside, runs.mean_metric, "kl"]
    first += ["floored_mass", "objective", "gap"]
    first = [metric for metric in dict.fromkeys(first) if metric in known]
    rest = [metric for metric in known if metric not in (*first, *HEALTH, *KEEPING, "relative_gap")]
    caption = f"{runs.title or runs.name}: {over_seeds(len(runs.seeds))}"
    return panels_of(summary, {caption: first, "Details": rest}, beside)


def experiment_table(results: str | Path, runs: Runs, values: pd.DataFrame) -> Table:
    """The table of an ordinary experiment."""
    long = collect_runs(results, [runs])
    said = listed([*falling_steps(long, runs), *own_objective(long, runs)])
    rows = ROW_NOTE if runs.has_tail else FUNCTIONAL_ROW_NOTE
    note = f"{said}{rows} {verdict_note(comparison(long, values))}".rstrip()
    return Table(table_frame(long, values), experiment_panels(long, runs, values), note)


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


def _note(shown: Shown, own: str) -> str:
    return f"{listed(_lowered(shown.collected, map(runs_of, shown.experiments)))}{own} {_FLOOR_NOTE}"


def own_gains(long: pd.DataFrame, runs: Runs) -> dict[str, np.ndarray]:
    """What a network's own objective has more than that of the pretrained distribution, by method and rising
    seed.

    Args:
        long: metrics of one experiment, or of several; see
            :func:`flowtilt.pipeline.report.measurements.collect_runs`.
        runs: of an experiment in the plane. One on a tail without a pretrained row has no gains.
    """
    long = long[long["experiment"] == runs.name]
    pretrained = next((m.name for m in runs.methods if m.kind == "pretrained"), None)

    def gain(name: str, kind: str) -> np.ndarray:
        if not runs.has_tail:
            before = of_row(long, row_name(name, "exact"), "functional_before")
            return of_row(long, name, "functional") - before
        whole = kind == "am"  # its objective is of the mean, and the others' of the tail
        metric = runs.mean_metric if whole else "tail_objective"
        before = of_row(long, str(pretrained), metric)
        return of_row(long, name, "objective") - (runs.sign * before if whole else before)

    if runs.has_tail and pretrained is None:
        return {}
    return {m.name: gain(m.name, m.kind) for m in runs.methods if m.kind in TUNED}


def own_objective(long: pd.DataFrame, runs: Runs) -> list[str]:
    """Which networks lower what they are to raise, and which raise it on every seed. The arguments are those
    of :func:`own_gains`."""
    found = own_gains(long, runs)
    said = [
        f"{method} lowers its own G on {share(gain < 0)}: it changes by {spread(gain)} from that of the "
        "pretrained distribution."
        for method, gain in found.items()
        if (gain < 0).any()
    ]
    raised = [method for method, gain in found.items() if (gain > 0).all()]
    if raised:
        said.append(
            f"G rises over that of the pretrained distribution on every seed under {', '.join(raised)}."
        )
    return said


def falling_steps(long: pd.DataFrame, runs: Runs) -> list[str]:
    """One sentence for each fdc method whose exact steps lower their own objective on some seed.

    Such a step is none of an ascent, whatever a network makes of it. The arguments are those of
    :func:`own_gains`.
    """
    long, said = long[long["experiment"] == runs.name], []
    for method in runs.methods:
        count = of_row(long, row_name(method.name, "exact"), "falls")
        if (count > 0).any():
            said.append(
                f"{method.name} is no ascent: {int(count.sum())} of its exact steps lower its own G, on "
                f"{share(count > 0)}; leave the step out, and by: exponents searches one that does not."
            )
    return said
