"""Figures of the experiments on functionals: metrics by method, the hierarchy, and solvers' costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flowtilt.domains.planar.hierarchy import REQUIRED, Reached
from flowtilt.domains.planar.solver_study import SOLVER_WORDS, SolverRun
from flowtilt.pipeline.report.measurements import Runs, row_name
from flowtilt.pipeline.report.panels import describe

# Okabe and Ito's palette, as in the other figures.
_NETWORK, _EXACT, _OPTIMUM = "#0072B2", "#000000", "#009E73"
TIER_COLOURS = {"linear": "#6b6b6b", "convex": "#0072B2", "general": "#D55E00"}

_SHOWN = ("mean_reward", "gap_closed", "entropy", "entropy_likelihood", "coverage", "functional")
_SHOWN_PATTERNS = ("w1_", "sliced_w2", "horizontal_shift", "vertical_shift")


def _shown_metrics(long: pd.DataFrame) -> list[str]:
    """The metrics worth a panel, in the order of the table."""
    known = list(dict.fromkeys(long["metric"]))
    first = [metric for metric in _SHOWN if metric in known]
    more = [m for m in known if m.startswith(_SHOWN_PATTERNS) and not m.endswith("_critic")]
    return [*first, *more]


def metrics_figure(runs: Runs, long: pd.DataFrame, reported: pd.DataFrame) -> Figure:
    """Each metric in a panel of its own, with every seed's network, the solved rows and what is reported."""
    metrics = _shown_metrics(long)
    columns = 3
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.0 * columns, 2.9 * rows + 0.9))
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    theirs = reported[reported["experiment"] == runs.name]
    for axes, metric in zip(panels, metrics, strict=False):
        _metric_panel(axes, runs, long[long["metric"] == metric], theirs[theirs["metric"] == metric])
        axes.set_title(describe(metric).header)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    for axes in panels:
        axes.set_xticks(range(len(runs.methods)), [m.name for m in runs.methods], rotation=35, ha="right")
        axes.tick_params(labelbottom=True)
    figure.suptitle(runs.title or runs.name)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4)
    return figure


def _metric_panel(axes: Axes, runs: Runs, values: pd.DataFrame, reported: pd.DataFrame) -> None:
    for place, method in enumerate(runs.methods):
        own = values[values["method"] == method.name]["value"].to_numpy()
        spread = np.linspace(-0.12, 0.12, len(own)) if len(own) > 1 else np.zeros(len(own))
        axes.plot(place + spread, own, "o", color=_NETWORK, markersize=4, alpha=0.8)
        for solution, colour, marker in (("exact", _EXACT, "x"), ("optimum", _OPTIMUM, "_")):
            solved = values[values["method"] == row_name(method.name, solution)]["value"]
            if len(solved):
                axes.plot([place], [solved.mean()], marker, color=colour, markersize=10, markeredgewidth=1.6)
        said = reported[reported["method"] == method.name]["value"]
        axes.plot([place] * len(said), said, "v", color="#D55E00", markersize=7)
    axes.margins(x=0.1, y=0.12)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _legend() -> list[Line2D]:
    def handle(marker: str, colour: str, label: str) -> Line2D:
        return Line2D([], [], color=colour, marker=marker, linestyle="", label=label)

    return [
        handle("o", _NETWORK, "network, each seed"),
        handle("x", _EXACT, "exact steps, mean"),
        handle("_", _OPTIMUM, "optimum, mean"),
        handle("v", "#D55E00", "reported"),
    ]


def hierarchy_figure(found: Sequence[Reached], title: str) -> Figure:
    """How much of the way from the pretrained distribution to the optimum each functional's network goes."""
    figure = Figure(figsize=(8.0, 0.42 * len(found) + 1.9))
    axes = figure.subplots()
    for place, line in enumerate(found):
        axes.barh(place, line.closed, color=TIER_COLOURS[line.tier], alpha=0.55, height=0.6)
        axes.plot(
            [line.closed_by_exact_steps], [place], "x", color="black", markersize=7, markeredgewidth=1.6
        )
        axes.plot([REQUIRED[line.tier]] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.2)
    axes.set_yticks(range(len(found)), [line.label for line in found])
    axes.invert_yaxis()
    axes.set(xlabel="gap closed (%)", title=title, xlim=(min(0.0, *(r.closed for r in found)), 105))
    handles = [Line2D([], [], color=c, linewidth=6, alpha=0.55, label=t) for t, c in TIER_COLOURS.items()]
    handles += [
        Line2D([], [], color="black", marker="x", linestyle="", label="exact steps"),
        Line2D([], [], color="black", linewidth=1.2, label="required"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, title="paper's tier")
    return figure


_SOLVER_COLOURS = {
    "adjoint_matching": "#0072B2",
    "weighted_fitting": "#E69F00",
    "annealed_fitting": "#009E73",
}
_COSTS = (("network_passes", 1e6, "network passes (millions)"), ("seconds", 1.0, "seconds"))
_SOLVER_MARKERS = {"adjoint_matching": "o", "weighted_fitting": "s", "annealed_fitting": "^"}


def solvers_figure(runs: Sequence[SolverRun], title: str) -> Figure:
    """Gap to the optimum against network passes, and against seconds: a column a case, both solvers in each.

    Args:
        runs: every seed's, all larger than 0 in gap; others cannot stand on a logarithmic axis.
    """
    cases = list(dict.fromkeys(run.case for run in runs))
    figure = Figure(figsize=(3.4 * len(cases) + 0.6, 6.4))
    grid = figure.subplots(2, len(cases), sharey="col", squeeze=False)
    for column, case in zip(grid.T, cases, strict=True):
        own = [run for run in runs if run.case == case]
        for axes, (cost, unit, words) in zip(column, _COSTS, strict=True):
            _cost_panel(axes, own, cost, unit)
            axes.set_xlabel(words)
        column[0].set_title(f"{case} ({own[0].kind})")
    for axes in grid[:, 0]:
        axes.set_ylabel("gap to the optimum (%)")
    handles = [
        Line2D([], [], color=_SOLVER_COLOURS[s], marker=_SOLVER_MARKERS[s], label=SOLVER_WORDS[s])
        for s in dict.fromkeys(run.solver for run in runs)
    ]
    figure.suptitle(title)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, title="dots: each seed; lines: means over seeds"
    )
    return figure


def _cost_panel(axes: Axes, runs: Sequence[SolverRun], cost: str, unit: float) -> None:
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        # Less than a decade may be shown, where powers of ten alone would leave no tick.
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    for solver in dict.fromkeys(run.solver for run in runs):
        own = [run for run in runs if run.solver == solver]
        colour = _SOLVER_COLOURS[solver]
        axes.plot(
            [getattr(run, cost) / unit for run in own],
            [run.gap for run in own],
            _SOLVER_MARKERS[solver],
            color=colour,
            markersize=4,
            alpha=0.45,
        )
        methods = dict.fromkeys(run.method for run in own)
        means = [
            [np.mean([getattr(run, what) for run in own if run.method == name]) for what in (cost, "gap")]
            for name in methods
        ]
        x, y = np.array(sorted(means, key=lambda mean: float(mean[0]))).T
        axes.plot(x / unit, y, color=colour, linewidth=1.6)
    axes.grid(color="#e4e4e4", linewidth=0.6)
