"""From a configuration to its plan, or one sentence that names the file, the key and the fix."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowtilt.pipeline.config import WorkflowConfig
from flowtilt.pipeline.configuration import ConfigError, validated
from flowtilt.pipeline.domain import domain_of
from flowtilt.pipeline.experiment import Experiment, load_file
from flowtilt.pipeline.places import names_in
from flowtilt.pipeline.plan import Files, Plan, experiment_file, theory_file
from flowtilt.pipeline.resources import REPORT, TARGETS
from flowtilt.pipeline.rules import measures_resolution
from flowtilt.pipeline.theory.config import TheoryConfig, load_theory

TABLES = ("comparison", "by_seed")
"""Names of tables that no experiment may have; those of the other tables are rules."""


def read_plan(data: Mapping[str, Any], where: str) -> Plan:
    """The plan of a configuration, checked: each file alone, and all against each other. Raises ConfigError,
    naming the file, the key and the fix."""
    config = validated(WorkflowConfig, dict(data), Path(where))
    plan = Plan(config, load_files(config, where), load_theories(config, where))
    for domain in plan.domains:
        domain.check(plan.files)
    check_names(plan, where)
    return plan


def runnable(plan: Plan, where: str) -> tuple[Plan, list[str]]:
    """The plan without experiments whose domain lacks packages in this Python, and a sentence on each domain.
    Raises ConfigError if no experiment is left."""
    said, left = [], list(plan.config.experiments)
    for domain in plan.domains:
        own = [name for name in left if plan.domain_of_file(name) is domain]
        if own and (absent := [package for package in domain.packages if not is_installed(package)]):
            left = [name for name in left if name not in own]
            said.append(
                f"{', '.join(own)}: left out, since this Python, {sys.executable}, lacks "
                f"{', '.join(absent)}. Install the extra {domain.environment!r} of flowtilt, or add "
                "--use-conda; the README says which machines a package has no build for"
            )
    if not said:
        return plan, []
    if not left:
        raise ConfigError(f"{where}: key experiments: none can run here. {' '.join(said)}")
    return read_plan({**plan.config.model_dump(exclude_unset=True), "experiments": left}, where), said


def is_installed(package: str) -> bool:
    """Whether this Python has a package, by its name on PyPI."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def check_folder() -> None:
    """Refuse a folder in which Snakemake could not keep its records, as it must even of a dry run. Raises
    ConfigError, naming the folder and the fix."""
    records = Path(".snakemake")
    if not os.access(records if records.exists() else Path(), os.W_OK):
        raise ConfigError(
            f"{records.absolute()}: cannot be written, and Snakemake keeps its records there even of a dry "
            "run; give yourself the right to, or copy the project to a folder that you can write to"
        )


def check_names(plan: Plan, where: str) -> None:
    """Refuse experiments whose targets or tables the workflow has already under their name."""
    names = plan.config.experiments
    rules = {*REPORT, *TARGETS, *(rule.name for rule in plan.rules), *(f"figures_{name}" for name in names)}
    for name in names:
        rule = name in rules
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
    if any(measures_resolution(domain_of(next(iter(cases.values())))) for cases in files.values()):
        if (study := config.resolution) is None:
            raise ConfigError(
                f"{where}: key resolution: missing; name the study that the network's resolution is measured "
                "by"
            )
        files.setdefault(study, load(study, changes, where, "resolution"))
        if not any(method.kind == "am" for case in files[study].values() for method in case.methods.values()):
            raise ConfigError(
                f"{where}: key resolution: {study} has no method of kind am to measure the network's "
                "resolution by; name a study that has"
            )
    bases = {case.starts_from: name for name, cases in files.items() for case in cases.values()}
    for base, name in bases.items():
        if base not in files:
            files[base] = load(base, changes, experiment_file(name), "starts_from")
        if base not in files[base]:
            raise ConfigError(
                f"{experiment_file(name)}: key starts_from: {base} is a study; name one experiment"
            )
    return files


def load(name: str, changes: Mapping[str, Any], where: str, key: str) -> dict[str, Experiment]:
    """The experiments of one file; ``where`` and ``key`` say what names it."""
    file = Path(experiment_file(name))
    if not file.is_file():
        known = names_in("config/experiments")
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
            known = names_in("config/theory")
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
