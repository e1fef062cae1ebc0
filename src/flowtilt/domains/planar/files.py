"""Where the files of a run in the plane are, and those that it alone has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowtilt.domains.planar.experiment import PlanarExperiment
from flowtilt.domains.planar.rows import GriddedDensity
from flowtilt.files import folder_of
from flowtilt.pipeline.files import read_arrays, write_arrays


@dataclass(frozen=True)
class RunFiles:
    """Where the files of a run are; None where a method of its kind has none.

    Attributes:
        model: weights; of the pretrained model, those of the base.
        samples: of the run.
        metrics: of the run.
        distributions: solved on the grid, of a run on a functional.
        density: gridded log-density of the pretrained model.
        history: of the fine-tuning.
        threshold: of tfft.
        reference: samples of the pretrained model, if the experiment has it as a method.
    """

    model: Path
    samples: Path
    metrics: Path
    distributions: Path
    density: Path
    history: Path | None
    threshold: Path | None
    reference: Path | None

    @classmethod
    def of(cls, results: Path, experiment: PlanarExperiment, method: str, seed: int) -> RunFiles:
        own = folder_of(results, experiment.name, method, seed)
        base = folder_of(results, experiment.starts_from, "pretrained", seed)
        pretrained = folder_of(results, experiment.name, "pretrained", seed)
        kind = experiment.methods[method].kind
        tuned = kind != "pretrained"
        compared = tuned and "pretrained" in experiment.methods
        return cls(
            model=(own if tuned else base) / "model.safetensors",
            samples=own / "samples.npz",
            metrics=own / "metrics.json",
            distributions=own / "distributions.npz",
            density=base / "density.npz",
            history=own / "history.csv" if tuned else None,
            threshold=own / "threshold.json" if kind == "tfft" else None,
            reference=pretrained / "samples.npz" if compared else None,
        )


def write_density(density: GriddedDensity, path: Path) -> None:
    """Write the gridded log-density that divergences are measured from."""
    nowhere = np.zeros(density.log_density.shape, dtype=bool)
    floored = nowhere if density.floored is None else density.floored
    write_arrays(path, axis=density.axis, log_density=density.log_density, floored=floored)


def read_density(path: Path) -> GriddedDensity:
    """The gridded log-density of a pretrained model from a file of :func:`write_density`."""
    return GriddedDensity(*read_arrays(path, "axis", "log_density", "floored"))
