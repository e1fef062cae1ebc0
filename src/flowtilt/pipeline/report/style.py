"""How all figures look, how they are saved, and the stage that has domains draw theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from flowtilt.files import atomic_path
from flowtilt.pipeline.report.base import report_of, shown_file
from flowtilt.pipeline.report.measurements import Runs

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "data": "#CC79A7",
    "pretrained": "#6b6b6b",
    "am": "#0072B2",
    "fdc": "#D55E00",
    "tfft": "#009E73",
    "best_of": "#000000",
    "resampled": "#56B4E9",
    "steered": "#E69F00",
}
"""Of the kinds of methods."""


SHADE = "#f0e442"


_RC: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """The style that all figures are drawn and saved in, as a context."""
    with matplotlib.rc_context(_RC):
        yield


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure as PNG that is the same, byte for byte, for the same figure."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def reported_tails(reported: pd.DataFrame, runs: Runs) -> dict[str, dict[str, float]]:
    """The reported tail metric by source and method."""
    chosen = reported[(reported["experiment"] == runs.name) & (reported["metric"] == runs.tail_metric)]
    found: dict[str, dict[str, float]] = {}
    for source, method, value in chosen[["source", "method", "value"]].itertuples(index=False):
        found.setdefault(str(source), {})[str(method)] = float(value)
    return found


def write_figures(
    file: Path, overrides: Mapping[str, Any] | None, results: Path, reported: Path, prefix: str | Path
) -> None:
    """Draw the figures of an experiment (files ``{prefix}_*.png``) or a study (``{prefix}.png``). The other
    arguments, and the errors, are those of :func:`flowtilt.pipeline.report.base.shown_file`."""
    shown = shown_file(file, overrides, results, reported)
    with figure_style():
        report_of(shown.experiments[0]).draw(shown, str(prefix))
