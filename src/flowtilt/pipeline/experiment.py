"""One validated configuration per experiment.

An experiment is one YAML file; a study is a file whose ``study`` block lists cases, each an
experiment derived from another file and complete in itself. Scales (smoke, paper) are overrides
that are merged in last. This module imports neither torch nor the numerics: a workflow reads it.

There are two kinds of experiments in the plane, told apart by their ``objective``: those on a tail of a
reward, and those on any pair of a utility and a divergence (``objective.utility``). Those on molecules
have the key ``domain: molecules``, those on pictures ``domain: images``, and modules of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, overload

from pydantic import Field, field_validator, model_validator

from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.sections import ImageMethodConfig
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.domains.molecules.sections import MoleculeMethodConfig
from flowtilt.pipeline.configuration import (
    CaseName,
    ConfigError,
    Name,
    NoRepeats,
    Section,
    Seeds,
    ToldApart,
    changed,
    check_name,
    merge,
    read_yaml,
    tell_apart,
    validated,
)
from flowtilt.pipeline.sections import (
    BowlConfig,
    CalibrationConfig,
    DataConfig,
    EvaluationConfig,
    FunctionalEvaluationConfig,
    FunctionalMethodConfig,
    FunctionalObjective,
    GridConfig,
    MethodConfig,
    NetworkConfig,
    OfflineConfig,
    PathConfig,
    PretrainConfig,
    SlopeConfig,
    SolverConfig,
    TailMethodConfig,
    TailObjective,
    TailSpec,
    ZonesConfig,
    check_methods,
)
from flowtilt.words import Side
from flowtilt.yaml_files import dump_yaml


class Experiment(Section, ABC):
    """What every experiment in the plane, or one case of a study, has; see the two kinds below."""

    layers: ClassVar[tuple[str, ...]]
    """Rows of each method in the tables: its network's, and those that are solved on the grid."""

    solved_apart: ClassVar[bool] = True
    """Whether rows solved on the grid are made for all methods together, in a folder for each layer."""

    rules: ClassVar[str] = ""
    """What the names of the workflow's rules for its stages begin with."""

    reads_too: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Sections that a stage reads in experiments of this kind only."""

    name: CaseName
    """Name of the experiment: that of its file."""

    title: str
    """Title of its table."""

    base: Name
    """Experiment whose pretrained models this one starts from; by default itself, and for a case of a
    study the experiment that it derives from."""

    seeds: Seeds
    """Seeds of the runs; a number n stands for 0 to n - 1."""

    path: PathConfig
    """The interpolant between noise and data."""

    network: NetworkConfig
    """The velocity network."""

    data: DataConfig
    """The law that the model is pretrained on."""

    pretrain: PretrainConfig
    """How it is pretrained."""

    offline: OfflineConfig
    """Sizes of batches."""

    solver: SolverConfig
    """The control solver of all methods."""

    methods: Annotated[Mapping[Name, MethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    evaluation: EvaluationConfig
    """How runs are measured."""

    grid: GridConfig
    """The grids that laws are solved on."""

    axis_value: float | None = None
    """Where a case stands on its study's axis; set by the case's ``value``."""

    @model_validator(mode="after")
    def _prediction_fits_path(self) -> Experiment:
        if self.path.kind == "linear" and self.network.prediction == "score":
            raise ValueError(
                "network.prediction: a score gives no finite velocity at the noise end of the linear path; "
                "set it to velocity"
            )
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> Experiment:
        check_methods(self.methods, self.layers)
        for name, method in self.methods.items():
            self._solver(name)
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

    def _solver(self, method: str) -> SolverConfig:
        return changed(self.solver, self.methods[method].solver, f"methods.{method}.solver")

    def solver_of(self, method: str) -> SolverConfig:
        """The control solver of a method: the experiment's with the method's changes.

        How many updates each solve has is what :meth:`updates_of` says.
        """
        method_of(self, method)
        return self._solver(method)

    def updates_of(self, method: str) -> int:
        """Optimiser steps in each solve of a method."""
        most = self.solver_of(method).updates
        return min(method_of(self, method).updates or most, most)

    @abstractmethod
    def _tail(self, method: str) -> TailSpec | None:
        """The tail problem that a method's objective is, if it is one."""

    def tail_of(self, method: str) -> TailSpec:
        """Side, mass and KL weight of a method's tail problem.

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

    @property
    def mass(self) -> float:
        """Share of the law that the methods look at."""
        return 1.0

    @property
    def mean_metric(self) -> str:
        return f"mean_{self.unit}"

    @property
    def unit(self) -> str:
        """What the landscape's height is: ``cost`` or ``reward``."""
        return "reward"


