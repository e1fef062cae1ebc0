"""From a configuration to its plan, or one sentence that names the file, the key and the fix."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.functionals.keys import DIVERGENCE_KEYS, UTILITY_KEYS, FunctionalKeys
from flowtilt.pipeline.config import WorkflowConfig
from flowtilt.pipeline.configuration import ConfigError, validated
from flowtilt.pipeline.experiment import AnyExperiment, FunctionalExperiment, load_file
from flowtilt.pipeline.plan import Files, Plan, experiment_file, theory_file
from flowtilt.pipeline.resources import RULES, TARGETS
from flowtilt.pipeline.sections import TermConfig
from flowtilt.pipeline.theory.config import TheoryConfig, load_theory

TABLES = ("comparison", "by_seed")
"""Names of tables that no experiment may have; those of the other tables are rules."""


def read_plan(data: Mapping[str, Any], where: str) -> Plan:
    """The plan of a configuration, checked: each file alone, and all against each other.

    Args:
        data: the configuration, merged from its files.
        where: those files, for messages.

    Raises:
        ConfigError: naming the file, the key and the fix.
    """
    config = validated(WorkflowConfig, dict(data), Path(where))
    check_names(config, where)
    plan = Plan(config, load_files(config, where), load_theories(config, where))
    for name, cases in plan.files.items():
        for case in cases.values():
            if isinstance(case, MoleculeExperiment):
                check_shared(plan, name, case)
            elif isinstance(case, ImageExperiment):
                check_model(plan, name, case)
            elif isinstance(case, FunctionalExperiment):
                check_terms(name, case)
    return plan


def check_folder() -> None:
    """Refuse a folder in which Snakemake could not keep its records, as it must even of a dry run.

    Raises:
        ConfigError: naming the folder and the fix.
    """
    records = Path(".snakemake")
    if not os.access(records if records.exists() else Path(), os.W_OK):
        raise ConfigError(
            f"{records.absolute()}: cannot be written, and Snakemake keeps its records there even of a dry "
            "run; give yourself the right to, or copy the project to a folder that you can write to"
        )


def check_names(config: WorkflowConfig, where: str) -> None:
    """Refuse experiments whose targets or tables the workflow has already under their name."""
    measured = {f"measure_{name}" for name in config.experiments}
    for name in config.experiments:
        rule = name in {*RULES, *TARGETS, *measured}
        if rule or name in TABLES or name.startswith("theory_"):
            raise ConfigError(
                f"{where}: key experiments: {name}: the workflow has a {'rule' if rule else 'table'} of this "
                f"name; rename the experiment, in its key name and its file {experiment_file(name)}"
            )


def load_files(config: WorkflowConfig, where: str) -> Files:
    """Every file that is needed, by name: those to run, the study of the resolution, and their bases."""
    changes = config.changes
    files = {name: load(name, changes, where, "experiments") for name in config.experiments}
    for key in ("skip", "files"):
        for name in changes.get(key, {}):
            if not Path(experiment_file(name)).is_file():
                raise ConfigError(f"{where}: key overrides.{key}.{name}: there is no {experiment_file(name)}")
    study = config.resolution
    files.setdefault(study, load(study, changes, where, "resolution"))
    if not any(method.kind == "am" for case in files[study].values() for method in case.methods.values()):
        raise ConfigError(
            f"{where}: key resolution: {study} has no method of kind am to measure the network's resolution "
            "by; name a study that has"
        )
    bases = {case.base: name for name, cases in files.items() for case in cases.values()}
    for base, name in bases.items():
        if base not in files:
            files[base] = load(base, changes, experiment_file(name), "base")
        if base not in files[base]:
            raise ConfigError(f"{experiment_file(name)}: key base: {base} is a study; name one experiment")
    return files


def load(name: str, changes: Mapping[str, Any], where: str, key: str) -> dict[str, AnyExperiment]:
    """The experiments of one file; ``where`` and ``key`` say what names it."""
    file = Path(experiment_file(name))
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise ConfigError(
            f"{where}: key {key}: unknown experiment {name!r}, there is no {file} (known: {known})"
        )
    try:
        return load_file(file, changes)
    except ConfigError as error:
        message = str(error)
    load_file(file)  # raises if the fault is the file's own, and not that of what is merged into it
    raise ConfigError(f"{where}: key overrides: merged into {message}")


def load_theories(config: WorkflowConfig, where: str) -> dict[str, TheoryConfig]:
    """The studies of the theory, by name."""
    for name in config.theory_overrides:
        if not (file := Path(theory_file(name))).is_file():
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            raise ConfigError(f"{where}: key theory_overrides.{name}: there is no {file} (known: {known})")
    studies = {}
    for name in config.theory:
        changes = config.theory_overrides.get(name)
        try:
            studies[name] = load_theory(theory_file(name), changes)
        except ConfigError as error:
            key = "theory:" if changes is None else "theory_overrides, merged into"
            raise ConfigError(f"{where}: key {key} {error}") from None
    return studies


# ---------------------------------------------------------------------------- of functionals, in the plane


def check_terms(name: str, case: FunctionalExperiment) -> None:
    """Refuse functionals and parameters that nobody knows; what needs torch to be told is checked as a run
    begins, by :func:`flowtilt.pipeline.starting.check_functionals`."""
    for method, settings in case.methods.items():
        problem = case.problem_of(method)
        terms: Sequence[tuple[str, TermConfig, Mapping[str, FunctionalKeys]]] = (
            ("utility", problem.utility, UTILITY_KEYS),
            ("divergence", problem.divergence, DIVERGENCE_KEYS),
        )
        for key, term, known in terms:
            own = f"methods.{method}.objective" if key in settings.objective else "objective"
            where = f"{experiment_file(name)}: experiment {case.name}: key {own}.{key}"
            if term.kind in known:
                keys = list(dict.fromkeys(part.split(".")[0] for part in known[term.kind].keys))
                if unknown := [part for part in term.parameters if part not in keys]:
                    raise ConfigError(
                        f"{where}: {key} {term.kind}: key {unknown[0]}: unknown; known keys: "
                        f"{', '.join(keys) or 'none'}"
                    )
            elif term.kind != "sum" and term.kind.count(":") != 1:
                raise ConfigError(
                    f"{where}: unknown {key} {term.kind!r}; known: {', '.join(known)}, or module:NAME of "
                    "your own"
                )


# -------------------------------------------------------------------------------------------- on molecules


def check_shared(plan: Plan, name: str, case: MoleculeExperiment) -> None:
    """Refuse a case that would change what it shares with the experiment it derives from."""
    base = plan.files[case.base][case.base]
    if not isinstance(base, MoleculeExperiment):
        raise ConfigError(f"{experiment_file(name)}: key base: {case.base} is no experiment on molecules")
    where = f"{experiment_file(name)}: key"
    for stage in ("pretrain", "offline"):
        for key in base.stage_sections[stage]:
            if key != "solver" and getattr(case, key) != getattr(base, key):
                raise ConfigError(
                    f"{where} {key}: {case.name} has the pretrained model and the offline batch of "
                    f"{case.base}, and so must have the same {key}; make it an experiment of its own"
                )
    check_also(name, case, base)
    if case.solver.steps != base.solver.steps:
        raise ConfigError(
            f"{where} solver.steps: {case.name} has the offline batch of {case.base}, and so must have the "
            "same steps"
        )


def check_also(name: str, case: MoleculeExperiment, base: MoleculeExperiment) -> None:
    """Refuse methods of the base that a case takes as its own if they are solved otherwise, or left out."""
    for method in case.also:
        where = f"{experiment_file(name)}: key study.cases: {case.name}: also: {method}"
        if method not in base.methods:
            raise ConfigError(f"{where} is left out of {base.name} (overrides.skip); leave out the case too")
        solver = base.solver_of(method).model_copy(update={"updates": base.updates_of(method)})
        if solver != case.solver:
            raise ConfigError(
                f"{where} is solved by another solver in {base.name}; give both the same, or run it in the "
                "case under a name of its own"
            )


# --------------------------------------------------------------------------------------------- on pictures


def check_model(plan: Plan, name: str, case: ImageExperiment) -> None:
    """Refuse experiments of one model that would have it trained in two ways."""
    first = plan.experiments[plan.trained_for(case.model.name)]
    if isinstance(first, ImageExperiment) and case.model != first.model:
        raise ConfigError(
            f"{experiment_file(name)}: key model: differs from that of {first.name}, which has the same "
            "name; give it another name, or leave both as their file has them"
        )
