"""Rows that are solved on the grid: fixed steps and searched ones, and that none of an ascent falls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from flowtilt.domains.planar.build import build_data, build_reward
from flowtilt.domains.planar.distributions import GridProblem, exact_iterates, grid_problem, solved_rows
from flowtilt.domains.planar.experiment import FunctionalExperiment, PlanarExperiment, TailExperiment
from flowtilt.domains.planar.grid import (
    RewardLevels,
    kl_divergence,
    mirror_ascent,
    normalise,
    searched_ascent,
    tail_tilt,
)
from flowtilt.domains.planar.rows import GriddedDensity, falls
from flowtilt.domains.planar.tables import falling_steps
from flowtilt.domains.planar.truth import TailGrid, exact_rows
from flowtilt.metrics.tails import tail_mean
from flowtilt.pipeline.configuration import read_yaml
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.measurements import runs_of
from small import CONFIG, in_plane, tiny

SMOKE = {"grid": {"cells": 36, "density_cells": 32}}
PLANE = [name for name in read_yaml(CONFIG / "config.yaml")["experiments"] if name.endswith("_2d")]
SEARCHED: dict[str, Any] = {"kind": "fdc", "iterations": 6, "by": "exponents"}


def density_of(experiment: PlanarExperiment, points: int = 65) -> GriddedDensity:
    """The data's own density, as if a network had learnt it."""
    axis = np.linspace(-experiment.grid.extent, experiment.grid.extent, points)
    at = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    return GriddedDensity(axis, build_data(experiment).log_density(at))


def tail_grid(name: str, cells: int = 240, **methods: Any) -> TailGrid:
    """A main experiment's problem on a grid, with methods of a test's own."""
    changes = in_plane(grid={"cells": cells}, methods=methods)
    (experiment,) = load_file(CONFIG / "experiments" / f"{name}.yaml", changes).values()
    assert isinstance(experiment, TailExperiment)
    return TailGrid(experiment, density_of(experiment))


def gains(problem: TailGrid, iterates: list[np.ndarray]) -> np.ndarray:
    """G of the pretrained distribution and of iterates, by sorting every cell."""
    own = problem.experiment.objective

    def value(log_q: np.ndarray) -> float:
        tail = tail_mean(problem.rewards, own.mass, own.tail, np.exp(log_q))
        return tail - own.tail_alpha * kl_divergence(log_q, problem.log_p)

    return np.array([value(problem.log_p), *map(value, iterates)])


# --- No committed row falls --------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANE)
def test_exact_steps_of_no_experiment_lower_what_they_raise(name: str) -> None:
    """Of every experiment of the embedded run, each fdc method, at the grids of the smoke run."""
    found = 0
    for experiment in load_file(CONFIG / "experiments" / f"{name}.yaml", in_plane(**SMOKE)).values():
        density = density_of(experiment)  # type: ignore[arg-type]
        climbs = [method for method, config in experiment.methods.items() if config.kind == "fdc"]
        if isinstance(experiment, TailExperiment):
            rows = exact_rows(TailGrid(experiment, density)).metrics
        else:
            assert isinstance(experiment, FunctionalExperiment)
            rows = {}
            for method in climbs:
                problem = grid_problem(experiment, method, density)
                steps = [problem.start, *exact_iterates(experiment, method, problem)]
                values = [problem.objective.finite_value(distribution) for distribution in steps]
                rows[f"{method}_exact"] = {"falls": falls(values)}
        for method in climbs:
            assert rows[f"{method}_exact"]["falls"] == 0, (experiment.name, method)
            found += 1
    assert found > 0


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("name", ["risk_averse_2d", "novelty_2d"])
def test_the_line_search_ascends_and_ends_where_tfft_does(name: str, share: float) -> None:
    """The upper tail is concave; on the lower it ends in a stationary point, which here is the same."""
    problem = tail_grid(name)
    own = problem.experiment.objective
    iterates = searched_ascent(problem.log_p, problem.rewards, own.tail_alpha, own.mass, own.tail, 6, share)
    values = gains(problem, iterates)
    assert (np.diff(values) > -1e-9 * abs(values[0])).all()
    log_q, _ = tail_tilt(problem.log_p, problem.rewards, own.tail_alpha, own.mass, own.tail)
    best = gains(problem, [log_q])[-1]
    assert values[-1] <= best + 1e-9 * abs(best)
    assert best - values[-1] <= 1e-4 * (best - values[0])