class TailExperiment(Experiment):
    """An experiment on a tail of a landscape's cost or reward."""

    layers = ("network", "exact", "resolved")

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


class FunctionalExperiment(Experiment):
    """An experiment on any utility and divergence of the registry, with or without a reward."""

    layers = ("network", "exact", "optimum")
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
            if method.kind == "tfft" and self._tail(name) is None:
                raise ValueError(f"methods.{name}: {_NO_TAIL}")
        pretrained = [name for name, method in self.methods.items() if method.kind == "pretrained"]
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
        side, level = _TAILS.get(problem.utility.kind), problem.utility.parameters.get("level")
        if side is None or self.reward is None or problem.divergence.kind != "kl" or problem.alpha == 0:
            return None
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
            return None
        return TailSpec(side, level if side == "lower" else 1 - level, problem.alpha)

    def problem_of(self, method: str) -> FunctionalObjective:
        """What a method maximises: the experiment's objective with the method's changes."""
        method_of(self, method)
        return self._problem(method)


_TAILS: Mapping[str, Side] = {"cvar": "lower", "sq": "upper"}
_NO_TAIL = (
    "tfft raises a tail mean of a reward under a KL weight alpha > 0; give the experiment a reward, and the "
    "method objective: {utility: {kind: cvar or sq, level: between 0 and 1}, divergence: {kind: kl}, "
    "alpha: ...}"
)


AnyExperiment = Experiment | MoleculeExperiment | ImageExperiment
Kind = TypeVar("Kind", Experiment, MoleculeExperiment, ImageExperiment)


_STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "pretrain": ("base", "path", "network", "data", "pretrain"),
    "density": ("path", "network", "grid", "evaluation"),
    "offline": ("name", "path", "network", "reward", "offline", "solver"),
    "threshold": ("objective",),
    "finetune": ("name", "path", "network", "reward", "objective", "offline", "solver"),
    "sample": ("name", "path", "network", "reward", "evaluation"),
    "evaluate": ("reward", "objective", "grid"),
    "exact": ("reward", "objective", "grid", "methods"),
    "measure": ("name", "path", "network", "reward", "objective", "grid", "evaluation", "methods"),
}


def stage_digest(experiment: AnyExperiment, stage: str, method: str | None = None) -> str:
    """Hash of just the sections that a stage reads, so that a change reruns only what it touches."""
    data = experiment.model_dump()
    if isinstance(experiment, Experiment):
        sections = (*_STAGE_SECTIONS[stage], *experiment.reads_too.get(stage, ()))
    else:
        sections = experiment.stage_sections[stage]
    read: dict[str, Any] = {section: data[section] for section in sections}
    if method is not None:
        read["method"] = data["methods"][method]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]


def dump(experiment: AnyExperiment) -> str:
    """The experiment as YAML that :func:`load_resolved` reads back."""
    data = experiment.model_dump(mode="python" if isinstance(experiment, Experiment) else "json")
    return dump_yaml(data)


