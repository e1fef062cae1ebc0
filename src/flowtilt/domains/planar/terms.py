"""Which functionals an experiment in the plane can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.sections import TermConfig
from flowtilt.functionals.keys import DIVERGENCE_KEYS, UTILITY_KEYS, FunctionalKeys
from flowtilt.pipeline.configuration import ConfigError, unknown_key
from flowtilt.pipeline.experiment import Experiment


def check_terms(name: str, case: FunctionalExperiment) -> None:
    """Refuse functionals and parameters that nobody knows; what needs torch to be told is checked as a run
    begins, by :func:`flowtilt.pipeline.starting.check_experiments`."""
    for method, settings in case.methods.items():
        problem = case.problem_of(method)
        terms: Sequence[tuple[str, TermConfig, Mapping[str, FunctionalKeys]]] = (
            ("utility", problem.utility, UTILITY_KEYS),
            ("divergence", problem.divergence, DIVERGENCE_KEYS),
        )
        for key, term, known in terms:
            own = f"methods.{method}.objective" if key in settings.objective else "objective"
            where = f"config/experiments/{name}.yaml: experiment {case.name}: key {own}.{key}"
            if term.kind in known:
                keys = list(dict.fromkeys(part.split(".")[0] for part in known[term.kind].keys))
                if unknown := [part for part in term.parameters if part not in keys]:
                    said = unknown_key(unknown[0], keys, term.renamed)
                    raise ConfigError(f"{where}: {key} {term.kind}: key {unknown[0]}: {said}")
            elif term.kind != "sum" and term.kind.count(":") != 1:
                raise ConfigError(
                    f"{where}: unknown {key} {term.kind!r}; known: {', '.join(known)}, or module:NAME of "
                    "your own"
                )


def check_experiment(experiment: Experiment) -> None:
    """Refuse functionals that no job of an experiment could use. Raises ConfigError, naming the file, the
    experiment, the key and the fix."""
    if not isinstance(experiment, FunctionalExperiment):
        return
    from flowtilt.domains.planar.problems import check_problems  # which takes torch
    from flowtilt.pipeline.plan import experiment_file

    try:
        check_problems(experiment)
    except ConfigError as error:
        raise ConfigError(f"{experiment_file(experiment.name.split('/')[0])}: {error}") from None
