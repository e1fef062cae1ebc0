"""A report for any domain: its metrics in one table, and a figure of the metric that it leads with."""

from __future__ import annotations

from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.base import as_named as reported
from flowtilt.pipeline.report.measurements import of_row
from flowtilt.pipeline.report.panels import describe
from flowtilt.pipeline.report.tables import experiment_table

__all__ = ["draw", "reported", "table"]


def table(shown: Shown) -> Table:
    """Every metric but those of the panels, in the order of the runs' ``metrics.json``."""
    return experiment_table(shown)


def draw(shown: Shown, prefix: str) -> None:
    """The mean of the leading metric over seeds of each method, and each seed as a dot."""
    from matplotlib.figure import Figure

    from flowtilt.pipeline.report.style import COLOURS, save_figure

    experiment = shown.experiments[0]
    metric = experiment.main_metric
    figure = Figure(figsize=(1 + 1.2 * len(experiment.methods), 3))
    axes = figure.subplots()
    for place, (name, method) in enumerate(experiment.methods.items()):
        values = of_row(shown.collected, name, metric)
        axes.bar(place, values.mean(), color=COLOURS.get(method.kind), alpha=0.6)
        axes.plot([place] * len(values), values, "k.")
    axes.set_xticks(range(len(experiment.methods)), list(experiment.methods))
    axes.set_ylabel(describe(metric).header)
    save_figure(figure, f"{prefix}.png")
