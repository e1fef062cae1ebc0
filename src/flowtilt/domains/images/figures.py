"""Figures of images: the images of all methods side by side, and the scores that they are judged by."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from flowtilt.domains.images.experiment import ImageExperiment, image_name, tail_metric
from flowtilt.metrics.tails import lower_tail_mean, quantile
from flowtilt.pipeline.report.base import Shown
from flowtilt.pipeline.report.claims import spread
from flowtilt.pipeline.report.frontier import draw_frontier
from flowtilt.pipeline.report.measurements import (
    ResultsError,
    Runs,
    models_of,
    of_row,
    read_arrays,
    run_folder,
)
from flowtilt.pipeline.report.panels import describe
from flowtilt.pipeline.report.style import COLOURS, SHADE, save_figure

_BAD = "#b2182b"
# Tol's muted colours: none of them is a method's.
_CLASSES = ("#88CCEE", "#882255", "#117733", "#DDCC77", "#332288", "#CC6677", "#AA4499", "#44AA99")

COLUMNS = 12
"""Images beside each other in the drawing."""
LINES = 2
"""Lines of images of each method, where all are of one prompt."""


@dataclass(frozen=True)
class Scores:
    """What the images of a run are worth, all of shape (images,).

    Attributes:
        prompt: positions of their prompts, falling nowhere.
        design: which class it is told to be of, -1 for none.
    """

    prompt: np.ndarray
    reward: np.ndarray
    design: np.ndarray

    def of(self, prompt: int, number: int) -> int:
        """Position of a prompt's image by its number among the prompt's."""
        return int(np.flatnonzero(self.prompt == prompt)[number])


def load_scores(results: str | Path, runs: Runs, method: str, seed: int) -> Scores:
    """The scores of one run. Raises ResultsError if the file is missing or malformed."""
    path = run_folder(results, runs, method, "network", seed) / "scores.npz"
    arrays = read_arrays(path, "prompt", "reward", "design")
    return Scores(arrays["prompt"], arrays["reward"], arrays["design"])


def read_image(folder: Path, prompt: int, number: int) -> np.ndarray:
    """An image of a run, uint8 (height, width, 3). Raises ResultsError if it is missing or cannot be read."""
    path = folder / image_name(prompt, number)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises SyntaxError too, and what zlib and struct raise
        raise ResultsError(
            f"{path}: cannot be read ({error}); make it with `snakemake --cores all --force {folder}`"
        ) from None


# --------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Cell:
    """An image, uint8 (height, width, 3), what is written under it, and the colours of text and frame."""

    image: np.ndarray
    text: str = ""
    text_colour: str = "black"
    frame: str | None = None


@dataclass(frozen=True)
class Strip:
    """The images of one method, in lines."""

    name: str
    kind: str
    lines: Sequence[Sequence[Cell]]


def exploration_strips(results: str | Path, experiment: ImageExperiment) -> list[Strip]:
    """Images of the first prompt by every method from the same noise, framed by their design."""
    runs = models_of(experiment)
    seed, count = runs.seeds[0], min(COLUMNS * LINES, experiment.evaluation.images)
    strips = []
    for method in runs.methods:
        scores = load_scores(results, runs, method.name, seed)
        folder = run_folder(results, runs, method.name, "network", seed) / "images"
        cells = []
        for number in range(count):
            design = int(scores.design[scores.of(0, number)])
            frame = _class_colour(design) if design >= 0 else None
            cells.append(Cell(read_image(folder, 0, number), frame=frame))
        lines = [cells[i : i + COLUMNS] for i in range(0, count, COLUMNS)]
        strips.append(Strip(method.name, method.kind, lines))
    return strips


def tail_strips(results: str | Path, experiment: ImageExperiment) -> tuple[list[Strip], float]:
    """The first image of each prompt by every method from the same noise, with its reward.

    Returns:
        The images, and the reward below which the worst share of the pretrained model's are: rewards below
        it are red.
    """
    runs = models_of(experiment)
    seed = runs.seeds[0]
    prompts = range(min(COLUMNS, len(experiment.prompts)))
    base = next((m.name for m in runs.methods if m.kind == "pretrained"), runs.methods[0].name)
    bad = quantile(load_scores(results, runs, base, seed).reward, runs.mass)
    strips = []
    for method in runs.methods:
        scores = load_scores(results, runs, method.name, seed)
        folder = run_folder(results, runs, method.name, "network", seed) / "images"
        cells = []
        for prompt in prompts:
            reward = float(scores.reward[scores.of(prompt, 0)])
            colour = _BAD if reward <= bad else "black"
            cells.append(Cell(read_image(folder, prompt, 0), f"{reward:.3f}", colour))
        strips.append(Strip(method.name, method.kind, [cells]))
    return strips, bad


def _class_colour(number: int) -> str:
    return _CLASSES[number % len(_CLASSES)]


def images_of(results: str | Path, experiment: ImageExperiment) -> Figure:
    """The drawing of an experiment's images: a line or more a method, the same noise in each column. Raises
    ResultsError if a file is missing or malformed."""
    seed = experiment.seeds[0]
    if experiment.objective.utility == "entropy":
        designs = experiment.evaluation.designs
        handles: list[Any] = [
            Patch(facecolor="none", edgecolor=_class_colour(k), linewidth=2.5, label=name)
            for k, name in enumerate(designs)
        ]
        framed = "; frames show the design" if designs else ""
        title = f"{experiment.title}, seed {seed}: the same noise at the same places{framed}"
        return images_figure(title, [], exploration_strips(results, experiment), handles)
    strips, bad = tail_strips(results, experiment)
    share = f"{100 * experiment.mass:g} %"
    label = f"reward like those of the pretrained model's worst {share}, at most {bad:.3f}"
    handles = [
        Line2D([], [], linestyle="", marker="$0.1$", markersize=14, color="black", label="reward"),
        Line2D([], [], linestyle="", marker="$0.1$", markersize=14, color=_BAD, label=label),
    ]
    title = f"{experiment.title}, seed {seed}: each column is of one prompt and from the same noise"
    return images_figure(title, experiment.prompts[:COLUMNS], strips, handles)


_SIDE, _GAP, _TEXT, _LETTER = 0.92, 0.07, 0.17, 0.092
"""Inches: an image, between images, what is written under an image, and a letter of a method's name."""
_NARROWEST = 7.2
"""Inches that a legend has room in."""
_ENLARGED = 256
"""Pixels a side that small images are enlarged to, so that theirs stay squares."""


