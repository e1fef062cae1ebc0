"""From the configuration of an experiment on a functional to its objective, checked before any job starts."""

from __future__ import annotations

from typing import Literal

from flowtilt.domains.planar.build import build_cost, build_data, build_model, build_slope
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.grid import Grid, finite_distribution
from flowtilt.domains.planar.sections import TermConfig
from flowtilt.fdc import check_values
from flowtilt.functionals.base import Functional, Objective
from flowtilt.functionals.divergences import ReferenceDraw
from flowtilt.functionals.registry import DIVERGENCES, UTILITIES, Ingredients, check_needs
from flowtilt.loading import message_of
from flowtilt.model import FlowModel
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.sampling import OdeSettings
from flowtilt.words import check_word

CHECKED_CELLS = 32
_REGISTRIES = {"utility": UTILITIES, "divergence": DIVERGENCES}


def build_objective(experiment: FunctionalExperiment, method: str, reference: FlowModel) -> Objective:
    """What a method maximises.

    Args:
        reference: the pretrained model. Finite distributions bring their own reference distribution: for them
            an untrained model will do.

    Raises:
        ConfigError: naming the key and the fix.
    """
    problem = experiment.problem_of(method)
    steps = experiment.solver_of(method).steps
    ingredients = Ingredients(
        reward=build_slope(experiment),
        reference=reference,
        cost=build_cost(experiment),
        # Scores are compared at the last time where the solver trains the velocity.
        score_time=1 - 1 / steps,
        ode=OdeSettings(steps=experiment.evaluation.ode_steps),
        draw=ReferenceDraw(samples=experiment.offline.samples, steps=steps),
    )
    built = []
    for key, term in (("utility", problem.utility), ("divergence", problem.divergence)):
        try:
            built.append(build_term(key, term, ingredients))
        except ValueError as error:
            raise ConfigError(
                f"experiment {experiment.name}: key {_key(experiment, method, key)}: {error}"
            ) from None
    return Objective(built[0], built[1], problem.alpha)


def build_term(kind: str, term: TermConfig, ingredients: Ingredients) -> Functional:
    """One functional of the configuration, or a weighted sum of several.

    Args:
        kind: ``utility`` or ``divergence``.
        term: a name in the registry, or ``module:NAME``, with parameters; or the kind ``sum``
            with ``parts``: a list of mappings with a ``name``, a ``weight`` and parameters.

    Raises:
        ValueError: naming the key and what is known.
    """
    check_word(kind, _REGISTRIES, "the kind of a term")
    registry = _REGISTRIES[kind]
    if term.kind != "sum":
        return registry.build(term.kind, term.parameters, ingredients)
    parts, others = term.parameters.get("parts"), term.parameters.keys() - {"parts"}
    if not isinstance(parts, list) or not parts or others:
        raise ValueError(f"{kind} sum: must have the key parts, a list of mappings with a name, and no other")
    return registry.build_sum(parts, ingredients)


def _key(experiment: FunctionalExperiment, method: str, key: str) -> str:
    own = key in experiment.methods[method].objective
    return f"methods.{method}.objective.{key}" if own else f"objective.{key}"


def check_problems(experiment: FunctionalExperiment) -> None:
    """Refuse what no job could use: unknown functionals and parameters, unmet needs, infeasible problems.

    A problem is feasible if its utility has a value and a first variation at the distribution of the *data*,
    on a coarse grid: the pretrained model is not there yet.

    Raises:
        ConfigError: naming the experiment, the key and the fix.
    """
    model = build_model(experiment)
    grid = Grid(experiment.grid.extent, CHECKED_CELLS)
    distribution = finite_distribution(grid, build_data(experiment).log_density(grid.points))
    for method, config in experiment.methods.items():
        solver = experiment.solver_of(method)
        takes: Literal["gradient", "value"] = "gradient" if solver.kind == "adjoint_matching" else "value"
        objective = build_objective(experiment, method, model)
        try:
            if config.kind != "pretrained":
                check_needs(objective, model, takes=takes)
            objective.utility.finite_value(distribution)
            objective.utility.finite_variation(distribution)
            if config.by == "exponents":
                check_values(objective.utility)
        except Exception as error:
            key, what = _key(experiment, method, "utility"), message_of(error, ValueError)
            raise ConfigError(f"experiment {experiment.name}: key {key}: {what}") from None
