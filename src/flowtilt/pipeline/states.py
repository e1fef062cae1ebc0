"""Where stages that train keep the states of their trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flowtilt.checkpoints import sha256_of
from flowtilt.pipeline.experiment import Experiment, stage_digest
from flowtilt.resuming import Resumption


def resumption_of(
    experiment: Experiment,
    stage: str,
    seed: int,
    output: Path,
    inputs: Sequence[Path | None],
    method: str | None = None,
    resumed: Callable[[], None] | None = None,
) -> Resumption:
    """States in the folder ``state`` beside the stage's output, of its configuration and its inputs.

    Args:
        stage: its name, as :func:`flowtilt.pipeline.experiment.stage_digest` has it.
        inputs: files that it reads; None for one that it has not.
    """
    contents = [sha256_of(path) if path is not None and path.is_file() else None for path in inputs]
    of = f"{stage} {stage_digest(experiment, stage, method)} {method} {seed} {contents}"
    return Resumption(output.parent / "state", of, resumed=resumed)