class Case(Section):
    """One case of a study: another experiment with some keys changed."""

    label: Name
    """Name of the case: its experiment is called {study}/{label}."""

    of: Name
    """Experiment file that it derives from."""

    value: float | None = None
    """Where it stands on the study's axis; without it a line of reference."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of that experiment that are changed, merged in after the study's ``set``."""

    methods: Annotated[dict[Name, dict[str, Any]], ToldApart] = Field(default_factory=dict)
    """Methods of the case, merged into those of the study."""

    also: Annotated[list[str], NoRepeats] = Field(default_factory=list)
    """Methods of that experiment that belong to the case as they are, and are not run again; for
    molecules."""


class StudyConfig(Section):
    """What a study varies, and its cases."""

    axis: str
    """What varies, with its unit if it has one: the title of the axis."""

    table: Literal["axis", "hierarchy", "solvers", "levels"] = "axis"
    """Table and figure: ``axis``, rows along the axis, for cases on tails; ``hierarchy``, what FDC reaches
    of each functional, or ``solvers``, what each solver reaches at what cost, for cases on functionals;
    ``levels``, what each level of the tail reaches at what cost, for molecules."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Keys that are changed in the experiment of every case."""

    methods: Annotated[dict[Name, dict[str, Any]], ToldApart] = Field(default_factory=dict)
    """Methods of every case."""

    cases: Annotated[list[Case], Field(min_length=1)]
    """The cases, in the order of the table."""

    @field_validator("cases")
    @classmethod
    def _told_apart(cls, cases: list[Case]) -> list[Case]:
        tell_apart([case.label for case in cases])
        return cases


class Study(Section):
    """A file whose cases are experiments."""

    name: Name
    """Name of the study: that of its file."""

    title: str
    """Title of its table; a case's title is this and its label."""

    seeds: Seeds
    """Seeds of all cases; a number n stands for 0 to n - 1."""

    study: StudyConfig
    """What varies."""


class Skip(Section):
    """Cases of a study, by label, and methods that are left out of a file."""

    cases: Annotated[list[str], NoRepeats] = Field(default_factory=list)
    """Labels of the cases that are left out."""

    methods: Annotated[list[str], NoRepeats] = Field(default_factory=list)
    """Names of the methods that are left out."""


def read_study(path: Path) -> Study | None:
    """The study in a file, or None for an ordinary experiment."""
    data = read_yaml(path)
    return validated(Study, data, path) if "study" in data else None