def images_figure(
    title: str, columns: Sequence[str], strips: Sequence[Strip], handles: Sequence[Any]
) -> Figure:
    """Images in lines, the methods' names on the left."""
    written = _TEXT if any(cell.text for strip in strips for line in strip.lines for cell in line) else 0.0
    step, between = _SIDE + _GAP + written, 0.1
    names = 0.3 + _LETTER * max(len(strip.name) for strip in strips)
    widest = max(len(line) for strip in strips for line in strip.lines)
    needed = names + widest * (_SIDE + _GAP) + 0.15
    width = max(needed, _NARROWEST)
    left = names + (width - needed) / 2
    heading, wrapped = textwrap.fill(title, int(width / 0.1)), [textwrap.fill(text, 15) for text in columns]
    above = 0.25 + 0.2 * _lines(heading) + 0.125 * max(map(_lines, wrapped), default=0)
    height = above + sum(len(s.lines) * step + between for s in strips) + (0.4 if handles else 0.1)
    # Positions are inches from the upper left corner, which a layout engine would move.
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    top = above
    for strip in strips:
        middle = top + (len(strip.lines) * step - _GAP - written) / 2
        style: dict[str, Any] = {"color": COLOURS[strip.kind], "fontweight": "bold"}
        axes.text(left - 0.12, middle, strip.name, ha="right", va="center", fontsize=10, **style)
        for line in strip.lines:
            for number, cell in enumerate(line):
                _draw_cell(axes, left + number * (_SIDE + _GAP), top, cell)
            top += step
        top += between
    for number, text in enumerate(wrapped):
        x = left + number * (_SIDE + _GAP) + _SIDE / 2
        axes.text(x, above - 0.06, text, ha="center", va="bottom", fontsize=7, linespacing=1.05)
    axes.text(width / 2, 0.12, heading, ha="center", va="top", fontsize=12)
    axes.set(xlim=(0, width), ylim=(height, 0))
    if handles:
        figure.legend(handles=list(handles), loc="lower center", ncols=len(handles), frameon=False)
    return figure


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _draw_cell(axes: Axes, x: float, y: float, cell: Cell) -> None:
    """Draw an image with its upper left corner at a place in inches."""
    factor = max(1, _ENLARGED // max(cell.image.shape[:2]))
    pixels = cell.image.repeat(factor, axis=0).repeat(factor, axis=1)
    axes.imshow(pixels, extent=(x, x + _SIDE, y + _SIDE, y), aspect="auto")
    if cell.frame is not None:
        axes.add_patch(Rectangle((x, y), _SIDE, _SIDE, fill=False, edgecolor=cell.frame, linewidth=2.5))
    if cell.text:
        axes.text(
            x + _SIDE / 2,
            y + _SIDE + 0.02,
            cell.text,
            ha="center",
            va="top",
            fontsize=7.5,
            color=cell.text_colour,
            fontweight="normal" if cell.text_colour == "black" else "bold",
        )


# ------------------------------------------------------------------------------------ scores


def tail_figure(experiment: ImageExperiment, rewards: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """How the rewards are distributed, a panel a method, with the worst share and its mean marked.

    Args:
        rewards: by method, of each seed's images, (images,).
    """
    runs = models_of(experiment)
    pooled = {name: np.concatenate(own) for name, own in rewards.items()}
    every = np.concatenate(list(pooled.values()))
    edges = np.linspace(every.min(), every.max(), 51)
    base = next((m.name for m in runs.methods if m.kind == "pretrained"), None)
    figure = Figure(figsize=(8.8, 1.5 * len(runs.methods) + 1.0))
    panels = figure.subplots(len(runs.methods), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, method in zip(panels, runs.methods, strict=True):
        own, colour = pooled[method.name], COLOURS[method.kind]
        axes.stairs(np.histogram(own, edges)[0] / len(own), edges, fill=True, color=colour, alpha=0.5)
        axes.axvspan(edges[0], quantile(own, runs.mass), color=SHADE, alpha=0.3, linewidth=0)
        if base is not None:
            before = np.histogram(pooled[base], edges)[0] / len(pooled[base])
            axes.stairs(before, edges, color=COLOURS["pretrained"], linewidth=1.0)
            axes.axvline(_tail_means(rewards[base], runs.mass).mean(), color="#6b6b6b", linestyle="--")
        axes.axvline(_tail_means(rewards[method.name], runs.mass).mean(), color="black", linewidth=1.5)
        axes.set_title(method.name, loc="left", color=colour, fontweight="bold")
        axes.set_title(_said(experiment, method.name, rewards[method.name]), loc="right", fontsize=9)
        axes.set_ylabel("share of\nimages")
    panels[-1].set(xlabel="reward", xlim=(edges[0], edges[-1]))
    figure.suptitle(experiment.title)
    share = f"worst {100 * runs.mass:g} %"
    handles: list[Any] = [
        Patch(color=SHADE, alpha=0.4, label=share),
        Line2D([], [], color="black", linewidth=1.5, label=f"mean of the {share}"),
    ]
    if base is not None:
        handles += [
            Line2D([], [], color="#6b6b6b", linewidth=1.0, label=base),
            Line2D([], [], color="#6b6b6b", linestyle="--", label=f"mean of its {share}"),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _tail_means(rewards: Sequence[np.ndarray], mass: float) -> np.ndarray:
    """Of each seed's rewards, (seeds,)."""
    return np.array([lower_tail_mean(own, mass) for own in rewards])


def _said(experiment: ImageExperiment, method: str, rewards: Sequence[np.ndarray]) -> str:
    """The tail means of the experiment's and the method's own share, over seeds, and the mean."""
    masses = dict.fromkeys([experiment.mass, experiment.mass_of(method)])
    said = [f"{describe(tail_metric(mass)).words} {spread(_tail_means(rewards, mass))}" for mass in masses]
    return "; ".join([*said, f"mean {spread(np.array([own.mean() for own in rewards]))}"])


_SHOWN = ("vendi", "clip", "effective_designs", "combinations_covered")


def exploration_figure(experiment: ImageExperiment, long: pd.DataFrame) -> Figure:
    """How diverse the images of every method are, and how many are of each design."""
    runs = models_of(experiment)
    colours = _shades([(m.name, m.kind) for m in runs.methods])
    shown = [metric for metric in _SHOWN if (long["metric"] == metric).any()]
    designs = experiment.evaluation.designs
    mosaic = [shown, ["shares"] * len(shown)] if designs else [shown]
    figure = Figure(figsize=(2.9 * len(shown) + 0.6, 6.2 if designs else 3.4))
    panels = figure.subplot_mosaic([list(line) for line in mosaic])
    for metric in shown:
        _metric_panel(panels[metric], long, metric, colours)
    if designs:
        _shares_panel(panels["shares"], long, designs, colours)
    labels = {name: f"{name}, Vendi score {spread(of_row(long, name, 'vendi'))}" for name in colours}
    handles: list[Any] = [Patch(color=colour, label=labels[name]) for name, colour in colours.items()]
    handles.append(Line2D([], [], color="black", marker="o", markersize=4, linestyle="", label="each seed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(experiment.title)
    return figure


def _metric_panel(axes: Axes, long: pd.DataFrame, metric: str, colours: Mapping[str, str]) -> None:
    for place, (name, colour) in enumerate(colours.items()):
        own = of_row(long, name, metric)
        axes.plot([place - 0.3, place + 0.3], [own.mean()] * 2, color=colour, linewidth=3)
        axes.plot(place + _beside(len(own), 0.3), own, "o", color="black", markersize=4, zorder=3)
    axes.set_title(describe(metric).header)
    axes.set_xticks(range(len(colours)), list(colours), rotation=35, ha="right")
    axes.margins(y=0.15)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _shares_panel(axes: Axes, long: pd.DataFrame, designs: Sequence[str], colours: Mapping[str, str]) -> None:
    width = 0.8 / len(colours)
    for number, (name, colour) in enumerate(colours.items()):
        for place, design in enumerate(designs):
            own = of_row(long, name, f"share_{design}")
            at = place + (number - (len(colours) - 1) / 2) * width
            axes.bar(at, own.mean(), width=0.92 * width, color=colour)
            axes.plot(at + _beside(len(own), 0.4 * width), own, "o", color="black", markersize=2.5)
    axes.set_xticks(range(len(designs)), designs)
    axes.set(ylabel="share of images", ylim=(0, None), xlim=(-0.6, len(designs) - 0.4))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _beside(count: int, width: float) -> np.ndarray:
    """Places of ``count`` dots beside each other."""
    return np.linspace(-width / 2, width / 2, count) if count > 1 else np.zeros(count)


def _shades(methods: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Colours of methods: those of one kind rise from a light shade to the kind's own."""
    colours = {}
    for kind in dict.fromkeys(kind for _, kind in methods):
        names = [name for name, own in methods if own == kind]
        for number, name in enumerate(names, start=1):
            strength = 0.35 + 0.65 * number / len(names) if len(names) > 1 else 1.0
            red, green, blue = (1 - strength * (1 - part) for part in to_rgb(COLOURS[kind]))
            colours[name] = to_hex((red, green, blue))
    return {name: colours[name] for name, _ in methods}


def draw(shown: Shown, prefix: str) -> None:
    """Draw ``{prefix}_images.png`` and ``{prefix}_scores.png`` of an experiment on images, and
    ``{prefix}_frontier.png`` if a method has a budget."""
    results, experiment = shown.results, shown.experiments[0]
    draw_frontier(shown, prefix, [experiment.mean_metric, *map(tail_metric, (0.2, 0.1))])
    runs = models_of(experiment)
    if runs.has_tail:
        rewards = {
            m.name: [load_scores(results, runs, m.name, seed).reward for seed in runs.seeds]
            for m in runs.methods
        }
        scores = tail_figure(experiment, rewards)
    else:
        scores = exploration_figure(experiment, shown.collected)
    save_figure(scores, f"{prefix}_scores.png")
    save_figure(images_of(results, experiment), f"{prefix}_images.png")
