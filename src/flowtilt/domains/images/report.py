"""What is shown of experiments on images: the table and the figures of an experiment."""

from __future__ import annotations

from flowtilt.domains.images import tables
from flowtilt.domains.images.tables import with_reported as reported
from flowtilt.pipeline.report.base import Shown, Table

__all__ = ["draw", "reported", "table"]


def table(shown: Shown) -> Table:
    """The table of an experiment; there are no studies."""
    return tables.experiment_table(shown.results, shown.experiments[0], shown.reported)


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment."""
    from flowtilt.domains.images import figures

    figures.draw_experiment(shown.results, shown.experiments[0], prefix)
