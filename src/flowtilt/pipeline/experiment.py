"""One validated configuration per experiment.

An experiment is one YAML file; a study is a file whose ``study`` block lists cases, each an
experiment derived from another file and complete in itself. Scales (smoke, paper) are overrides
that are merged in last. This module imports neither torch nor the numerics: a workflow reads it.

What an experiment has beyond the keys of :class:`Experiment` is up to its domain, which the key ``domain``
names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from flowtilt.pipeline.configuration import (
    CaseName,
    ConfigError,
    Name,
    NoRepeats,
    Section,
    Seeds,
    ToldApart,
    changed,
    merge,
    read_yaml,
    tell_apart,
    validated,
)
from flowtilt.pipeline.domain import Domain, domain_named, domain_of, sources
from flowtilt.pipeline.places import preferred
from flowtilt.pipeline.sections import (
    MethodConfig,
    OfflineConfig,
    SolverConfig,
    TailSpec,
    check_methods,
    check_tilt,
)
from flowtilt.yaml_files import dump_yaml


class Experiment(Section):
    """What every experiment, or one case of a study, has; a domain adds its own."""

    renamed: ClassVar[Mapping[str, str]] = {"base": "starts_from"}

    solutions: ClassVar[tuple[str, ...]] = ("network",)
    """Rows of each method in the tables: its network's, and those that are solved exactly."""

    solved_apart: ClassVar[bool] = True
    """Whether rows solved exactly are made for all methods together, in a folder for each solution."""

    reads_too: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Sections that a stage reads in experiments of this kind only."""

    tables: ClassVar[tuple[str, ...]] = ()
    """Tables that a study of such experiments can have."""

    counts_passes: ClassVar[bool] = True
    """Whether the table of costs counts network passes, beside seconds."""

    name: CaseName
    """Name of the experiment: that of its file."""

    domain: str
    """What it is on: a domain of flowtilt, or of another package that is installed."""

    title: str
    """Title of its table."""

    starts_from: Name
    """Experiment whose pretrained models this one starts from; by default itself, and for a case of a
    study the experiment that it derives from."""

    seeds: Seeds
    """Seeds of the runs; a number n stands for 0 to n - 1."""

    same_as: Annotated[list[str], NoRepeats] = Field(default_factory=list)
    """Sources of reported values that have the data set, the model and the reward of this experiment: their
    levels are compared. Of all others it is the gain over the pretrained model."""

    offline: OfflineConfig | None = None
    """Sizes of batches."""

    solver: SolverConfig
    """The control solver of all methods."""

    methods: Annotated[Mapping[Name, MethodConfig], Field(min_length=1), ToldApart]
    """The methods by name, each a row of the table."""

    axis_value: float | None = None
    """Where a case stands on its study's axis; set by the case's ``value``."""

    @model_validator(mode="after")
    def _solvers_are_valid(self) -> Experiment:
        check_methods(self.methods, self.solutions)
        for name, method in self.methods.items():
            if method.of is not None:
                check_tilt(f"methods.{name}.of", method.of, self.methods)
            if method.kind == "resampled" and self.offline is None:
                raise ValueError(f"offline: method {name!r} resamples an offline batch; add samples")
            solver = self.solver_of(name)
            by_exponents = method.kind == "fdc" and getattr(method, "by", None) == "exponents"
            if solver.kl is None or not method.tuned:
                continue
            if (method.kind == "fdc" and not by_exponents) or (method.kind != "fdc" and not _anneals(solver)):
                raise ValueError(
                    f"methods.{name}.solver.kl: is a budget of annealed fitting, and of fdc by exponents; "
                    "set kind to annealed_fitting (for fdc by: exponents), or remove it"
                )
            for key in ("step", "step_weight"):
                if by_exponents and getattr(method, key, None) is not None:
                    raise ValueError(
                        f"methods.{name}.{key}: with the budget solver.kl steps follow from it; remove one"
                    )
        return self

    def solver_of(self, method: str) -> SolverConfig:
        """The control solver of a method: the experiment's with the method's changes. How many updates each
        solve has is what :meth:`updates_of` says."""
        return changed(self.solver, method_of(self, method).solver, f"methods.{method}.solver")

    def updates_of(self, method: str) -> int:
        """Optimiser steps in each solve of a method."""
        return method_of(self, method).updates or self.solver_of(method).updates

    def own_updates_of(self, method: str) -> int:
        """Optimiser steps of all solves of a method, without those of another one that it continues."""
        config = method_of(self, method)
        return self.updates_of(method) * (config.iterations or 1) if config.tuned else 0

    def tail_of(self, method: str) -> TailSpec:
        """Tail, mass and KL weight of a method's tail problem. Raises ConfigError if what the method
        maximises is no tail mean under KL."""
        raise ConfigError(f"experiment {self.name}: key methods.{method}: {self.domain} has no tail")

    def masses_of(self, method: str) -> list[float]:
        """The mass of the tail at every update, of a method whose tail narrows; empty for others."""
        return []

    def threshold_of(self, method: str) -> float | None:
        """The threshold that a method of kind tfft is given; None where it is the dual's."""
        return getattr(method_of(self, method), "threshold", None)

    def reward_weight_of(self, method: str) -> float:
        """KL weight of a method of kind am, in units of the reward a nat."""
        raise ConfigError(f"experiment {self.name}: key methods.{method}: {self.domain} has no am")

    def tilted_like(self, method: str) -> str:
        """The method that one of kind resampled or steered takes the tilt of; itself for the reward's."""
        return method_of(self, method).of or method

    def goal_of(self, method: str) -> str:
        """The kind of method whose objective a row is measured by: its own, and of one that trains nothing
        that of its tilt."""
        config = method_of(self, method)
        if not config.keeps:
            return config.kind
        return "tfft" if self.methods[self.tilted_like(method)].kind == "tfft" else "am"

    @property
    def sample_passes(self) -> int:
        """Network passes of a sample that a run is measured by: by the ODE, in ``evaluation.ode_steps``."""
        return 4 * self.evaluation.ode_steps  # type: ignore[attr-defined]

    @property
    def offline_passes(self) -> int:
        """Network passes of the offline batch."""
        return self.offline.samples * self.solver.steps if self.offline is not None else 0

    @property
    def unit(self) -> str:
        """What is raised, as names of metrics have it: ``reward``."""
        return "reward"

    @property
    def mass(self) -> float:
        """Share of the distribution that the table is led by; 1 for all of it."""
        return 1.0

    @property
    def main_metric(self) -> str:
        """Name of the metric that the tables lead with."""
        return self.mean_metric

    @property
    def mean_metric(self) -> str:
        """Name of the plain mean."""
        return f"mean_{self.unit}"


