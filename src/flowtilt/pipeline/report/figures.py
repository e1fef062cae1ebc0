"""Figures of experiments and studies, drawn by their domain from the files of their runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt.pipeline.report.base import report_of, shown_file
from flowtilt.pipeline.report.comparison import read_reported
from flowtilt.pipeline.report.style import figure_style


def write_figures(
    file: str | Path,
    overrides: Mapping[str, Any] | None,
    results: str | Path,
    reported: str | Path,
    prefix: str | Path,
) -> None:
    """Draw the figures of an experiment (files ``{prefix}_*.png``) or a study (``{prefix}.png``).

    Args:
        file: the experiment's or study's file.
        overrides: merged into every experiment last.
        results: root of the results to read.
        reported: table of reported values.
        prefix: of the files to write.

    Raises:
        ConfigError: if the file is not a valid experiment or study.
        ResultsError: if a file of results is missing or malformed, or the reported values are.
    """
    shown = shown_file(file, overrides, results, read_reported(reported))
    with figure_style():
        report_of(shown.experiments[0]).draw(shown, str(prefix))
