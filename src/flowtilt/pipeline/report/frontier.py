"""What methods reach for what they pay: metrics of models by their divergence from the pretrained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.report.base import Shown
from flowtilt.pipeline.report.measurements import ResultsError, of_row, run_folder, runs_of
from flowtilt.pipeline.report.panels import describe
from flowtilt.pipeline.report.style import COLOURS, save_figure

FILE = "frontier.csv"
"""Points of a run, beside its history; see :data:`flowtilt.pipeline.stages.FRONTIER`."""

LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P")
"""Of the methods of one kind, in their order."""


def with_frontier(experiment: Experiment) -> list[str]:
    """The methods whose runs have points of a frontier: those with a budget of nats."""
    return [name for name, m in experiment.methods.items() if m.tuned and experiment.solver_of(name).kl]


def load_frontiers(results: Path, experiment: Experiment, method: str) -> list[pd.DataFrame]:
    """The points of a method, a frame a seed with columns ``stage``, ``kl`` and metrics. Raises ResultsError
    if a file is missing or malformed."""
    runs, found = runs_of(experiment), []
    for seed in runs.seeds:
        path = run_folder(results, runs, method, "network", seed) / FILE
        try:
            found.append(pd.read_csv(path, dtype=float))
        except FileNotFoundError:
            raise ResultsError(f"{path}: no such file; run the finetune stage of {method} first") from None
        except ValueError as error:
            raise ResultsError(f"{path}: no points of a frontier ({error}); run finetune again") from None
        if absent := {"stage", "kl"} - {*found[-1].columns}:
            raise ResultsError(f"{path}: no points of a frontier, without {min(absent)}; run finetune again")
    return found


def frontier_figure(
    experiment: Experiment,
    frontiers: Mapping[str, Sequence[pd.DataFrame]],
    long: pd.DataFrame,
    metrics: Sequence[str],
) -> Figure:
    """Metrics against the divergence that was paid, a panel a metric, a line a method and seed.

    Args:
        experiment: whose methods are shown.
        frontiers: points of each method with a budget, a frame a seed.
        long: metrics of all runs: those of other methods with a ``kl_paid`` are single points.
        metrics: of the panels; ones that no method has are left out.
    """
    known = {name for frames in frontiers.values() for frame in frames for name in frame.columns}
    shown = [metric for metric in metrics if metric in known]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 2.9 * rows + 0.9))
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    looks = _looks(experiment)
    for axes, metric in zip(panels, shown, strict=False):
        for method, frames in frontiers.items():
            _lines(axes, frames, metric, method, looks[method])
        for method, config in experiment.methods.items():
            if config.tuned and method not in frontiers:
                _single(axes, long, metric, method, looks[method])
        words = describe(metric)
        axes.set_title(words.words)
        axes.set_ylabel(words.unit)
        axes.grid(color="#dddddd", linewidth=0.6)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("KL from pretrained (nats)")
        axes.tick_params(labelbottom=True)
    handles = {name: h for axes in panels for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    figure.suptitle(f"{experiment.title}: what a nat buys")
    return figure


def _looks(experiment: Experiment) -> dict[str, tuple[str, str, str]]:
    """Colour, line and marker of each method: the kind's colour, and the others by order within it."""
    count: dict[str, int] = {}
    looks = {}
    for name, method in experiment.methods.items():
        place = count.get(method.kind, 0)
        count[method.kind] = place + 1
        # Lines count from the first method with a budget, so that it has the full one.
        looks[name] = (COLOURS[method.kind], "", MARKERS[place % len(MARKERS)])
    lines: dict[str, int] = {}
    for name in with_frontier(experiment):
        kind = experiment.methods[name].kind
        place = lines.get(kind, 0)
        lines[kind] = place + 1
        looks[name] = (looks[name][0], LINES[place % len(LINES)], looks[name][2])
    return looks


def _lines(
    axes: Axes, frames: Sequence[pd.DataFrame], metric: str, method: str, look: tuple[str, str, str]
) -> None:
    colour, line, marker = look
    for number, frame in enumerate(frames):
        label = method if number == 0 else "_nolegend_"
        axes.plot(*(frame["kl"], frame[metric]), line, marker=marker, markersize=4, color=colour, label=label)


def _single(axes: Axes, long: pd.DataFrame, metric: str, method: str, look: tuple[str, str, str]) -> None:
    """A point a seed of a method without stages, where its divergence and the metric are known."""
    paid, reached = of_row(long, method, "kl_paid"), of_row(long, method, metric)
    if len(paid) != len(reached) or not np.isfinite([*paid, *reached]).any():
        return
    colour, _, marker = look
    axes.plot(
        *(paid, reached),
        linestyle="",
        marker=marker,
        markersize=6,
        markerfacecolor="none",
        color=colour,
        label=f"{method} (path KL)",
    )


def draw_frontier(shown: Shown, prefix: str, metrics: Sequence[str]) -> None:
    """Draw ``{prefix}_frontier.png``, if a method of the experiment has a budget."""
    experiment = shown.experiments[0]
    frontiers = {m: load_frontiers(shown.results, experiment, m) for m in with_frontier(experiment)}
    if frontiers:
        save_figure(
            frontier_figure(experiment, frontiers, shown.collected, metrics), f"{prefix}_frontier.png"
        )