def load_file(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, AnyExperiment]:
    """The experiments of one file by name: one, or one per case of a study.

    Args:
        path: the YAML file; its ``name`` must be the file's.
        overrides: merged into every experiment in the plane last, and what is under the keys ``molecules``
            and ``images`` into every one of that domain; but the key ``files`` holds, by file, what is
            merged into the file as it is read, before the changes of a study's cases; and the key ``skip``
            names, by file, cases and methods that are left out (see :class:`Skip`).

    Raises:
        ConfigError: naming the file, the key and the fix.
    """
    path = Path(path)
    overrides = dict(overrides or {})
    skip = _skip_of(overrides.pop("skip", {}), path)
    of_files = overrides.pop("files", {})
    of_domains = {domain: overrides.pop(domain, {}) for domain in DOMAINS}
    for domain, changes in of_domains.items():
        if not isinstance(changes, Mapping):
            raise ConfigError(f"{path}: key {domain}: must map keys of experiments on {domain} to values")
    if not isinstance(of_files, Mapping) or not all(isinstance(v, Mapping) for v in of_files.values()):
        raise ConfigError(f"{path}: key files: must map names of experiment files to their keys and values")

    @cache  # many cases derive from one file
    def read(file: Path) -> dict[str, Any]:
        return merge(read_yaml(file), of_files.get(file.stem, {}))

    def finish(merged: dict[str, Any], case: str | None = None) -> AnyExperiment:
        """The experiment from its data, with what overrides it and without what is left out."""
        domain = _domain_of(merged, path)
        merged = merge(merged, overrides if domain is None else of_domains[domain])
        kind = _class_of(merged, path)  # an override may have given it another objective
        if kind is ImageExperiment:
            merged = with_model(merged, path)
        _leave_out(merged.get("methods", {}), skip, path)
        if study is not None and study.study.table not in _TABLES[kind]:
            raise ConfigError(
                f"{path}: key study.table: must be axis if the cases are on tails, hierarchy or solvers if "
                f"they are on functionals, and levels if they are on molecules (got {study.study.table!r})"
            )
        return validated(kind, merged, path, case)

    data = read(path)
    if data.get("name") != path.stem:
        raise ConfigError(
            f"{path}: key name: must be the file's own, {path.stem!r}, got {data.get('name')!r}"
        )
    study = validated(Study, data, path) if "study" in data else None
    if study is None:
        return {path.stem: finish({"base": path.stem, **data})}
    if unknown := set(skip.cases) - {case.label for case in study.study.cases}:
        raise ConfigError(f"{path}: key skip.{path.stem}.cases: there is no case {min(unknown)!r}")
    experiments: dict[str, AnyExperiment] = {}
    for case in study.study.cases:
        if case.label in skip.cases:
            continue
        parent = read(path.parent / f"{case.of}.yaml")
        name = f"{study.name}/{case.label}"
        changed = merge(merge(parent, study.study.set), case.set)
        own = {
            "name": name,
            "title": f"{study.title}: {case.label}",
            "base": case.of,
            "seeds": study.seeds,
            "methods": merge(study.study.methods, case.methods),
            "axis_value": case.value,
        }
        if case.also:
            own["also"] = _methods_of(parent, case, path)
        experiments[name] = finish({**changed, **own}, case.label)
    return experiments


def _methods_of(parent: Mapping[str, Any], case: Case, path: Path) -> dict[str, Any]:
    """The methods that a case has of the experiment it derives from."""
    if unknown := [name for name in case.also if name not in parent["methods"]]:
        raise ConfigError(
            f"{path}: key study.cases: case {case.label!r}: also: {case.of} has no method {unknown[0]!r} "
            f"({', '.join(parent['methods'])})"
        )
    return {name: parent["methods"][name] for name in case.also}


def _skip_of(by_file: Any, path: Path) -> Skip:
    if not isinstance(by_file, Mapping):
        raise ConfigError(f"{path}: key skip: must map names of files to cases and methods")
    return validated(Skip, by_file.get(path.stem, {}), path)


def _leave_out(methods: dict[str, Any], skip: Skip, path: Path) -> None:
    for name in skip.methods:
        if name not in methods:
            raise ConfigError(
                f"{path}: key skip.{path.stem}.methods: there is no method {name!r} ({', '.join(methods)})"
            )
        del methods[name]


def load_resolved(path: str | Path) -> AnyExperiment:
    """An experiment from a file that :func:`dump` wrote, or from an ordinary experiment file."""
    path = Path(path)
    if re.fullmatch(r"[0-9a-f]{16}", path.stem) and not path.is_file():
        raise ConfigError(
            f"{path}: no such file: the configuration has changed since the run was started, or this machine "
            "does not see the folder that it was started in; start the run again"
        )
    data = read_yaml(path)
    if "study" in data:
        raise ConfigError(f"{path}: is a study; name one of its cases' resolved files instead")
    kind = _class_of(data, path)
    if kind is ImageExperiment:
        data = with_model(data, path)
    return validated(kind, {"base": path.stem, **data}, path)


