"""Where the files of a run in the plane are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowtilt.domains.planar.experiment import PlanarExperiment
from flowtilt.files import folder_of


@dataclass(frozen=True)
class RunFiles:
    """Where the files of a run are; None where a method of its kind has none.

    Attributes:
        model: weights; of the pretrained model, those of the base.
        samples: of the run.
        metrics: of the run.
        laws: solved on the grid, of a run on a functional.
        density: gridded log-density of the pretrained model.
        history: of the fine-tuning.
        threshold: of tfft.
        reference: samples of the pretrained model, if the experiment has it as a method.
    """

    model: Path
    samples: Path
    metrics: Path
    laws: Path
    density: Path
    history: Path | None
    threshold: Path | None
    reference: Path | None

    @classmethod
    def of(cls, results: Path, experiment: PlanarExperiment, method: str, seed: int) -> RunFiles:
        own = folder_of(results, experiment.name, method, seed)
        base = folder_of(results, experiment.base, "pretrained", seed)
        pretrained = folder_of(results, experiment.name, "pretrained", seed)
        kind = experiment.methods[method].kind
        tuned = kind != "pretrained"
        compared = tuned and "pretrained" in experiment.methods
        return cls(
            model=(own if tuned else base) / "model.safetensors",
            samples=own / "samples.npz",
            metrics=own / "metrics.json",
            laws=own / "laws.npz",
            density=base / "density.npz",
            history=own / "history.csv" if tuned else None,
            threshold=own / "threshold.json" if kind == "tfft" else None,
            reference=pretrained / "samples.npz" if compared else None,
        )