def test_a_fixed_step_that_falls_is_counted_and_said() -> None:
    """The novelty landscape at a quarter of the full step, as it was run before steps were searched."""
    fixed = {"kind": "fdc", "iterations": 2, "step": 0.25, "by": None}
    problem = tail_grid("novelty_2d", fdc=fixed, searched={**SEARCHED, "iterations": 2})
    rows = exact_rows(problem).metrics
    assert rows["fdc_exact"]["falls"] == 1
    assert rows["searched_exact"]["falls"] == 0
    own = problem.experiment.objective
    iterates = mirror_ascent(
        problem.log_p, problem.rewards, own.tail_alpha, 4 * own.tail_alpha, own.mass, own.tail, 2
    )
    values = gains(problem, iterates)
    assert rows["fdc_exact"]["objective"] == pytest.approx(values[-1], rel=1e-12)
    assert values[-1] < -1000 < values[0]
    long = pd.DataFrame(
        [
            (problem.experiment.name, row, "falls", 0, rows[row]["falls"])
            for row in ("fdc_exact", "searched_exact")
        ],
        columns=["experiment", "method", "metric", "seed", "value"],
    )
    (said,) = falling_steps(long, runs_of(problem.experiment))
    assert said.startswith("fdc is no ascent: 1 of its exact steps lower its own G, on 1 of 1 seeds")
    assert falls([1.0, 2.0, 2.0 - 1e-12, 3.0]) == 0


# --- Levels ------------------------------------------------------------------------------------


def test_levels_hold_every_cell_within_a_bin_of_its_reward() -> None:
    problem = tail_grid("novelty_2d")
    levels = RewardLevels.of(problem.log_p, problem.rewards, 1000)
    bin_width = np.ptp(problem.rewards) / 1000
    assert len(levels.values) <= 1000
    assert (np.diff(levels.values) > 0).all()
    assert np.abs(levels.values[levels.labels] - problem.rewards.ravel()).max() <= bin_width * (1 + 1e-9)
    distribution = levels.distribution(problem.log_p)
    mean = float(np.exp(problem.log_p).ravel() @ problem.rewards.ravel())
    assert distribution.p @ levels.values == pytest.approx(mean, rel=1e-12)
    assert distribution.p.sum() == pytest.approx(1, abs=1e-12)


def test_steps_on_levels_are_those_on_cells() -> None:
    """With as few levels as there are distinct rewards nothing is merged, and with fewer hardly anything."""
    from flowtilt.functionals.base import FiniteDistribution
    from flowtilt.functionals.utilities import SQ
    from flowtilt.mirror import ascend_exactly

    problem = tail_grid("novelty_2d", cells=120)
    own = problem.experiment.objective
    flat = problem.log_p.ravel()
    whole = FiniteDistribution(problem.grid.flat_points, flat, flat)
    utility = SQ(build_reward(problem.experiment), own.mass)
    steps = ascend_exactly(utility, own.tail_alpha, whole, 3, share=0.3)
    iterates = searched_ascent(problem.log_p, problem.rewards, own.tail_alpha, own.mass, "upper", 3, 0.3)
    by_cell = gains(problem, [step.distribution.log_p.reshape(problem.log_p.shape) for step in steps])
    np.testing.assert_allclose(gains(problem, iterates), by_cell, rtol=2e-4)


def test_a_blurred_ascent_is_blurred_in_its_exponents() -> None:
    problem = tail_grid("novelty_2d", cells=120)
    own = problem.experiment.objective
    arguments = (problem.log_p, problem.rewards, own.tail_alpha, own.mass, own.tail, 1, 0.3)
    (plain,) = searched_ascent(*arguments)
    (blurred,) = searched_ascent(*arguments, blur=lambda exponent: 0.5 * exponent)
    np.testing.assert_allclose(blurred, normalise(problem.log_p + 0.5 * (plain - problem.log_p)), atol=1e-9)


# --- Functionals -------------------------------------------------------------------------------


def test_a_searched_ascent_on_a_functional_reaches_its_optimum() -> None:
    objective = {"utility": {"kind": "sq", "mass": 0.5}, "divergence": {"kind": "kl"}, "alpha": 8.0}
    experiment = tiny(
        "ot_2d",
        grid={"cells": 60},
        objective=objective,
        methods={
            "am": {"kind": "tfft", "objective": objective},
            "fdc_dA": {**SEARCHED, "step_weight": None},
            "fdc_dB": {**SEARCHED, "step_weight": None, "objective": objective},
        },
        evaluation={"transport": None},
    )
    assert isinstance(experiment, FunctionalExperiment)
    problem: GridProblem = grid_problem(experiment, "fdc_dA", density_of(experiment))
    solved = solved_rows(experiment, "fdc_dA", problem)
    exact, best = solved["exact"].metrics, solved["optimum"].metrics
    before = exact["functional_before"]
    assert exact["falls"] == 0
    assert best["functional"] - exact["functional"] <= 1e-3 * (best["functional"] - before)  # type: ignore[operator]