def with_model(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The data of an experiment on pictures with its model's file in the place of the model's name.

    Args:
        data: of the experiment; what names no model is left as it is.
        path: of its file, ``config/experiments/{name}.yaml``.

    Raises:
        ConfigError: if there is no such model.
    """
    name = data.get("model")
    if not isinstance(name, str):
        return dict(data)
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"{path}: key model: {error} (got {name!r})") from None
    file = path.parent.parent / "models" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml")))
        raise ConfigError(f"{path}: key model: unknown model {name!r}, there is no {file} (known: {known})")
    return {**data, "model": {"name": name, **read_yaml(file)}}


DOMAINS: Mapping[str, type[MoleculeExperiment] | type[ImageExperiment]] = {
    "molecules": MoleculeExperiment,
    "images": ImageExperiment,
}
"""Kinds of experiments beside those in the plane, by their key ``domain``."""


def _domain_of(data: Mapping[str, Any], path: Path) -> str | None:
    """The domain of an experiment that some data describe, or None for the plane."""
    domain = data.get("domain")
    if "domain" in data and (not isinstance(domain, str) or domain not in DOMAINS):
        raise ConfigError(
            f"{path}: key domain: must be {' or '.join(DOMAINS)}, or left out for an experiment in the plane "
            f"(got {domain!r})"
        )
    return domain


def _class_of(data: Mapping[str, Any], path: Path) -> type[AnyExperiment]:
    """The kind of experiment that some data describe."""
    domain = _domain_of(data, path)
    if domain is not None:
        return DOMAINS[domain]
    objective = data.get("objective")
    functional = isinstance(objective, Mapping) and "utility" in objective
    return FunctionalExperiment if functional else TailExperiment


_TABLES: Mapping[type[AnyExperiment], tuple[str, ...]] = {
    TailExperiment: ("axis",),
    FunctionalExperiment: ("hierarchy", "solvers"),
    MoleculeExperiment: ("levels",),
    ImageExperiment: (),
}
"""Tables that a study can have, by the kind of its cases."""


_OF = {Experiment: "in the plane", MoleculeExperiment: "on molecules", ImageExperiment: "on pictures"}


def of_kind(experiment: AnyExperiment, kind: type[Kind]) -> Kind:
    """The experiment, if it is of a kind.

    Raises:
        ConfigError: if it is of another.
    """
    if not isinstance(experiment, kind):
        own = next(words for other, words in _OF.items() if isinstance(experiment, other))
        raise ConfigError(
            f"experiment {experiment.name}: is {own}; this stage is for those {_OF[kind]} (key domain)"
        )
    return experiment


def planar_experiment(experiment: AnyExperiment) -> Experiment:
    """The experiment, if it is one in the plane; see :func:`of_kind`."""
    return of_kind(experiment, Experiment)  # type: ignore[type-abstract]


def molecule_experiment(experiment: AnyExperiment) -> MoleculeExperiment:
    """The experiment, if it is one on molecules; see :func:`of_kind`."""
    return of_kind(experiment, MoleculeExperiment)


def image_experiment(experiment: AnyExperiment) -> ImageExperiment:
    """The experiment, if it is one on pictures; see :func:`of_kind`."""
    return of_kind(experiment, ImageExperiment)


def tail_experiment(experiment: AnyExperiment) -> TailExperiment:
    """The experiment, if it is one on a tail.

    Raises:
        ConfigError: for one on another functional.
    """
    if not isinstance(experiment, TailExperiment):
        raise ConfigError(
            f"experiment {experiment.name}: this needs a tail; key objective must have tail, level and alpha"
        )
    return experiment


@overload
def method_of(experiment: Experiment, name: str) -> MethodConfig: ...


@overload
def method_of(experiment: MoleculeExperiment, name: str) -> MoleculeMethodConfig: ...


@overload
def method_of(experiment: ImageExperiment, name: str) -> ImageMethodConfig: ...


def method_of(
    experiment: AnyExperiment, name: str
) -> MethodConfig | MoleculeMethodConfig | ImageMethodConfig:
    """A method of the experiment by name.

    Raises:
        ConfigError: if there is none of the name.
    """
    if name not in experiment.methods:
        known = ", ".join(experiment.methods)
        raise ConfigError(f"experiment {experiment.name}: unknown method {name!r}; it has {known}")
    return experiment.methods[name]
