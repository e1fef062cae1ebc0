"""Runs to tables: every method's network, exact and finite-resolution row beside reported values.

Everything is read from the ``metrics.json`` files under a results folder. Numbers travel in long
form, one a line; means, gaps and verdicts are computed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flowtilt.files import atomic_path, write_text
from flowtilt.pipeline.experiment import Experiment, load_file
from flowtilt.pipeline.health import HEALTH, KEEPING, KEEPING_NOTE
from flowtilt.pipeline.health import NOTE as HEALTH_NOTE
from flowtilt.pipeline.report.base import Shown, Table, beside, report_of, shown_file
from flowtilt.pipeline.report.comparison import (
    COMPARISON_COLUMNS,
    EFFECT_COLUMNS,
    comparison,
    read_reported,
    reported_columns,
    reported_keys,
    source_columns,
    verdict_note,
)
from flowtilt.pipeline.report.discretisation import discretisation_note
from flowtilt.pipeline.report.measurements import (
    SOLUTIONS,
    Entry,
    collect_runs,
    entries,
    read_by_seed,
    read_csv,
    row_name,
    row_words,
    runs_of,
    split_row,
    summarise,
    with_gaps,
)
from flowtilt.pipeline.report.panels import Panel, describe, latex, markdown, over_seeds, pretty
from flowtilt.pipeline.report.trainings import keeping_panel, training_panel


def panels_of(
    summary: Sequence[Entry],
    groups: Mapping[str, Sequence[str]],
    beside: Mapping[str, Sequence[tuple[str, Mapping[str, str]]]],
) -> list[Panel]:
    """Tables of rows and metrics, by caption; those without any column are left out.

    Args:
        summary: of all rows.
        groups: metrics of each table, by its caption.
        beside: by metric, columns that stand beside ours; see :func:`reported_columns`.
    """
    rows = list(dict.fromkeys(e.row for e in summary))
    panels = []
    for heading, metrics in groups.items():
        columns: list[tuple[str, Mapping[str, str]]] = []
        for metric in metrics:
            own = {e.row: pretty(e.value, e.sd) for e in summary if e.metric == metric}
            columns += [(describe(metric).header, own), *beside.get(metric, [])]
        lines = [[row_words(row), *(cells.get(row, "") for _, cells in columns)] for row in rows]
        panels.append(Panel(heading, ["method", *(header for header, _ in columns)], lines))
    return [panel.without_empty_columns() for panel in panels if len(panel.header) > 1]


def table_frame(long: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """The table as data: one line per row, metric and source.

    Returns:
        Columns experiment, method, solution, row, metric, unit, value, sd, seeds, source, reported, those of
        :data:`EFFECT_COLUMNS`, and verdict, in full precision.
    """
    compared = comparison(with_gaps(long), reported)
    split = [split_row(str(row)) for row in compared["method"]]
    frame = compared.rename(columns={"method": "row"}).assign(
        method=[method for method, _ in split], solution=[solution for _, solution in split]
    )
    head = ["experiment", "method", "solution", "row", "metric", "unit", "value", "sd", "seeds", "source"]
    return frame[[*head, "reported", *EFFECT_COLUMNS, "verdict"]]


def experiment_table(
    shown: Shown,
    groups: Callable[[str], Mapping[str, Sequence[str]]] | None = None,
    findings: Callable[[pd.DataFrame], Sequence[str]] = lambda long: (),
    note: str = "",
) -> Table:
    """The table of an ordinary experiment.

    Args:
        groups: metrics of each part by its caption, from the table's own; by default all under that, but for
            those that are shown in a panel of every table.
        findings: sentences on what holds of what should, from all metrics; they are above the note.

    Raises:
        ResultsError: if a file of results is missing or malformed.
    """
    long, caption = shown.collected, f"{shown.title}: {over_seeds(len(shown.experiments[0].seeds))}"
    every = dict.fromkeys(long["metric"])
    plain = [metric for metric in every if metric == "kl" or metric not in (*HEALTH, *KEEPING)]
    parts = groups(caption) if groups else {caption: plain}
    compared = comparison(long, shown.reported)
    panels = panels_of(entries(summarise(long)), parts, reported_columns(compared))
    text = f"{listed(findings(long))}{' '.join(filter(None, [note, verdict_note(compared)]))}"
    return Table(table_frame(long, shown.reported), panels, text)


def listed(sentences: Sequence[str]) -> str:
    """Sentences as a list above a note; nothing if there are none."""
    return "".join(f"- {sentence}\n" for sentence in sentences) + ("\n" if sentences else "")


def write_table(
    file: Path, overrides: Mapping[str, Any] | None, results: Path, reported: Path, prefix: str | Path
) -> None:
    """Write ``{prefix}.csv``, ``{prefix}.md`` and ``{prefix}.tex`` of an experiment or a study. The other
    arguments, and the errors, are those of :func:`flowtilt.pipeline.report.base.shown_file`."""
    shown = shown_file(file, overrides, results, reported)
    frame, panels, note = report_of(shown.experiments[0]).table(shown)
    notes = [note, discretisation_note(shown.experiments)]
    if (training := training_panel(shown.collected)) is not None:
        panels = [*panels, training]
        notes.append(HEALTH_NOTE)
    if (keeping := keeping_panel(shown.collected)) is not None:
        panels = [*panels, keeping]
        notes.append(KEEPING_NOTE)
    write_panels(prefix, frame, panels, " ".join(filter(None, notes)))


def write_comparison(
    files: Iterable[str | Path],
    overrides: Mapping[str, Any] | None,
    results: str | Path,
    reported: str | Path,
    output: str | Path,
    by_seed: str | Path,
    earlier: str | Path | None = None,
) -> None:
    """Write the comparison of all experiments and cases of some files with the reported values.

    Args and errors are those of :func:`write_table`; ``output`` is a CSV file with the columns
    :data:`COMPARISON_COLUMNS`, ``by_seed`` one with every metric of every row and seed, from which
    the comparison can be recomputed. ``earlier`` is such a file of an earlier run: of experiments and cases
    without a run in ``results`` its lines are kept.
    """
    experiments = [experiment for file in files for experiment in load_file(file, overrides).values()]
    values = read_reported(reported)
    for experiment in experiments:
        values = beside(values, experiment)
    before = None if earlier is None else read_by_seed(earlier)

    def lines_of(experiment: Experiment) -> pd.DataFrame:
        if before is None or (Path(results) / "runs" / experiment.name).is_dir():
            return collect_runs(results, [runs_of(experiment)])
        return before[before["experiment"] == experiment.name]

    long = pd.concat([lines_of(experiment) for experiment in experiments], ignore_index=True)
    _write_frame(by_seed, long)
    _write_frame(output, comparison(long, values))


def write_panels(prefix: str | Path, frame: pd.DataFrame, panels: Sequence[Panel], note: str) -> None:
    """Write a table as data (``.csv``), and as text with a note under it (``.md`` and ``.tex``)."""
    _write_frame(f"{prefix}.csv", frame)
    write_text(f"{prefix}.md", f"{markdown(panels)}\n\n{note}\n")
    comments = "\n".join(f"% {line}".rstrip() for line in note.splitlines())
    write_text(f"{prefix}.tex", f"{latex(panels)}\n{comments}\n")


def _write_frame(path: str | Path, frame: pd.DataFrame) -> None:
    """CSV in which numbers read back the same, and undefined ones are empty."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def headline(comparison_csv: str | Path) -> str:
    """The reported metrics as Markdown, ours beside theirs: one table per experiment and source.

    Args:
        comparison_csv: written by :func:`write_comparison`.

    Raises:
        ResultsError: if that is missing or another table.
    """
    table = read_csv(Path(comparison_csv), COMPARISON_COLUMNS)
    numbers = ("value", "sd", "seeds", "reported", *EFFECT_COLUMNS[1:])
    table = table.assign(**{column: pd.to_numeric(table[column].replace("", None)) for column in numbers})
    return markdown([_headline_panel(table, *key) for key in reported_keys(table)]) + "\n"


