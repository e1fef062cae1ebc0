"""Figures of the studies of the theory: gaps under their bounds, and thresholds' errors and shifts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowtilt.pipeline.report.style import figure_style, save_figure
from flowtilt.pipeline.theory.tables import Rows

# Okabe and Ito's palette, in an order that keeps neighbours apart.
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b6b6b", "#E69F00")
_SMALLEST = 1e-16


def draw_theory(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw a study's result into one PNG file."""
    draw = {"mirror_descent": _mirror_descent, "threshold": _threshold, "tilts": _tilts}[result["kind"]]
    with figure_style():
        save_figure(draw(result["tables"]), path)


def _mirror_descent(tables: Mapping[str, Rows]) -> Figure:
    """A panel a problem, with each run's gap and its two bounds; what is zero is not drawn."""
    problems = list(dict.fromkeys(row["problem"] for row in tables["iterations"]))
    columns = min(3, len(problems))
    lines = -(-len(problems) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    runs = list(dict.fromkeys(row["run"] for row in tables["iterations"]))
    for axes, problem in zip(grid.ravel(), problems, strict=False):
        for run in runs:
            own = [r for r in tables["iterations"] if (r["problem"], r["run"]) == (problem, run)]
            if own:
                _gaps(axes, own, _CYCLE[runs.index(run)])
        axes.set_yscale("log")
        axes.set_ylim(bottom=_SMALLEST)
        axes.set_title(problem.replace("_", " "))
        axes.set_xlabel("iterations K")
    for axes in grid[:, 0]:
        axes.set_ylabel("G(p*) - G(p_K)")
    spare = grid.ravel()[len(problems) :]
    for axes in spare:
        axes.axis("off")
    handles = [Line2D([], [], color=_CYCLE[i], marker=".", label=f"gap, {r} L") for i, r in enumerate(runs)]
    handles += [
        Line2D([], [], color="black", linestyle="--", label="linear bound"),
        Line2D([], [], color="black", linestyle=":", label="bound in 1/K"),
    ]
    if spare.size:
        spare[0].legend(handles=handles, loc="center")
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _gaps(axes: Axes, rows: Rows, colour: str) -> None:
    k = [row["K"] for row in rows]
    for key, style in (("gap", "."), ("linear_bound", "--"), ("sublinear_bound", ":")):
        values = np.array([row[key] for row in rows], dtype=np.float64)
        axes.plot(k, np.where(values > _SMALLEST, values, np.nan), style, color=colour, markersize=4)


def _threshold(tables: Mapping[str, Rows]) -> Figure:
    """Errors by batch size for both tails, descents, and shifts beside their bounds."""
    figure = Figure(figsize=(13.5, 7.6))
    grid = figure.subplots(2, 3)
    problems = list(dict.fromkeys(row["problem"] for row in tables["errors"]))
    colours = {problem: _CYCLE[i % len(_CYCLE)] for i, problem in enumerate(problems)}
    for axes, tail, words in ((grid[0, 0], "lower", "left"), (grid[0, 1], "upper", "right")):
        _errors(axes, [row for row in tables["errors"] if row["tail"] == tail], colours)
        axes.set_title(f"{words} tail: error of a batch's threshold")
    _descents(grid[0, 2], tables["descent"], colours)
    for axes, tail, words in ((grid[1, 0], "lower", "left"), (grid[1, 1], "upper", "right")):
        _shifts(axes, [row for row in tables["shift"] if row["tail"] == tail])
        axes.set_title(f"{words} tail: shift under another model's batch")
    grid[1, 2].axis("off")
    handles = [Line2D([], [], color=colour, marker="o", label=p) for p, colour in colours.items()]
    handles += [
        Line2D([], [], color="black", linestyle=":", label="limit of the median (delta method)"),
        Line2D([], [], color="black", linestyle="-", label="descent: fixed step, distribution"),
        Line2D([], [], color="black", linestyle="--", label="descent: fixed step, batch"),
        Line2D([], [], color="black", linestyle="-.", label="descent: normalised, batch"),
        Line2D([], [], color="black", marker="o", linestyle="", label="shift: mean moved"),
        Line2D([], [], color="black", marker="x", linestyle="", label="shift: worst distribution"),
        *(Line2D([], [], color=c, linestyle=s, label=words) for _, c, s, words in _BOUNDS),
    ]
    grid[1, 2].legend(handles=handles, loc="center")
    return figure


_BOUNDS: tuple[tuple[str, str, Any, str], ...] = (
    ("sharp_bound", _CYCLE[4], "-", "sharp bound"),
    ("pinsker_bound", _CYCLE[5], "--", "Pinsker's bound"),
    ("strong_convexity_bound", "#56B4E9", ":", "bound by strong convexity"),
)


def _errors(axes: Axes, rows: Rows, colours: Mapping[str, str]) -> None:
    for problem, colour in colours.items():
        own = [row for row in rows if row["problem"] == problem and row["error_median"] > 1e-12]
        if not own:  # a kink that every batch hits
            continue
        sizes, medians = [row["size"] for row in own], np.array([row["error_median"] for row in own])
        low, high = (np.array([row[f"error_{q}pct"] for row in own]) for q in (10, 90))
        bars = [medians - np.maximum(low, 0.02 * medians), high - medians]
        axes.errorbar(sizes, medians, bars, color=colour, marker="o", markersize=4, capsize=2)
        limits = np.array([row["limit_median"] for row in own])
        axes.plot(sizes, np.where(limits < 10, limits, np.nan), ":", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="|error|, 10, 50 and 90 %")


def _descents(axes: Axes, rows: Rows, colours: Mapping[str, str]) -> None:
    styles = {"fixed step, distribution": "-", "fixed step, batch": "--", "normalised, batch": "-."}
    for problem, colour in colours.items():
        for kind, style in styles.items():
            own = [r for r in rows if (r["problem"], r["descent"]) == (problem, kind)]
            errors = np.array([row["error"] for row in own])
            drawn = np.where(errors > 1e-13, errors, np.nan)
            axes.plot([row["update"] for row in own], drawn, style, color=colour, linewidth=1)
    axes.set(yscale="log", xlabel="updates", ylabel="|error|", title="right tail: gradient descent")


def _shifts(axes: Axes, rows: Rows) -> None:
    for name, marker in (("mean", "o"), ("worst", "x")):
        own = [row for row in rows if row["batch"].startswith(name)]
        if own:
            shifts = [abs(row["shift"]) for row in own]
            axes.plot([row["kl"] for row in own], shifts, marker, color="black", markersize=5, zorder=3)
    up = [row for row in rows if row["batch"] == "mean moved up"]
    for key, colour, style, _ in _BOUNDS:
        # The larger of the bounds up and down.
        values = [
            np.nan
            if row[key] is None
            else max(r[key] for r in rows if r["delta"] == row["delta"] and r[key] is not None)
            for row in up
        ]
        axes.plot([row["kl"] for row in up], values, style, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="KL divergence (nats)", ylabel="|shift|")


_SOLVERS = {"adjoint_matching": "o", "weighted_fitting": "s", "annealed_fitting": "^"}


def _tilts(tables: Mapping[str, Rows]) -> Figure:
    """Errors against nats, a line a solver, a panel a distribution and error."""
    rows = tables["tilts"]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    shown = (("mean_error", "error of the mean"), ("covariance_error", "error of the covariance"))
    figure = Figure(figsize=(3.6 * len(problems), 6.4))
    grid = figure.subplots(2, len(problems), squeeze=False, sharex=True, sharey="row")
    for column, problem in enumerate(problems):
        for axes, (key, _) in zip(grid[:, column], shown, strict=True):
            for (solver, marker), colour in zip(_SOLVERS.items(), _CYCLE, strict=False):
                own = [row for row in rows if (row["problem"], row["solver"]) == (problem, solver)]
                known = [(row["nats"], row[key]) for row in own if row[key] is not None]
                axes.plot(*zip(*known, strict=True), marker=marker, color=colour) if known else None
            axes.set(xscale="log", yscale="log")
        grid[0, column].set_title(problem.replace("_", " "))
        grid[1, column].set_xlabel("nats")
    for axes, (_, words) in zip(grid[:, 0], shown, strict=True):
        axes.set_ylabel(words)
    handles = [
        Line2D([], [], color=colour, marker=marker, label=solver.replace("_", " "))
        for (solver, marker), colour in zip(_SOLVERS.items(), _CYCLE, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure
