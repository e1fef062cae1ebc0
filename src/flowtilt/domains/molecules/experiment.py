"""An experiment on molecules: minus the GFN1-xTB energy as the reward, and the tail of its best share.

The files have the key ``domain: molecules``. This module imports neither torch nor the numerics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowtilt.domains.molecules.sections import (
    CheckpointConfig,
    FlowSections,
    MoleculeConfig,
    MoleculeEvaluationConfig,
    MoleculeMethodConfig,
    MoleculeModelConfig,
    MoleculeObjective,
    XTBConfig,
)
from flowtilt.pipeline.configuration import ConfigError, Name, ToldApart
from flowtilt.pipeline.domain import domain_of
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.report.panels import Description
from flowtilt.pipeline.sections import OfflineConfig, TailSpec, check_methods

UNIT = "negative_energy"
"""What is raised, as names of metrics have it."""

WIDEST = 0.5
"""Mass from which a tail narrows."""


class MoleculeExperiment(FlowSections, Experiment):
    """One experiment on molecules, or one case of a study of them."""

    tables = ("masses",)

    domain: Literal["molecules"]
    """Says that the experiment is on molecules."""

    model: MoleculeModelConfig
    """The base model."""

    checkpoint: CheckpointConfig
    """The shipped weights."""

    reward: XTBConfig = XTBConfig()
    """How energies are computed, and which are believed."""

    objective: MoleculeObjective
    """The tail that is raised, and what is paid for it."""

    offline: OfflineConfig
    """Sizes of batches."""

    methods: Annotated[Mapping[Name, MoleculeMethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    also: Mapping[str, MoleculeMethodConfig] = {}
    """Methods of the experiment that this case derives from, and that belong to it too: they have its solver,
    and are not run again. Set by the case's ``also``."""

    evaluation: MoleculeEvaluationConfig
    """How runs are measured."""

    @model_validator(mode="after")
    def _solvers_fit(self) -> MoleculeExperiment:
        check_methods(self.methods, self.solutions)
        for name, method in self.methods.items():
            solver = self.solver_of(name)
            if solver.kind != "adjoint_matching" and (
                (method.kind == "fdc" and method.by != "exponents") or method.narrowing is not None
            ):
                raise ValueError(
                    f"methods.{name}.solver.kind: {solver.kind} solves one problem by values; fdc by scores "
                    "has no values of its divergence on molecules, and narrowing a problem for every "
                    "update; use adjoint_matching, or by: exponents for fdc"
                )
            if solver.endpoint_percentile is not None:
                raise ValueError(
                    f"methods.{name}.solver.endpoint_percentile: is of images, whose states have no padding "
                    "and no centre of mass; remove it, and set control_clip"
                )
            if solver.endpoint_gradient != "pathwise" and method.tuned:
                raise ValueError(
                    f"methods.{name}.solver.endpoint_gradient: must be pathwise; likelihood_ratio takes "
                    "values, which may fail"
                )
        return self

    @model_validator(mode="after")
    def _flowmol_fits(self) -> MoleculeExperiment:
        if self.model.kind == "flowmol" and self.checkpoint.retrain:
            raise ValueError(
                "checkpoint.retrain: weights of FlowMol are not trained here; set it to false, and "
                "checkpoint.path to weights that docs/molecules.md says how to convert"
            )
        if self.model.kind == "flowmol" and self.time_power < 2:
            raise ValueError(
                f"time_power: must be at least 2 where model.kind is flowmol, got {self.time_power}; the "
                "paths of its types are not smooth at the data, where the ODE needs small steps"
            )
        return self

    @model_validator(mode="after")
    def _also_fits(self) -> MoleculeExperiment:
        if twice := self.also.keys() & self.methods.keys():
            raise ValueError(f"also: {min(twice)} is a method of the case's own; rename one of them")
        return self

    @property
    def flow(self) -> MoleculeConfig:
        """The configuration of the pretrained flow."""
        return MoleculeConfig(
            name=self.model.name, **{key: getattr(self, key) for key in FlowSections.model_fields}
        )

    def mass_of(self, method: str) -> float:
        """Mass of a method's tail, its best share; of the methods in ``also`` as well."""
        return {**self.also, **self.methods}[method].mass or self.objective.mass

    def tail_of(self, method: str) -> TailSpec:
        """Tail, mass and KL weight of a method's tail problem."""
        return TailSpec("upper", self.mass_of(method), self.alpha_of(method))

    def alpha_of(self, method: str) -> float:
        """KL weight of a method's objective, in hartree a nat."""
        own = self.methods[method].alpha
        return self.objective.alpha if own is None else own

    def masses_of(self, method: str) -> list[float]:
        config = self.methods[method]
        if config.narrowing is None:
            return []
        start, linear = config.narrowing_from or WIDEST, config.narrowing_by == "linear"
        return narrowing(self.mass_of(method), config.narrowing, self.updates_of(method), start, linear)

    def reward_weight_of(self, method: str) -> float:
        return self.alpha_of(method)

    @property
    def unit(self) -> str:
        return UNIT

    @property
    def mass(self) -> float:
        """Share of the distribution that the table is led by."""
        return self.objective.mass

    @property
    def main_metric(self) -> str:
        """Mean over that share: the name of the metric that the tables lead with."""
        return tail_metric(self.objective.mass)


