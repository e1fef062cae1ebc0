"""Angles on a circle: what the workflow is planned by. It imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from flowtilt.pipeline.configuration import Count, Positive, Section
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.report.panels import Description
from flowtilt.pipeline.sections import TailSpec
from flowtilt.pipeline.usual import BaseDomain, usual_stages


class Data(Section):
    """A mixture of wrapped normal distributions of angles, all components as likely."""

    means: Annotated[list[float], Field(min_length=1)]
    """Means of the components, in radians."""

    deviation: Positive
    """Standard deviation of each, in radians."""


class Network(Section):
    """The velocity network."""

    width: Count
    """Of each of its two hidden layers."""


class Pretraining(Section):
    """How the flow is pretrained."""

    updates: Count
    """Optimiser steps."""

    batch: Count
    """Samples an update."""

    learning_rate: Positive
    """Of Adam."""


class Compass(Section):
    """The reward: the cosine of the angle between a sample and a direction."""

    direction: float
    """In radians."""


class Objective(Section):
    """What is raised, and what is paid for it."""

    mass: Annotated[float, Field(gt=0, lt=1)]
    """Of the upper tail that fdc and tfft raise the mean of."""

    alpha: Positive
    """KL weight, in units of the reward a nat."""


class Evaluation(Section):
    """How runs are measured."""

    samples: Count
    """Of each run."""

    ode_steps: Count
    """Of the ODE solver that draws them."""


class CircleExperiment(Experiment):
    """One experiment on angles; pretraining, fine-tuning and methods are described in flowtilt."""

    domain: Literal["circle"]
    data: Data
    network: Network
    pretrain: Pretraining
    reward: Compass
    objective: Objective
    evaluation: Evaluation

    def tail_of(self, method: str) -> TailSpec:
        return TailSpec("upper", self.objective.mass, self.objective.alpha)

    def reward_weight_of(self, method: str) -> float:
        return self.objective.alpha


class Circle(BaseDomain):
    """See :class:`flowtilt.pipeline.domain.Domain`; what is not here is as in the base class."""

    name = "circle"
    words = "on a circle"
    stages = usual_stages("circle_domain.work", flow=("network",), pretraining=("data", "pretrain"))
    workbench = "circle_domain.work:CircleBench"
    process = "circle_domain.work:process"

    def schema(self, data: Mapping[str, Any]) -> type[CircleExperiment]:
        return CircleExperiment

    def describe(self, metric: str) -> Description | None:
        return Description("mean resultant length", "") if metric == "resultant_length" else None


DOMAIN = Circle()
