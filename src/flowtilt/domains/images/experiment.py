"""An experiment on images: exploration of a text-to-image model, or the left tail of its images' reward.

The files have the key ``domain: images``, and name a file of ``config/models``. This module imports neither
torch nor the numerics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

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
from flowtilt.pipeline.configuration import ConfigError, Name, NoRepeats, ToldApart, check_name, read_yaml
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.places import names_in, preferred
from flowtilt.pipeline.report.panels import Description
from flowtilt.pipeline.sections import TailSpec, check_methods


class ImageExperiment(Experiment):
    """One experiment on images."""

    domain: Literal["images"]
    """Says that the experiment is on images."""

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
    """What images are asked for; every prompt as often. Instead of the list, the path of a file with it: a
    JSON list of prompts or of objects with a ``prompt`` or ``text``, or one of either on each line."""

    training_prompts: Annotated[list[str], Field(min_length=1), NoRepeats] | None = None
    """What fine-tunings and offline batches ask for, as ``prompts``, which runs are then measured on alone;
    by default the same."""

    reward: ImageRewardConfig = ImageRewardConfig()
    """What am and tfft raise."""

    objective: Annotated[LeftTailObjective | EntropyObjective, Field(discriminator="utility")]
    """What is raised, and what is paid for it."""

    methods: Annotated[Mapping[Name, ImageMethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    evaluation: ImageEvaluationConfig
    """How runs are measured."""

    @model_validator(mode="after")
    def _methods_fit(self) -> ImageExperiment:
        check_methods(self.methods, self.solutions)
        for name, method in self.methods.items():
            if isinstance(self.objective, LeftTailObjective):
                self._check_on_tail(name, method)
            else:
                self._check_on_entropy(name, method)
            if method.kind == "resampled" and self.offline and self.offline.samples < len(self.prompts):
                raise ValueError(
                    f"offline.samples: {self.offline.samples} are fewer than the {len(self.prompts)} "
                    f"prompts, each of which {name!r} resamples images of; raise it"
                )
            if self.solver_of(name).endpoint_gradient != "pathwise":
                raise ValueError(
                    f"methods.{name}.solver.endpoint_gradient: must be pathwise; a reward of images has such "
                    "gradients"
                )
        kinds = {self.solver_of(name).kind for name, method in self.methods.items() if method.tuned}
        if self.guidance.dropout and "adjoint_matching" not in kinds:
            raise ValueError(
                "guidance.dropout: no method is solved by Adjoint Matching, whose trajectories it is of; set "
                "it to 0"
            )
        if self.retrain and self.model.embedded is None:
            raise ValueError(
                f"retrain: the model {self.model.name} has no section embedded to be trained by; "
                "set it to false"
            )
        return self

    def _check_on_tail(self, name: str, method: ImageMethodConfig) -> None:
        if method.kind == "fdc" and method.by != "exponents":
            raise ValueError(
                f"methods.{name}.by: on the left tail fdc goes by the reward's values; set it to exponents"
            )
        if method.kind in ("tfft", "fdc") and self.offline is None:
            what = "its threshold from" if method.kind == "tfft" else "its first step on"
            raise ValueError(f"offline: method {name!r} finds {what} an offline batch; add samples")

    def _check_on_entropy(self, name: str, method: ImageMethodConfig) -> None:
        if method.kind == "tfft" or method.mass is not None:
            raise ValueError(f"methods.{name}: tfft and mass are of the left tail, not of entropy")
        if method.by == "exponents":
            raise ValueError(
                f"methods.{name}.by: the entropy of latents has scores and no values, which exponents are "
                "made of; set it to scores, and give the method a step"
            )
        if method.kind == "fdc" and self.solver_of(name).kind != "adjoint_matching":
            raise ValueError(
                f"methods.{name}.solver.kind: the entropy of latents has scores and no values, which fits "
                "take; set it to adjoint_matching"
            )

    @property
    def trained_prompts(self) -> list[str]:
        """What fine-tunings and offline batches ask for."""
        return self.training_prompts or self.prompts

    @property
    def mass(self) -> float:
        """Share of the distribution that the table is led by."""
        return self.objective.mass if isinstance(self.objective, LeftTailObjective) else 1.0

    def mass_of(self, method: str) -> float:
        """Share of a method's own tail."""
        return self.methods[method].mass or self.mass

    @property
    def tail_masses(self) -> set[float]:
        """Masses of the tails that methods raise; none on the entropy."""
        if not isinstance(self.objective, LeftTailObjective):
            return set()
        return {self.mass_of(name) for name, one in self.methods.items() if one.kind in ("tfft", "fdc")}

    def tail_of(self, method: str) -> TailSpec:
        """Tail, mass and KL weight of a method's tail problem."""
        return TailSpec("lower", self.mass_of(method), self.methods[method].alpha or self.objective.alpha)

    @property
    def _guided(self) -> int:
        """Passes of a guided state: two, with its prompt and with the empty one."""
        return 1 if self.guidance.sampling == 1 else 2

    @property
    def sample_passes(self) -> int:
        """Network passes of an image, by the memoryless process."""
        return self.solver.steps * self._guided

    @property
    def offline_passes(self) -> int:
        return super().offline_passes * self._guided

    def reward_weight_of(self, method: str) -> float:
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


