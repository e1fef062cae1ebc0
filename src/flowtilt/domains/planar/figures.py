"""Figures of experiments and studies, drawn from the files of their runs.

All figures of rewards show the landscape's height, a cost or a reward, so the tail that matters
is always the one to the right. Samples are pooled over seeds, and distributions averaged over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.ndimage import gaussian_filter, grey_opening

from flowtilt.domains.planar.experiment import FunctionalExperiment, TailExperiment
from flowtilt.domains.planar.figures_functionals import metrics_figure
from flowtilt.domains.planar.measured import Distributions, load_distributions, load_samples, read_resolution
from flowtilt.domains.planar.studies import (
    Point,
    StudyRuns,
    curve,
    misses,
    parents,
    references,
    resolves_from,
    series_names,
    study_points,
    tail_metric,
)
from flowtilt.metrics.tails import quantile
from flowtilt.pipeline.report.base import Shown
from flowtilt.pipeline.report.measurements import (
    Method,
    Runs,
    collect_runs,
    entries,
    row_name,
    runs_of,
    summarise,
    with_gaps,
)
from flowtilt.pipeline.report.panels import describe, pretty
from flowtilt.pipeline.report.style import COLOURS, SHADE, reported_tails, save_figure
from flowtilt.pipeline.sections import TUNED

Height = Callable[[np.ndarray], np.ndarray]

_STYLES: dict[str, Any] = {"network": "-", "exact": "--", "resolved": ":"}
_FINE_DOTS: Any = (0, (1, 3))
_SOLUTION_WORDS = {"network": "network", "exact": "exact", "resolved": "finite resolution"}


# ---------------------------------------------------------------------------- landscapes


@dataclass(frozen=True)
class Relief:
    """A landscape on a fine raster, and the height at which its ground ends and its bumps begin.

    Attributes:
        half: half the side of the square window.
        heights: (n, n), the first axis along x.
        ground: the highest height of the landscape with its narrow features taken off.
    """

    half: float
    heights: np.ndarray
    ground: float

    @property
    def norm(self) -> Normalize:
        """Half of the colours for the ground, half for the bumps, so that both can be seen."""
        low, high = float(self.heights.min()), float(self.heights.max())
        middle = self.ground + 0.02 * (high - low)  # the crest of a soft step is no bump
        if low < middle < high - 0.05 * (high - low):
            return TwoSlopeNorm(vmin=low, vcenter=middle, vmax=high)
        return Normalize(low, high)

    @property
    def profile_at(self) -> float:
        """The y at which a profile along x meets the highest bumps: 0 if that line does."""
        cells = self.heights.shape[1]
        crests = self.heights.max(axis=0)
        if crests[cells // 2] > 0.98 * crests.max():
            return 0.0
        return float(-self.half + 2 * self.half / cells * (np.argmax(crests) + 0.5))

    def draw(self, axes: Axes, colours: Colormap) -> Any:
        """Draw the landscape over the window; returns the image."""
        return axes.imshow(
            self.heights.T,
            origin="lower",
            extent=(-self.half, self.half, -self.half, self.half),
            cmap=colours,
            norm=self.norm,
            interpolation="antialiased",
        )


def relief(height: Height, half: float, cells: int = 900, widest: float = 0.5) -> Relief:
    """A landscape over the window ``[-half, half]^2``.

    Args:
        height: heights (n,) at points (n, 2).
        half: half the side of the window.
        cells: of the raster, along a side.
        widest: features narrower than this count as bumps.
    """
    axis = -half + 2 * half / cells * (np.arange(cells) + 0.5)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    heights = np.asarray(height(points), dtype=np.float64).reshape(cells, cells)
    ground = grey_opening(heights, size=max(3, round(widest * cells / (2 * half))))
    return Relief(half, heights, float(ground.max()))


def _two_ramps(name: str, ground: Sequence[str], bumps: Sequence[str]) -> Colormap:
    """Colours that change abruptly in the middle, where the ground ends."""
    low = [(0.5 * i / (len(ground) - 1), colour) for i, colour in enumerate(ground)]
    high = [(0.5 + 0.5 * i / (len(bumps) - 1), colour) for i, colour in enumerate(bumps)]
    return LinearSegmentedColormap.from_list(name, [*low, *high])


_RELIEF_COLOURS = _two_ramps("relief", ["#f4f8fb", "#9ec3de", "#2f6690"], ["#f2c14e", "#d1495b", "#5f0f40"])
_FAINT_COLOURS = _two_ramps("faint", ["#ffffff", "#e3e3e3"], ["#d4d4d4", "#8c8c8c"])


def window(samples: Sequence[np.ndarray], share: float = 0.9995) -> float:
    """Half the side of a square window about the origin that shows a share of each cloud of points."""
    return 1.05 * max(float(np.quantile(np.abs(points).max(axis=1), share)) for points in samples)


def landscape_figure(
    height: Height, half: float, unit: str, title: str, pretrained: np.ndarray | None = None
) -> Figure:
    """The landscape over the plane, and its profile along a line beneath.

    Args:
        height: heights (n,) at points (n, 2).
        unit: ``cost`` or ``reward``, what the height is.
        pretrained: samples (n, 2) of the pretrained model, for contours.
    """
    drawn = relief(height, half)
    figure = Figure(figsize=(6.6, 7.4))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 0.28])
    above.set_box_aspect(1)
    below.set_box_aspect(0.28)
    image = drawn.draw(above, _RELIEF_COLOURS)
    bar = figure.colorbar(image, ax=[above, below], label=unit, shrink=0.7, anchor=(0.0, 1.0))
    low, middle, high = (float(image.norm.inverse(share)) for share in (0.0, 0.5, 1.0))
    bar.set_ticks([low, 0.5 * (low + middle), middle, 0.5 * (middle + high), high], minor=False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    above.set(title=title, ylabel="y")
    below.set_xlabel("x")
    if pretrained is not None:
        _mass_contours(above, pretrained, half)
        figure.supxlabel("Lines: smallest regions with 50, 90 and 99 % of the pretrained samples", fontsize=9)
    x = np.linspace(-half, half, 6001)
    y = drawn.profile_at
    profile = np.asarray(height(np.stack([x, np.full_like(x, y)], axis=-1)))
    below.fill_between(x, profile, color="#9ec3de", linewidth=0)
    below.plot(x, profile, color="#2f6690", linewidth=1)
    below.set(ylabel=f"{unit} at y = {y:.2g}", ylim=(0, None) if profile.min() >= 0 else (None, None))
    return figure


def _mass_contours(axes: Axes, points: np.ndarray, half: float) -> None:
    """Contours of the smallest regions that hold 50, 90 and 99 % of some samples."""
    cells = 120
    edges = np.linspace(-half, half, cells + 1)
    counts = np.histogram2d(points[:, 0], points[:, 1], bins=[edges, edges])[0]
    smooth = gaussian_filter(counts, 2.5)
    falling = np.sort(smooth.ravel())[::-1]
    cumulative = np.cumsum(falling) / falling.sum()
    levels = sorted({float(falling[np.searchsorted(cumulative, share)]) for share in (0.5, 0.9, 0.99)})
    centres = 0.5 * (edges[1:] + edges[:-1])
    axes.contour(centres, centres, smooth.T, levels=levels, colors="black", linewidths=1.0)


# ----------------------------------------------------------------------------- densities


def densities_figure(
    height: Height | None,
    half: float,
    runs: Runs,
    samples: Mapping[str, np.ndarray],
    distributions: Mapping[str, Distributions],
) -> Figure:
    """Where every method puts its mass: a column a method, a row a solution, over the faint landscape.

    Args:
        height: heights (n,) at points (n, 2), or None where there is no landscape.
        samples: points (n, 2) of each method's network, pooled over seeds.
        distributions: by solution, averaged over seeds.
    """
    drawn = None if height is None else relief(height, half, cells=450)
    solutions = ["network", *distributions]
    figure = Figure(figsize=(2.5 * len(runs.methods) + 1.2, 2.55 * len(solutions) + 0.5))
    grid = figure.subplots(len(solutions), len(runs.methods), sharex=True, sharey=True, squeeze=False)
    norm = LogNorm(1e-3, 1.0)
    for row, solution in zip(grid, solutions, strict=True):
        for axes, method in zip(row, runs.methods, strict=True):
            if drawn is not None:
                drawn.draw(axes, _FAINT_COLOURS)
            axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
            density = _density(method, solution, half, samples, distributions)
            if density is not None:
                _overlay(axes, *density, norm)
            else:
                axes.text(0, 0, "not solved", ha="center", va="center", color="#6b6b6b")
        row[0].set_ylabel(f"{_DISTRIBUTION_WORDS[solution]}\ny")
    for axes, method in zip(grid[0], runs.methods, strict=True):
        axes.set_title(method.name)
    for axes in grid[-1]:
        axes.set_xlabel("x")
    mappable = matplotlib.cm.ScalarMappable(norm, _DENSITY_COLOURS)
    figure.colorbar(
        mappable, ax=grid, label="density, as a share of the panel's largest", shrink=0.6, pad=0.01
    )
    n = len(runs.seeds)
    what = (
        f"samples of {n} seeds pooled, distributions averaged"
        if n > 1
        else "samples and distributions of one seed"
    )
    grey = f"; in grey, the {runs.unit}" if drawn is not None else ""
    figure.suptitle(f"{runs.title or runs.name}: {what}{grey}")
    return figure


_DISTRIBUTION_WORDS = {
    "network": "network samples",
    "exact": "exact distribution",
    "resolved": "distribution at finite resolution",
    "optimum": "optimum",
}


_DENSITY_COLOURS = LinearSegmentedColormap.from_list(
    "density", ["#fde7b3", "#f7b267", "#e4572e", "#9e2a5c", "#2d1160"]
)


def _density(
    method: Method,
    solution: str,
    half: float,
    samples: Mapping[str, np.ndarray],
    distributions: Mapping[str, Distributions],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Cell edges along either side, and cell probabilities; None if the row was not solved."""
    if solution == "network":
        edges = np.linspace(-half, half, 81)
        points = samples[method.name]
        return edges, np.histogram2d(points[:, 0], points[:, 1], bins=[edges, edges])[0]
    distribution = distributions[solution]
    row = row_name(method.name, solution)
    if row not in distribution.cells:
        return None
    spacing = distribution.axis[1] - distribution.axis[0]
    return np.append(
        distribution.axis - spacing / 2, distribution.axis[-1] + spacing / 2
    ), distribution.cells[row]


