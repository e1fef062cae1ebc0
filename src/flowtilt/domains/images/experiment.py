"""An experiment on pictures: exploration of a text-to-image model, or the left tail of its pictures' reward.

The files have the key ``domain: images``, and name a file of ``config/models``; :mod:`flowtilt.pipeline.experiment`
reads both. This module imports neither torch nor the numerics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flowtilt.domains.images.sections import (
    AdapterConfig,
    ComputeConfig,
    EntropyObjective,
    GuidanceConfig,
    ImageEvaluationConfig,
    ImageMethodConfig,
    ImageModelConfig,
    ImageRewardConfig,
    LeftTailObjective,
    ScheduleConfig,
)
from flowtilt.pipeline.configuration import CaseName, Name, NoRepeats, Section, Seeds, ToldApart, changed
from flowtilt.pipeline.sections import OfflineConfig, SolverConfig, TailSpec, check_methods

_MODEL = ("model", "retrain")
_FLOW = (*_MODEL, "adapter", "guidance", "schedule", "compute", "prompts")


class ImageExperiment(Section):
    """One experiment on pictures."""

    layers: ClassVar[tuple[str, ...]] = ("network",)
    """Rows of each method in the tables: there is no grid to solve anything on."""

    solved_apart: ClassVar[bool] = True
    rules: ClassVar[str] = "images_"
    """What the names of the workflow's rules for its stages begin with."""

    stage_sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fetch": ("model", "reward"),
        "pretrain": _MODEL,
        "model": _MODEL,
        "offline": ("name", *_FLOW, "reward", "offline", "solver"),
        "threshold": ("objective", "solver"),
        "finetune": ("name", *_FLOW, "reward", "objective", "solver"),
        "sample": ("name", *_FLOW, "solver", "evaluation"),
        "evaluate": ("model", "prompts", "reward", "objective", "evaluation", "methods"),
    }
    """What each stage reads; see :func:`flowtilt.pipeline.experiment.stage_digest`."""

    unit: ClassVar[str] = "reward"

    name: CaseName
    """Name of the experiment: that of its file."""

    domain: Literal["images"]
    """Says that the experiment is on pictures."""

    title: str
    """Title of its table."""

    base: Name
    """The experiment itself."""

    seeds: Seeds
    """Seeds of the runs; a number n stands for 0 to n - 1."""

    model: ImageModelConfig
    """The model; in an experiment's file, the name of a file of ``config/models``."""

    retrain: bool = False
    """Whether the model is trained anew, by its section ``embedded``, and the shipped one not read."""

    adapter: AdapterConfig | None = None
    """Adapters that are fine-tuned; without them, all weights of the denoiser are."""

    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance, by what a velocity is used for."""

    schedule: ScheduleConfig = ScheduleConfig()
    """The noise schedule."""

    compute: ComputeConfig = ComputeConfig()
    """Precision and memory."""

    prompts: Annotated[list[str], Field(min_length=1), NoRepeats]
    """What pictures are asked for; every prompt as often."""

    reward: ImageRewardConfig = ImageRewardConfig()
    """What am and tfft raise."""

    objective: Annotated[LeftTailObjective | EntropyObjective, Field(discriminator="utility")]
    """What is raised, and what is paid for it."""

    offline: OfflineConfig | None = None
    """Size of the batch that thresholds come from; tfft must have it."""

    solver: SolverConfig
    """The control solver of all methods."""

    methods: Annotated[Mapping[Name, ImageMethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    evaluation: ImageEvaluationConfig
    """How runs are measured."""

    axis_value: float | None = None
    """Unused: there are no studies of pictures."""

    @model_validator(mode="after")
    def _methods_fit(self) -> ImageExperiment:
        check_methods(self.methods, self.layers)
        own = {"left_tail": "tfft", "entropy": "fdc"}[self.objective.utility]
        for name, method in self.methods.items():
            if method.kind in ("tfft", "fdc") and method.kind != own:
                raise ValueError(
                    f"methods.{name}.kind: {self.objective.utility} is for {own}, not for {method.kind}"
                )
            if method.kind == "tfft" and self.offline is None:
                raise ValueError(
                    f"offline: method {name!r} takes its threshold from an offline batch; add samples"
                )
            solver = self._solver(name)
            if solver.kind != "adjoint_matching" or solver.endpoint_gradient != "pathwise":
                raise ValueError(
                    f"methods.{name}.solver: pictures are fine-tuned by adjoint_matching with pathwise "
                    "gradients; a reward of pictures has them"
                )
        if self.retrain and self.model.embedded is None:
            raise ValueError(
                f"retrain: the model {self.model.name} has no section embedded to be trained by; "
                "set it to false"
            )
        return self

    def _solver(self, method: str) -> SolverConfig:
        return changed(self.solver, self.methods[method].solver, f"methods.{method}.solver")

    def solver_of(self, method: str) -> SolverConfig:
        """The control solver of a method: the experiment's with the method's changes."""
        return self._solver(method)

    def updates_of(self, method: str) -> int:
        """Optimiser steps in each solve of a method."""
        return self.methods[method].updates or self.solver_of(method).updates

    @property
    def mass(self) -> float:
        """Share of the law that the table is led by."""
        return self.objective.mass if isinstance(self.objective, LeftTailObjective) else 1.0

    def mass_of(self, method: str) -> float:
        """Share of a method's own tail."""
        return self.methods[method].mass or self.mass

    def tail_of(self, method: str) -> TailSpec:
        """Side, mass and KL weight of a method's tail problem."""
        return TailSpec("lower", self.mass_of(method), self.objective.alpha)

    @property
    def offline_samples(self) -> int:
        """Pictures in the offline batch."""
        return self.offline.samples if self.offline is not None else 0

    @property
    def reward_weight(self) -> float:
        """KL weight of am, in units of the reward a nat."""
        objective = self.objective
        return objective.alpha if isinstance(objective, LeftTailObjective) else objective.reward_alpha

    def entropy_weight(self, method: str) -> float:
        """KL weight of a method's entropy."""
        return self.methods[method].alpha or self.objective.alpha

    @property
    def main_metric(self) -> str:
        """Name of the metric that the tables lead with."""
        if isinstance(self.objective, LeftTailObjective):
            return tail_metric(self.objective.mass)
        return "vendi"

    @property
    def mean_metric(self) -> str:
        return f"mean_{self.unit}"


def tail_metric(mass: float) -> str:
    """Name of the mean over the worst share of the reward: ``left_cvar_0.2``."""
    return f"left_cvar_{mass:g}"