def tail_metric(mass: float) -> str:
    """Name of the mean over the worst share of the reward: ``left_cvar_0.2``."""
    return f"left_cvar_{mass:g}"


_LEFT_CVAR = re.compile(r"left_cvar_([0-9.]+)")
_SHARE_OF = re.compile(r"share_(.+)")

WORDS = {
    "vendi": Description("Vendi score", "", "higher"),
    "vendi_of_a_prompt": Description("Vendi score within a prompt", "", "higher"),
    "clip": Description("CLIP score", "cosine", "higher"),
    "designs_covered": Description("designs covered", "", "higher"),
    "combinations_covered": Description("combinations covered", "", "higher"),
    "effective_designs": Description("effective number of designs", "", "higher"),
}


def describe(metric: str) -> Description | None:
    """Words and unit of a metric; None for one that is not of this domain alone."""
    if left := _LEFT_CVAR.fullmatch(metric):
        return Description(f"worst-{100 * float(left[1]):g} % mean", "reward", "higher")
    if share := _SHARE_OF.fullmatch(metric):
        return Description(share[1].replace("_", " "), "share")
    return WORDS.get(metric)


def image_name(prompt: int, number: int) -> str:
    """File of a run's image: that of its prompt's position, and its number among the prompt's."""
    return f"prompt{prompt:03d}_{number:04d}.png"


def with_model(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The data of an experiment with its model's file in the place of the model's name. Raises ConfigError if
    there is no such model."""
    name = data.get("model")
    if not isinstance(name, str):
        return dict(data)
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"{path}: key model: {error} (got {name!r})") from None
    file = preferred(path.parent.parent / "models" / f"{name}.yaml", f"config/models/{name}.yaml")
    if not file.is_file():
        known = names_in(file.parent, "config/models")
        raise ConfigError(f"{path}: key model: unknown model {name!r}, there is no {file} (known: {known})")
    return {**data, "model": {"name": name, **read_yaml(file)}}


def check_models(files: Mapping[str, Mapping[str, Experiment]]) -> None:
    """Refuse experiments of one model that would have it trained in two ways. Raises ConfigError, naming the
    file and the key."""
    first: dict[str, ImageExperiment] = {}
    for name, cases in files.items():
        for case in cases.values():
            if not isinstance(case, ImageExperiment):
                continue
            other = first.setdefault(case.model.name, case)
            if case.model != other.model:
                raise ConfigError(
                    f"config/experiments/{name}.yaml: key model: differs from that of {other.name}, which "
                    "has the same name; give it another name, or leave both as their file has them"
                )
