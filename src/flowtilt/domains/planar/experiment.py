"""Experiments in the plane: on a tail of a landscape, or on any pair of a utility and a divergence.

The files have the key ``domain: planar``; the two kinds are told apart by their ``objective``. This module
imports neither torch nor the numerics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flowtilt.domains.planar.sections import (
    BowlConfig,
    CalibrationConfig,
    EvaluationConfig,
    FunctionalEvaluationConfig,
    FunctionalMethodConfig,
    FunctionalObjective,
    GridConfig,
    NetworkConfig,
    PathConfig,
    PlanarMethodConfig,
    PretrainConfig,
    SlopeConfig,
    TailMethodConfig,
    TailObjective,
    ZonesConfig,
)
from flowtilt.pipeline.configuration import ConfigError, Name, ToldApart, changed
from flowtilt.pipeline.experiment import Experiment, method_of
from flowtilt.pipeline.sections import DataConfig, OfflineConfig, TailSpec
from flowtilt.words import Tail


class PlanarExperiment(Experiment):
    """What every experiment in the plane, or one case of a study, has; see the two kinds below."""

    counts_passes = False

    domain: Literal["planar"]
    """Says that the experiment is in the plane."""

    path: PathConfig
    """The interpolant between noise and data."""

    network: NetworkConfig
    """The velocity network."""

    data: DataConfig
    """The distribution that the model is pretrained on."""

    pretrain: PretrainConfig
    """How it is pretrained."""

    offline: OfflineConfig
    """Sizes of batches."""

    methods: Annotated[Mapping[Name, PlanarMethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    evaluation: EvaluationConfig
    """How runs are measured."""

    grid: GridConfig
    """The grids that distributions are solved on."""

    @model_validator(mode="after")
    def _prediction_fits_path(self) -> PlanarExperiment:
        if self.path.kind == "linear" and self.network.prediction == "score":
            raise ValueError(
                "network.prediction: a score gives no finite velocity at the noise end of the linear path; "
                "set it to velocity"
            )
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> PlanarExperiment:
        for name, method in self.methods.items():
            if method.continue_from is None:
                continue
            earlier = self.methods.get(method.continue_from)
            if earlier is None or earlier.kind != "fdc":
                raise ValueError(
                    f"methods.{name}.continue_from names {method.continue_from!r}, "
                    f"which is no fdc method of this experiment ({', '.join(self.methods)})"
                )
            if not method.continues(earlier):
                raise ValueError(
                    f"methods.{name} must have more iterations than {method.continue_from!r}, "
                    "and all other keys the same"
                )
        return self

    def updates_of(self, method: str) -> int:
        """Optimiser steps in each solve of a method."""
        most = self.solver_of(method).updates
        return min(method_of(self, method).updates or most, most)

    def own_updates_of(self, method: str) -> int:
        """Optimiser steps of all solves of a method, without those of another one that it continues."""
        start = self.methods[method].continue_from
        earlier = super().own_updates_of(start) if start else 0  # all that it has, whatever it continues
        return super().own_updates_of(method) - earlier

    @abstractmethod
    def _tail(self, method: str) -> TailSpec | None:
        """The tail problem that a method's objective is, if it is one."""

    def tail_of(self, method: str) -> TailSpec:
        """Tail, mass and KL weight of a method's tail problem.

        Raises:
            ConfigError: if what the method maximises is no tail mean under KL.
        """
        method_of(self, method)
        tail = self._tail(method)
        if tail is None:
            raise ConfigError(f"experiment {self.name}: key methods.{method}: {_NO_TAIL}")
        return tail

    @property
    def main_metric(self) -> str:
        """The metric that the tables lead with."""
        return "functional"