def tail_metric(mass: float) -> str:
    """Name of the mean over the best share of minus the energies: ``top_0.2pct_negative_energy``."""
    return f"top_{100 * mass:.6g}pct_{UNIT}"


def narrowing(
    mass: float, share: float, updates: int, start: float = WIDEST, linear: bool = False
) -> list[float]:
    """The mass of the tail at every update: from ``start`` to ``mass``, and then that.

    Args:
        mass: at the end.
        share: of the updates before it is reached.
        updates: how many there are.
        start: at the first one.
        linear: whether it falls by the same difference in each update, and not by the same factor.
    """
    start = max(start, mass)
    passed = (min(1.0, update / (share * updates)) if share > 0 else 1.0 for update in range(updates))
    if linear:
        return [start + (mass - start) * part for part in passed]
    return [start * (mass / start) ** part for part in passed]


_TAIL = re.compile(r"(valid_)?(worst|top)_([0-9.]+)pct_negative_energy")

WORDS = {
    "mean_negative_energy": Description("mean of minus energy", "hartree", "higher"),
    "valid_mean_negative_energy": Description("mean of the valid", "hartree", "higher"),
    "validity_pct": Description("valid", "%", "higher"),
    "uniqueness_pct": Description("unique", "%", "higher"),
    "uniqueness_of_1000_pct": Description("unique of the first 1,000 valid", "%", "higher"),
    "novelty_pct": Description("novel", "%"),
    "converged_pct": Description("with an energy", "%", "higher"),
    "energy_per_atom": Description("energy an atom", "hartree"),
    "relaxation_energy_mean": Description("relaxation energy, mean", "hartree", "lower"),
    "relaxation_energy_median": Description("relaxation energy, median", "hartree", "lower"),
    "heavy_atoms": Description("heavy atoms", ""),
    "atomic_number": Description("mean atomic number", ""),
    "elements_total_variation": Description("elements, total variation", ""),
    "sizes_total_variation": Description("sizes, total variation", ""),
    "training_energies": Description("energies in training", ""),
    "training_failed_share": Description("failed in training", "share"),
}


def describe(metric: str) -> Description | None:
    """Words and unit of a metric; None for one that is not of this domain alone."""
    if tail := _TAIL.fullmatch(metric):
        valid, which, percent = tail.groups()
        words = f"{which}-{percent} % mean" + (" of the valid" if valid else "")
        return Description(words, "hartree", "higher")
    return WORDS.get(metric)


def check_shared(files: Mapping[str, Mapping[str, Experiment]]) -> None:
    """Refuse cases that would change what they share with the experiment that they derive from. Raises
    ConfigError, naming file, key and fix."""
    for name, cases in files.items():
        for case in cases.values():
            if isinstance(case, MoleculeExperiment):
                base = files[case.starts_from][case.starts_from]
                _check_case(f"config/experiments/{name}.yaml: key", case, base)


def _check_case(where: str, case: MoleculeExperiment, base: Experiment) -> None:
    if not isinstance(base, MoleculeExperiment):
        raise ConfigError(f"{where} starts_from: {case.starts_from} is no experiment on molecules")
    for stage in (stage for stage in domain_of(base).stages if stage.before):
        for key in stage.sections:
            if key != "solver" and getattr(case, key) != getattr(base, key):
                raise ConfigError(
                    f"{where} {key}: {case.name} has the pretrained model and the offline batch of "
                    f"{case.starts_from}, and so must have the same {key}; make it an experiment of its own"
                )
    for method in case.also:
        at = f"{where} study.cases: {case.name}: also: {method}"
        if method not in base.methods:
            raise ConfigError(f"{at} is left out of {base.name} (overrides.skip); leave out the case too")
        if base.solver_of(method).model_copy(update={"updates": base.updates_of(method)}) != case.solver:
            raise ConfigError(
                f"{at} is solved by another solver in {base.name}; give both the same, or run it in the "
                "case under a name of its own"
            )
    if case.solver.steps != base.solver.steps:
        raise ConfigError(
            f"{where} solver.steps: {case.name} has the offline batch of {case.starts_from}, and so must "
            "have the same steps"
        )
