"""What cases on molecules share with the experiment that they derive from."""

from __future__ import annotations

from collections.abc import Mapping

from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import domain_of
from flowtilt.pipeline.experiment import Experiment

Files = Mapping[str, Mapping[str, Experiment]]


def check_shared(files: Files) -> None:
    """Refuse cases that would change what they share with the experiment that they derive from.

    Raises:
        ConfigError: naming file, key and fix.
    """
    for name, cases in files.items():
        for case in cases.values():
            if isinstance(case, MoleculeExperiment):
                _check_case(files, name, case)


def _file(name: str) -> str:
    return f"config/experiments/{name}.yaml"


def _check_case(files: Files, name: str, case: MoleculeExperiment) -> None:
    """Refuse a case that would change what it shares with the experiment it derives from."""
    base = files[case.starts_from][case.starts_from]
    if not isinstance(base, MoleculeExperiment):
        raise ConfigError(f"{_file(name)}: key starts_from: {case.starts_from} is no experiment on molecules")
    where = f"{_file(name)}: key"
    for stage in (stage for stage in domain_of(base).stages if stage.before):
        for key in stage.sections:
            if key != "solver" and getattr(case, key) != getattr(base, key):
                raise ConfigError(
                    f"{where} {key}: {case.name} has the pretrained model and the offline batch of "
                    f"{case.starts_from}, and so must have the same {key}; make it an experiment of its own"
                )
    _check_also(name, case, base)
    if case.solver.steps != base.solver.steps:
        raise ConfigError(
            f"{where} solver.steps: {case.name} has the offline batch of {case.starts_from}, and so must "
            "have the same steps"
        )


def _check_also(name: str, case: MoleculeExperiment, base: MoleculeExperiment) -> None:
    """Refuse methods of the base that a case takes as its own if they are solved otherwise, or left out."""
    for method in case.also:
        where = f"{_file(name)}: key study.cases: {case.name}: also: {method}"
        if method not in base.methods:
            raise ConfigError(f"{where} is left out of {base.name} (overrides.skip); leave out the case too")
        solver = base.solver_of(method).model_copy(update={"updates": base.updates_of(method)})
        if solver != case.solver:
            raise ConfigError(
                f"{where} is solved by another solver in {base.name}; give both the same, or run it in the "
                "case under a name of its own"
            )
