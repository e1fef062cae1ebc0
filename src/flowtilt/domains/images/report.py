"""What is shown of experiments on images: the table and the figures of an experiment."""

from __future__ import annotations

from functools import partial

from flowtilt.domains.images.tables import findings, groups, note
from flowtilt.domains.images.tables import with_reported as reported
from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.tables import experiment_table

__all__ = ["draw", "reported", "table"]


def table(shown: Shown) -> Table:
    """The table of an experiment, whose text says what holds of what should; there are no studies."""
    experiment = shown.experiments[0]
    said = partial(findings, experiment=experiment, reported=shown.reported)
    return experiment_table(shown, partial(groups, experiment), said, note(experiment))


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment."""
    from flowtilt.domains.images import figures

    figures.draw(shown, prefix)