def _overlay(axes: Axes, edges: np.ndarray, cells: np.ndarray, norm: Normalize) -> None:
    """Draw a density, transparent where it is less than the norm shows."""
    share = cells / cells.max()
    shown = np.ma.masked_less(share, norm.vmin or 0.0)
    inside = [int(i) for i in np.searchsorted(edges, axes.get_xlim())]
    cut = slice(max(inside[0] - 1, 0), inside[1] + 1)
    kept = edges[cut]
    values = shown[cut, cut][: len(kept) - 1, : len(kept) - 1]
    axes.pcolormesh(
        kept, kept, values.T, cmap=_DENSITY_COLOURS, norm=norm, alpha=0.75, linewidth=0, rasterized=True
    )


# ---------------------------------------------------------------------------- histograms


def histograms_figure(
    runs: Runs,
    rewards: Mapping[str, np.ndarray],
    distributions: Mapping[str, Distributions],
    tails: Mapping[str, float],
    reported: Mapping[str, Mapping[str, float]],
) -> Figure:
    """How the heights are distributed, a panel a method, with the tail marked.

    Args:
        rewards: of each method's network samples, (n,).
        distributions: by solution, for the lines of the exact rows.
        tails: tail metric of every row, by row name.
        reported: tail metric by source and method.
    """
    figure = Figure(figsize=(7.2, 1.75 * len(runs.methods) + 1.0))
    panels = figure.subplots(len(runs.methods), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    every = runs.sign * next(iter(distributions.values())).edges
    kept = every[:: max(1, math.ceil((len(every) - 1) / 60))]  # at most about so many bins, and the last edge
    edges = np.sort(np.append(kept, every[-1:] if kept[-1] != every[-1] else []))
    smallest = 0.3 / max(len(values) for values in rewards.values())
    for axes, method in zip(panels, runs.methods, strict=True):
        heights = np.clip(runs.sign * rewards[method.name], edges[0], edges[-1])
        shares = np.histogram(heights, edges)[0] / len(heights)
        axes.stairs(shares, edges, fill=True, color=COLOURS[method.kind], alpha=0.45)
        for solution, distribution in distributions.items():
            row = row_name(method.name, solution)
            if row in distribution.rewards:
                centres = runs.sign * 0.5 * (distribution.edges[1:] + distribution.edges[:-1])
                solved = np.histogram(centres, edges, weights=distribution.rewards[row])[0]
                axes.stairs(solved, edges, color="black", linestyle=_STYLES[solution], linewidth=1.3)
        _mark_tail(axes, runs, method, rewards[method.name], tails, reported)
        axes.set_yscale("log")
        axes.set(ylim=(smallest, 10.0), ylabel="share of\nsamples")
        axes.yaxis.set_major_locator(FixedLocator([10.0**k for k in range(-8, 1, 2)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(method.name, loc="left", color=COLOURS[method.kind], fontweight="bold")
    panels[-1].set_xlabel(runs.unit)
    panels[-1].set_xlim(edges.min(), edges.max() + 0.03 * np.ptp(edges))
    figure.suptitle(f"{runs.title or runs.name}: {runs.unit} of the samples")
    figure.legend(
        handles=_histogram_legend(runs, distributions, bool(reported)), loc="outside lower center", ncols=4
    )
    return figure


def _mark_tail(
    axes: Axes,
    runs: Runs,
    method: Method,
    rewards: np.ndarray,
    tails: Mapping[str, float],
    reported: Mapping[str, Mapping[str, float]],
) -> None:
    """Shade the tail of the network's samples, draw tail means, and point at reported ones."""
    begins = quantile(runs.sign * rewards, 1 - runs.mass)
    axes.axvspan(begins, float(axes.get_xlim()[1]) + 1e6, color=SHADE, alpha=0.25, linewidth=0)
    for solution, style in _STYLES.items():
        value = tails.get(row_name(method.name, solution), math.nan)
        if math.isfinite(value):
            colour = COLOURS[method.kind] if solution == "network" else "black"
            axes.axvline(
                value, ymax=0.82, color=colour, linestyle=style, linewidth=2 if solution == "network" else 1
            )
    said = [f"network {pretty(tails.get(method.name, math.nan))}"]
    for source, values in reported.items():
        if method.name in values:
            value = values[method.name]
            axes.plot(
                [value], [0.9], marker="v", markersize=9, color="black", transform=axes.get_xaxis_transform()
            )
            said.append(f"reported ({source}) {value:g}")
    text = f"{describe(runs.tail_metric).words}: " + ", ".join(said)
    axes.set_title(text, loc="right", fontsize=9)


def _histogram_legend(runs: Runs, distributions: Mapping[str, Distributions], reported: bool) -> list[Any]:
    handles: list[Any] = [Patch(color="#6b6b6b", alpha=0.45, label="network")]
    handles += [
        Line2D([], [], color="black", linestyle=_STYLES[k], label=_SOLUTION_WORDS[k]) for k in distributions
    ]
    side = "worst" if runs.unit == "cost" else "top"
    label = f"network's {side} {100 * runs.mass:g} %"
    handles.append(Patch(color=SHADE, alpha=0.4, label=label))
    handles.append(Line2D([], [], color="#6b6b6b", linewidth=2, label="tail means (vertical)"))
    if reported:
        handles.append(
            Line2D([], [], color="black", marker="v", markersize=8, linestyle="", label="reported tail mean")
        )
    return handles


# ------------------------------------------------------------------------------- studies


def study_figure(study: StudyRuns, points: list[Point], resolution: float | None = None) -> Figure:
    """Tail and objective against the study's axis: a column a parent experiment."""
    groups = parents(points)
    figure = Figure(figsize=(4.6 * len(groups) + 0.4, 6.8))
    grid = figure.subplots(2, len(groups), sharex="col", squeeze=False)
    for column, of in zip(grid.T, groups, strict=True):
        ticks = sorted({p.axis for p in points if p.of == of and p.axis is not None})
        for axes, metric in zip(column, (tail_metric(study, of), "objective"), strict=True):
            _study_panel(axes, points, of, metric)
            _place_ticks(axes, ticks)
            axes.set_ylabel(describe(metric).header)
            if study.tolerance is not None:
                _mark_resolution(axes, points, of, metric, study.tolerance, resolution)
        column[0].set_title(of)
        column[-1].set_xlabel(study.axis)
    figure.suptitle(study.title or study.name)
    handles = _study_legend(study, points, resolution)
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _study_panel(axes: Axes, points: list[Point], of: str, metric: str) -> None:
    for series in series_names(points, of):
        for solution, style in _STYLES.items():
            if found := curve(points, of, series, solution, metric):
                colour = COLOURS[found[0].kind]
                x = [p.axis or 0.0 for p in found]
                y = [p.value for p in found]
                if solution == "network":
                    bars = [0.0 if math.isnan(p.sd) else p.sd for p in found]
                    axes.errorbar(x, y, bars, color=colour, linestyle=style, marker="o", capsize=3, zorder=3)
                else:
                    axes.plot(x, y, color=colour, linestyle=style, marker=".", zorder=2)
    for p in references(points, of, metric):
        if p.kind == "pretrained":  # too far off: it would flatten the curves
            continue
        axes.axhline(p.value, color=COLOURS[p.kind], linestyle=_STYLES[p.solution], linewidth=1.2, zorder=1)
        if p.solution == "network" and not math.isnan(p.sd):
            axes.axhspan(p.value - p.sd, p.value + p.sd, color=COLOURS[p.kind], alpha=0.12, linewidth=0)


def _place_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic axis with a tick at every value that was run."""
    if not ticks or min(ticks) <= 0:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_resolution(
    axes: Axes, points: list[Point], of: str, metric: str, tolerance: float, resolution: float | None
) -> None:
    """Mark the measured resolution, and shade where every series' network is near its exact row."""
    if resolution:
        axes.axvline(resolution, color="black", linewidth=1, linestyle=_FINE_DOTS)
    tuned = {p.series for p in points if p.kind in TUNED}
    series = [name for name in series_names(points, of) if name in tuned]
    starts = [resolves_from(misses(points, of, name, metric), tolerance) for name in series]
    resolved = [start for start in starts if start is not None]
    if resolved and len(resolved) == len(starts):
        right = axes.get_xlim()[1]
        axes.axvspan(max(resolved), right, color=SHADE, alpha=0.25, linewidth=0)
        axes.set_xlim(right=right)


def _study_legend(study: StudyRuns, points: list[Point], resolution: float | None) -> list[Any]:
    varying = {p.kind for p in points if p.axis is not None}
    handles: list[Any] = []
    drawn = [p.kind for p in points if p.axis is not None or p.kind != "pretrained"]
    for kind in dict.fromkeys(drawn):
        marker = "o" if kind in varying else ""
        handles.append(Line2D([], [], color=COLOURS[kind], marker=marker, label=kind))
    solutions = {p.solution for p in points}
    handles += [
        Line2D([], [], color="#6b6b6b", linestyle=style, label=_SOLUTION_WORDS[solution])
        for solution, style in _STYLES.items()
        if solution in solutions
    ]
    if study.tolerance is not None:
        label = f"network within {100 * study.tolerance:g} % of exact"
        handles.append(Patch(color=SHADE, alpha=0.35, label=label))
        if resolution:
            handles.append(
                Line2D(
                    [], [], color="black", linestyle=_FINE_DOTS, label=f"measured resolution, {resolution:g}"
                )
            )
    return handles


# ------------------------------------------------------------------------------- writing


def height_of(experiment: TailExperiment) -> Height:
    """The landscape's height (n,) as a function of points (n, 2)."""
    import torch

    from flowtilt.domains.planar.build import build_reward

    reward = build_reward(experiment)
    return lambda points: reward.height(torch.from_numpy(points)).numpy()


def slope_of(experiment: FunctionalExperiment) -> Height | None:
    """The reward (n,) as a function of points (n, 2), if the experiment has one."""
    import torch

    from flowtilt.domains.planar.build import build_slope

    reward = build_slope(experiment)
    return None if reward is None else lambda points: reward(torch.from_numpy(points)).numpy()


def draw_experiment(
    results: str | Path, runs: Runs, height: Height, reported: pd.DataFrame, prefix: str | Path
) -> None:
    """Draw ``{prefix}_landscape.png``, ``{prefix}_densities.png`` and ``{prefix}_histograms.png``."""
    samples = {m.name: load_samples(results, runs, m.name) for m in runs.methods}
    points = {name: x for name, (x, _) in samples.items()}
    distributions = {
        solution: load_distributions(results, runs, solution) for solution in ("exact", "resolved")
    }
    half = min(window(list(points.values())), float(distributions["exact"].axis[-1]))
    summary = entries(summarise(collect_runs(results, [runs])))
    tails = {entry.row: entry.value for entry in summary if entry.metric == runs.tail_metric}
    title = runs.title or runs.name
    first = next((points[m.name] for m in runs.methods if m.kind == "pretrained"), None)
    save_figure(landscape_figure(height, half, runs.unit, title, first), f"{prefix}_landscape.png")
    save_figure(densities_figure(height, half, runs, points, distributions), f"{prefix}_densities.png", 125)
    rewards = {name: values for name, (_, values) in samples.items()}
    figure = histograms_figure(runs, rewards, distributions, tails, reported_tails(reported, runs))
    save_figure(figure, f"{prefix}_histograms.png")


def draw_functional(shown: Shown, prefix: str) -> None:
    """Draw ``{prefix}_densities.png`` and ``{prefix}_metrics.png`` of an experiment on functionals."""
    results, runs, height = shown.results, runs_of(shown.experiments[0]), slope_of(shown.experiments[0])
    points = {m.name: load_samples(results, runs, m.name)[0] for m in runs.methods}
    distributions = {solution: load_distributions(results, runs, solution) for solution in runs.solutions[1:]}
    half = min(window(list(points.values())), float(distributions["exact"].axis[-1]))
    long = with_gaps(collect_runs(results, [runs]))
    save_figure(densities_figure(height, half, runs, points, distributions), f"{prefix}_densities.png", 125)
    save_figure(metrics_figure(runs, long, shown.reported), f"{prefix}_metrics.png")


def draw_study(results: str | Path, study: StudyRuns, prefix: str | Path) -> None:
    """Draw ``{prefix}.png``; the resolution is read from the results if it was measured."""
    points = study_points(collect_runs(results, study.cases), study)
    save_figure(
        study_figure(study, points, read_resolution(Path(results) / "resolution.json")), f"{prefix}.png"
    )
