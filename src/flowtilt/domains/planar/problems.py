"""From the configuration of an experiment on a functional to its objective, checked before any job starts."""

from __future__ import annotations

from typing import Literal

from flowtilt.domains.planar.build import build_cost, build_data, build_model, build_slope
from flowtilt.domains.planar.grid import Grid, normalise
from flowtilt.experiment import ConfigError, FunctionalExperiment
from flowtilt.functionals.base import FiniteLaw, Objective
from flowtilt.functionals.divergences import ReferenceDraw
from flowtilt.functionals.registry import DIVERGENCES, UTILITIES, Ingredients, check_needs
from flowtilt.model import FlowModel
from flowtilt.sampling import OdeSettings

CHECKED_CELLS = 32


def build_objective(experiment: FunctionalExperiment, method: str, reference: FlowModel) -> Objective:
    """What a method maximises.

    Args:
        experiment: with the problem.
        method: name of one of its methods.
        reference: the pretrained model. Finite laws bring their own reference law: for them an
            untrained model will do.

    Raises:
        ConfigError: naming the key and the fix.
    """
    problem = experiment.problem_of(method)
    steps = experiment.solver.steps
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
    for key, registry, term in (
        ("utility", UTILITIES, problem.utility),
        ("divergence", DIVERGENCES, problem.divergence),
    ):
        try:
            built.append(registry.build(term.kind, term.parameters, ingredients))
        except ValueError as error:
            raise ConfigError(
                f"experiment {experiment.name}: key {_key(experiment, method, key)}: {error}"
            ) from None
    return Objective(built[0], built[1], problem.alpha)


def _key(experiment: FunctionalExperiment, method: str, key: str) -> str:
    own = key in experiment.methods[method].objective
    return f"methods.{method}.objective.{key}" if own else f"objective.{key}"


def check_problems(experiment: FunctionalExperiment) -> None:
    """Refuse what no job could use: unknown functionals and parameters, unmet needs, infeasible problems.

    A problem is feasible if its utility has a value and a first variation at the law of the *data*,
    on a coarse grid: the pretrained model is not there yet.

    Raises:
        ConfigError: naming the experiment, the key and the fix.
    """
    model = build_model(experiment)
    grid = Grid(experiment.grid.extent, CHECKED_CELLS)
    log_p = normalise(build_data(experiment).log_density(grid.points)).ravel()
    law = FiniteLaw(grid.flat_points, log_p, log_p)
    takes: Literal["gradient", "value"] = (
        "value" if experiment.solver.kind == "weighted_fitting" else "gradient"
    )
    for method in experiment.methods:
        objective = build_objective(experiment, method, model)
        try:
            check_needs(objective, model, takes=takes)
            objective.utility.finite_value(law)
            objective.utility.finite_variation(law)
        except ValueError as error:
            key = _key(experiment, method, "utility")
            raise ConfigError(f"experiment {experiment.name}: key {key}: {error}") from None
