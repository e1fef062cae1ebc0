"""The solver that a configuration names."""

import pytest
from pydantic import ValidationError

from closed_forms import PATHS, Mixture, MixtureFlow, Quadratic, generator, relative_error
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.pipeline.sections import SolverConfig
from flowtilt.pipeline.solvers import build_solver

LAW = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
REWARD = Quadratic([1.0, 0.5])


def config(**changes):
    base = {"updates": 100, "batch": 256, "pool": 256, "steps": 8, "learning_rate": 0.05, "warmup": 0.05}
    rest = {"ramp": 0.0, "gradient_clip": 10.0, "last_share": 0.25, "rest_share": 0.25, "bank": 5000}
    return SolverConfig(**(base | rest | {"bank_steps": 8} | changes))


def test_annealed_fitting_goes_in_stages_by_its_keys():
    flow, weight = MixtureFlow(PATHS["linear"], LAW, trainable=True), 0.5
    solver = build_solver(config(kind="annealed_fitting", share=0.2, stages=6), 100)
    solution = solver(flow, RewardVariation(REWARD), weight, generator(0))
    exact = LAW.tilted(REWARD, weight).means
    assert relative_error(solution.model.means, exact) < 0.05
    stages = {row["stage"] for row in solution.history}
    assert 2 <= len(stages) <= 6
    assert {row["effective_share"] >= 0.199 for row in solution.history} == {True}
    short = build_solver(config(kind="annealed_fitting", stages=1), 5)
    assert {r["stage"] for r in short(flow, RewardVariation(REWARD), weight, generator(0)).history} == {1}


def test_annealed_fitting_has_the_penalty_kl():
    with pytest.raises(
        ValidationError, match="penalty must be kl where kind is annealed_fitting, got pearson"
    ):
        config(kind="annealed_fitting", penalty="pearson")
