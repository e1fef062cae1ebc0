"""What is shown of experiments on molecules: tables and figures of an experiment, or of a study of masses."""

from __future__ import annotations

from functools import partial

import pandas as pd

from flowtilt.domains.molecules.tables import (
    MASSES_NOTE,
    NOTE,
    MassLine,
    findings,
    groups,
    masses,
    masses_panel,
)
from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.base import as_named as reported
from flowtilt.pipeline.report.tables import experiment_table

__all__ = ["draw", "reported", "table"]


def table(shown: Shown) -> Table:
    """The table of an experiment, with what holds of what should, or of a study of the mass of the tail."""
    if shown.study is not None:
        lines = masses(shown.results, shown.experiments)
        frame = pd.DataFrame(lines, columns=list(MassLine._fields))
        return Table(frame, [masses_panel(lines, shown.title)], MASSES_NOTE)
    experiment = shown.experiments[0]
    said = partial(findings, experiment=experiment, reported=shown.reported)
    return experiment_table(shown, partial(groups, experiment), said, NOTE)


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment, or of a study of the mass of the tail."""
    from flowtilt.domains.molecules import figures

    figures.draw(shown, prefix)