_OBJECTIVE = (
    *(("functional", solution) for solution in ("network", "exact", "optimum")),
    *(("kl", solution) for solution in ("network", "exact")),
)
"""Metrics and solutions that stand beside reported values where there is no reward: what was maximised."""


def _headline_panel(table: pd.DataFrame, experiment: str, metric: str, source: str) -> Panel:
    table = table[table["experiment"] == experiment]
    summary = {(e.row, e.metric): e for e in entries(table)}
    cells = {key: pretty(e.value, e.sd) for key, e in summary.items()}
    beside = table[(table["source"] == source) & (table["metric"] == metric)]
    theirs = source_columns(source, beside)
    words = describe(metric)
    mean = f"mean_{words.unit}"
    more = [(mean, "network")] if any(m.startswith("mean_") for _, m in summary) else _OBJECTIVE
    header = ["method", words.header, *(name for name, _ in theirs), "exact", "at finite resolution"]
    header += [f"{'' if at == 'network' else at + ' '}{describe(what).header}" for what, at in more]
    lines = []
    for method in dict.fromkeys(split_row(row)[0] for row, _ in summary):
        network, exact, resolved = (
            cells.get((row_name(method, solution), metric), "") for solution in SOLUTIONS
        )
        others = [cells.get((row_name(method, at), what), "") for what, at in more]
        lines.append([method, network, *(of.get(method, "") for _, of in theirs), exact, resolved, *others])
    seeds = over_seeds(max((e.seeds for e in summary.values()), default=1))
    better = f"; {words.better} is better" if words.better else ""
    caption = f"{experiment}, {words.words}: {seeds}{better}"
    return Panel(caption, header, lines).without_empty_columns()