def has_budget(experiment: Experiment) -> bool:
    """Whether a method ends at a divergence that its solver has, so that there is a frontier to show."""
    return any(m.tuned and experiment.solver_of(name).kl for name, m in experiment.methods.items())


def _anneals(solver: SolverConfig) -> bool:
    return solver.kind == "annealed_fitting"


def method_of(experiment: Experiment, name: str) -> MethodConfig:
    """A method of the experiment by name. Raises ConfigError if there is none of the name."""
    if name not in experiment.methods:
        known = ", ".join(experiment.methods)
        raise ConfigError(f"experiment {experiment.name}: unknown method {name!r}; it has {known}")
    return experiment.methods[name]


def stage_digest(experiment: Experiment, stage: str, method: str | None = None) -> str:
    """Hash of just the sections that a stage reads, so that a change reruns only what it touches."""
    data = experiment.model_dump(mode="json")
    of = next(s for s in domain_of(experiment).stages if s.name == stage and s.of(experiment))
    sections = (*of.sections, *experiment.reads_too.get(stage, ()))
    read: dict[str, Any] = {section: data[section] for section in sections}
    if method:
        read["method"] = data["methods"][method]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]


def dump(experiment: Experiment) -> str:
    """The experiment as YAML that :func:`load_resolved` reads back."""
    return dump_yaml(experiment.model_dump(mode="json"))


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
    """Methods of that experiment that belong to the case as they are, and are not run again;
    for tables that compare a case with them."""


class StudyConfig(Section):
    """What a study varies, and its cases."""

    axis: str
    """What varies, with its unit if it has one: the title of the axis."""

    table: str = "axis"
    """Table and figure, of those that the domain of the cases has: ``axis``, rows along the axis; ``masses``,
    what each mass of the tail reaches at what cost; for cases on functionals ``hierarchy``, what FDC reaches
    of each, or ``solvers``, what each solver reaches at what cost."""

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


