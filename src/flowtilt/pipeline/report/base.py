"""What a domain's report is asked for: the table of a file of experiments, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd

from flowtilt.pipeline.domain import domain_of, imported
from flowtilt.pipeline.experiment import Experiment, Study, load_file, read_study
from flowtilt.pipeline.report.comparison import read_reported
from flowtilt.pipeline.report.measurements import collect_runs, runs_of
from flowtilt.pipeline.report.panels import Panel


@dataclass(frozen=True)
class Shown:
    """A file of experiments whose runs are there.

    Attributes:
        study: that it is; None for an ordinary experiment.
        experiments: of the file, at least one; the cases of a study.
        reported: values that the papers report, under the names of these experiments.
    """

    name: str
    study: Study | None
    experiments: Sequence[Any]
    results: Path
    reported: pd.DataFrame

    @property
    def title(self) -> str:
        """Of the table."""
        return self.study.title if self.study is not None else self.experiments[0].title

    @property
    def table(self) -> str | None:
        """The table of a study; None for an ordinary experiment."""
        return self.study.study.table if self.study is not None else None

    @cached_property
    def collected(self) -> pd.DataFrame:
        """All metrics of its runs; see :func:`flowtilt.pipeline.report.measurements.collect_runs`."""
        return collect_runs(self.results, [runs_of(experiment) for experiment in self.experiments])


class Table(NamedTuple):
    """A table as data, as text, and what is said under it."""

    frame: pd.DataFrame
    panels: Sequence[Panel]
    note: str


class Report(Protocol):
    """What a domain shows of its runs; the module or object that :attr:`Domain.report` names."""

    def table(self, shown: Shown) -> Table:
        """The table of a file.

        Raises:
            ResultsError: if a file of results is missing or malformed.
        """

    def draw(self, shown: Shown, prefix: str) -> None:
        """Draw ``{prefix}{ending}.png`` for every ending of :meth:`Domain.figures`.

        Raises:
            ResultsError: if a file of results is missing or malformed.
        """

    def reported(self, values: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
        """The papers' values, with those that belong beside an experiment under its own names."""


def report_of(experiment: Experiment) -> Report:
    """The report of an experiment's domain."""
    found: Report = imported(domain_of(experiment).report)
    return found


def beside(reported: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The papers' values, with those that belong beside an experiment under its own names.

    Args:
        reported: see :func:`flowtilt.pipeline.report.comparison.read_reported`.
        experiment: its key ``same_as`` says of which sources levels are compared: the column ``same``.
    """
    values = report_of(experiment).reported(reported, experiment)
    same = values["source"].isin(experiment.same_as) & (values["experiment"] == experiment.name)
    return values.assign(same=same | (values["same"].eq(True) if "same" in values else False))


def as_named(values: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """:meth:`Report.reported` where the papers name the experiments as they are named here."""
    return values


def shown_file(file: Path, overrides: Mapping[str, Any] | None, results: Path, reported: Path) -> Shown:
    """A file of experiments with its runs, and the papers' values beside them.

    Args:
        file: the experiment's or study's file.
        overrides: merged into every experiment last.

    Raises:
        ConfigError: if the file is not a valid experiment or study.
        ResultsError: if a file of results is missing or malformed, or the reported values are.
    """
    experiments, values = list(load_file(file, overrides).values()), read_reported(reported)
    for experiment in experiments:
        values = beside(values, experiment)
    return Shown(file.stem, read_study(file), experiments, results, values)
