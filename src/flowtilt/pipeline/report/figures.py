"""Figures of experiments and studies, drawn by their domain from the files of their runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt.pipeline.report.base import report_of, shown_file
from flowtilt.pipeline.report.style import figure_style


def write_figures(
    file: Path, overrides: Mapping[str, Any] | None, results: Path, reported: Path, prefix: str | Path
) -> None:
    """Draw the figures of an experiment (files ``{prefix}_*.png``) or a study (``{prefix}.png``).

    The other arguments, and the errors, are those of :func:`flowtilt.pipeline.report.base.shown_file`.
    """
    shown = shown_file(file, overrides, results, reported)
    with figure_style():
        report_of(shown.experiments[0]).draw(shown, str(prefix))