class TailExperiment(PlanarExperiment):
    """An experiment on a tail of a landscape's cost or reward."""

    solutions = ("network", "exact", "resolved")
    tables = ("axis",)

    reward: ZonesConfig
    """The landscape."""

    calibration: CalibrationConfig
    """What its right edge is fitted to."""

    objective: TailObjective
    """The tail that is raised, and what is paid for it."""

    methods: Annotated[Mapping[Name, TailMethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    @model_validator(mode="after")
    def _no_modes(self) -> TailExperiment:
        if self.data.modes is not None:
            raise ValueError("data.modes: belongs to experiments on functionals, not to those on a tail")
        return self

    def _tail(self, method: str) -> TailSpec:
        return TailSpec(self.objective.tail, self.objective.mass, self.objective.tail_alpha)

    def reward_weight_of(self, method: str) -> float:
        return self.objective.alpha

    @property
    def tail_metric(self) -> str:
        """Name of the tail metric, as in the papers' tables: ``worst_1pct_cost``, ``top_1pct_reward``."""
        which = "worst" if self.objective.tail == "lower" else "top"
        percent = f"{100 * self.objective.mass:.6g}"
        return f"{which}_{percent}pct_{self.unit}"

    @property
    def main_metric(self) -> str:
        return self.tail_metric

    @property
    def mass(self) -> float:
        return self.objective.mass

    @property
    def unit(self) -> str:
        return "cost" if self.reward.sign < 0 else "reward"


class FunctionalExperiment(PlanarExperiment):
    """An experiment on any utility and divergence of the registry, with or without a reward."""

    solutions = ("network", "exact", "optimum")
    tables = ("hierarchy", "solvers")
    solved_apart = False
    reads_too: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "finetune": ("cost", "evaluation"),
        "measure": ("data", "cost", "solver", "offline"),
    }

    reward: SlopeConfig | None = None
    """The reward of utilities that take one."""

    cost: BowlConfig | None = None
    """The cost that a log barrier bounds."""

    objective: FunctionalObjective
    """The utility that is raised, and what is paid for it."""

    methods: Annotated[Mapping[Name, FunctionalMethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    evaluation: FunctionalEvaluationConfig
    """How runs are measured."""

    @model_validator(mode="after")
    def _problems_fit(self) -> FunctionalExperiment:
        for name, method in self.methods.items():
            problem = self._problem(name)
            kinds = (problem.utility.kind, problem.divergence.kind)
            if method.kind == "am" and (kinds != ("expected_reward", "kl") or problem.alpha == 0):
                raise ValueError(
                    f"methods.{name}: am raises the expected reward under a KL weight alpha > 0; give it "
                    "objective: {utility: {kind: expected_reward}, divergence: {kind: kl}, alpha: ...}"
                )
            if method.by == "exponents" and problem.divergence.kind != "kl":
                raise ValueError(
                    f"methods.{name}: by exponents fdc pays for a KL divergence, got "
                    f"{problem.divergence.kind}; remove by, and give step_weight"
                )
            if method.kind == "tfft" and self._tail(name) is None:
                raise ValueError(f"methods.{name}: {_NO_TAIL}")
        pretrained = [name for name, method in self.methods.items() if method.kind == "pretrained"]
        if self.evaluation.sliced is not None and pretrained != ["pretrained"]:
            raise ValueError(
                "evaluation.sliced: the experiment's own objective is that of the method 'pretrained'; "
                "add methods.pretrained: {kind: pretrained}"
            )
        if self.evaluation.transport is not None and pretrained != ["pretrained"]:
            raise ValueError(
                "evaluation.transport: distances are from the samples of the method 'pretrained'; "
                "add methods.pretrained: {kind: pretrained}"
            )
        return self

    def _problem(self, method: str) -> FunctionalObjective:
        return changed(self.objective, self.methods[method].objective, f"methods.{method}.objective")

    def _tail(self, method: str) -> TailSpec | None:
        problem = self._problem(method)
        tail, mass = _TAILS.get(problem.utility.kind), problem.utility.parameters.get("mass")
        if tail is None or self.reward is None or problem.divergence.kind != "kl" or problem.alpha == 0:
            return None
        if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 < mass < 1:
            return None
        return TailSpec(tail, mass, problem.alpha)

    def problem_of(self, method: str) -> FunctionalObjective:
        """What a method maximises: the experiment's objective with the method's changes."""
        method_of(self, method)
        return self._problem(method)

    def reward_weight_of(self, method: str) -> float:
        return self._problem(method).alpha


_TAILS: Mapping[str, Tail] = {"cvar": "lower", "sq": "upper"}


_NO_TAIL = (
    "tfft raises a tail mean of a reward under a KL weight alpha > 0; give the experiment a reward, and the "
    "method objective: {utility: {kind: cvar or sq, mass: between 0 and 1}, divergence: {kind: kl}, "
    "alpha: ...}"
)


def tail_experiment(experiment: Experiment) -> TailExperiment:
    """The experiment, if it is one on a tail.

    Raises:
        ConfigError: for any other.
    """
    if not isinstance(experiment, TailExperiment):
        raise ConfigError(
            f"experiment {experiment.name}: this needs a tail; key objective must have tail, mass and alpha"
        )
    return experiment