def load_file(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Experiment]:
    """The experiments of one file by name: one, or one per case of a study.

    Args:
        path: the YAML file; its ``name`` must be the file's.
        overrides: what is under the name of a domain is merged into every experiment of it last; the key
            ``files`` holds, by file, what is merged into the file as it is read, before the changes of a
            study's cases; and the key ``skip`` names, by file, cases and methods that are left out (see
            :class:`Skip`).

    Raises:
        ConfigError: naming the file, the key and the fix.
    """
    path = Path(path)
    overrides = dict(overrides or {})
    skipped = overrides.pop("skip", {})
    if not isinstance(skipped, Mapping):
        raise ConfigError(f"{path}: key skip: must map names of files to cases and methods")
    skip = validated(Skip, skipped.get(path.stem, {}), path)
    of_files = overrides.pop("files", {})
    if not isinstance(of_files, Mapping) or not all(isinstance(v, Mapping) for v in of_files.values()):
        raise ConfigError(f"{path}: key files: must map names of experiment files to their keys and values")
    _check_domains(overrides, path)

    def read(file: Path) -> dict[str, Any]:
        return merge(read_yaml(file), of_files.get(file.stem, {}))

    def finish(merged: dict[str, Any], case: str | None = None) -> Experiment:
        """The experiment from its data, with what overrides it and without what is left out."""
        domain = domain_in(merged, path)
        merged = domain.completed(merge(merged, overrides.get(domain.name, {})), path)
        kind = domain.schema(merged)  # an override may have given it another objective
        _leave_out(merged.get("methods", {}), skip, path)
        if study is not None and study.study.table not in kind.tables:
            raise ConfigError(
                f"{path}: key study.table: its cases can have {' or '.join(kind.tables) or 'no table'}, "
                f"got {study.study.table!r}"
            )
        return validated(kind, merged, path, case)

    data = read(path)
    if data.get("name") != path.stem:
        raise ConfigError(
            f"{path}: key name: must be the file's own, {path.stem!r}, got {data.get('name')!r}"
        )
    study = validated(Study, data, path) if "study" in data else None
    if study is None:
        return {path.stem: finish({"starts_from": path.stem, **data})}
    if unknown := set(skip.cases) - {case.label for case in study.study.cases}:
        raise ConfigError(f"{path}: key skip.{path.stem}.cases: there is no case {min(unknown)!r}")
    experiments: dict[str, Experiment] = {}
    for case in study.study.cases:
        if case.label in skip.cases:
            continue
        name = f"{case.of}.yaml"
        parent = read(preferred(path.parent / name, f"config/experiments/{name}"))
        data = _case_data(study, case, parent, path)
        experiments[data["name"]] = finish(data, case.label)
    return experiments


def _check_domains(overrides: Mapping[str, Any], path: Path) -> None:
    """Refuse what is to be merged into experiments of no domain, or is no mapping."""
    for name, changes in overrides.items():
        if name not in sources():
            raise ConfigError(
                f"{path}: key {name}: what is merged into experiments stands under their domain "
                f"({', '.join(sorted(sources()))}), beside skip and files; move it there"
            )
        if not isinstance(changes, Mapping):
            raise ConfigError(f"{path}: key {name}: must map keys of its experiments to values")


def _case_data(study: Study, case: Case, parent: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The experiment that a case derives from, with what study and case change."""
    data = {
        **merge(merge(parent, study.study.set), case.set),
        "name": f"{study.name}/{case.label}",
        "title": f"{study.title}: {case.label}",
        "starts_from": case.of,
        "seeds": study.seeds,
        "methods": merge(study.study.methods, case.methods),
        "axis_value": case.value,
    }
    return {**data, "also": _methods_of(parent, case, path)} if case.also else data


def _methods_of(parent: Mapping[str, Any], case: Case, path: Path) -> dict[str, Any]:
    """The methods that a case has of the experiment it derives from."""
    if unknown := [name for name in case.also if name not in parent["methods"]]:
        raise ConfigError(
            f"{path}: key study.cases: case {case.label!r}: also: {case.of} has no method {unknown[0]!r} "
            f"({', '.join(parent['methods'])})"
        )
    return {name: parent["methods"][name] for name in case.also}


def _leave_out(methods: dict[str, Any], skip: Skip, path: Path) -> None:
    for name in skip.methods:
        if name not in methods:
            raise ConfigError(
                f"{path}: key skip.{path.stem}.methods: there is no method {name!r} ({', '.join(methods)})"
            )
        del methods[name]


_ADDRESS = re.compile(r"[0-9a-f]{16}")
"""Name of a resolved configuration's file, as :attr:`flowtilt.pipeline.plan.Plan.config_files` has them."""


def load_resolved(path: str | Path) -> Experiment:
    """An experiment from a file that :func:`dump` wrote, or from an ordinary experiment file."""
    path = Path(path)
    if _ADDRESS.fullmatch(path.stem) and not path.is_file():
        raise ConfigError(
            f"{path}: no such file: the configuration has changed since the run was started, or this machine "
            "does not see the folder that it was started in; start the run again"
        )
    data = read_yaml(path)
    if "study" in data:
        raise ConfigError(f"{path}: is a study; name one of its cases' resolved files instead")
    domain = domain_in(data, path)
    data = domain.completed(data, path)
    return validated(domain.schema(data), {"starts_from": path.stem, **data}, path)


def domain_in(data: Mapping[str, Any], path: Path) -> Domain:
    """The domain that an experiment's data name. Raises ConfigError, naming the file, the key and the fix."""
    known = " or ".join(sorted(sources()))
    if "domain" not in data:
        raise ConfigError(f"{path}: key domain: missing; add one: {known}")
    if not isinstance(data["domain"], str):
        raise ConfigError(f"{path}: key domain: must be {known}, got {data['domain']!r}")
    try:
        return domain_named(data["domain"])
    except ConfigError as error:
        raise ConfigError(f"{path}: key domain: {error}") from None
