"""Stages of the theory: run a study, and write its table and figure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt.files import read_json
from flowtilt.pipeline.files import StageError, write_json
from flowtilt.pipeline.theory import mirror_descent, thresholds
from flowtilt.pipeline.theory.config import MirrorDescentConfig, ThresholdStudyConfig, load_theory

log = logging.getLogger(__name__)


def run(file: Path, overrides: Mapping[str, Any], output: Path) -> list[str]:
    """Run the study of a configuration file and write its numbers. Returns what violates a bound, in words;
    the log has it too."""
    config = load_theory(file, overrides)
    try:
        if isinstance(config, MirrorDescentConfig):
            tables = mirror_descent.study(config)
        elif isinstance(config, ThresholdStudyConfig):
            tables = thresholds.study(config)
        else:
            from flowtilt.pipeline.theory import tilts  # imports torch, which the others do without

            tables = tilts.study(config)
    except (ValueError, ArithmeticError) as error:
        raise type(error)(f"{file}: {error}") from None
    write_json({"kind": config.kind, "title": config.title, "tables": tables}, output)
    judged = tables.get("iterations", []) + tables.get("shift", [])
    violated = [row for row in judged if row["verdict"] != "holds"]
    words = [", ".join(f"{key} {value}" for key, value in row.items()) for row in violated]
    for violation in words:
        log.warning("a bound is violated: %s", violation)
    return words


def report(result: Path, prefix: Path, figure: Path) -> None:
    """Write the table and draw the figure of a study that was run."""
    # The drawing library is slow to import, and a study does not need it.
    from flowtilt.pipeline.theory.figures import draw_theory
    from flowtilt.pipeline.theory.tables import write_theory_table

    try:
        data = read_json(result)
        write_theory_table(data, prefix)
        draw_theory(data, figure)
    except FileNotFoundError:
        raise StageError(f"{result}: no such file; run the theory stage first") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StageError(
            f"{result}: not a result of the theory stage ({error!r}); delete it and run again"
        ) from None
