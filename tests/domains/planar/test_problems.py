"""Problems on functionals that no job could use are refused before any job starts."""

from __future__ import annotations

from typing import Any

import pytest

from flowtilt.domains.planar.build import build_model
from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.problems import build_objective, check_problems
from flowtilt.functionals.base import WeightedSum
from flowtilt.functionals.divergences import KL, Wasserstein1
from flowtilt.functionals.utilities import Entropy, ExpectedReward
from flowtilt.pipeline.configuration import ConfigError
from small import tiny


def functional(name: str = "ot_2d", **changes: Any) -> FunctionalExperiment:
    experiment = tiny(name, **changes)
    assert isinstance(experiment, FunctionalExperiment)
    return experiment


def test_methods_override_the_objective() -> None:
    experiment = functional(methods={"am": {"objective": {"alpha": 1.5}}})
    model = build_model(experiment)
    check_problems(experiment)
    horizontal, vertical, am = (build_objective(experiment, m, model) for m in ("fdc_dB", "fdc_dA", "am"))
    assert isinstance(horizontal.divergence, Wasserstein1)
    assert isinstance(vertical.divergence, Wasserstein1)
    assert horizontal.divergence.weights == vertical.divergence.weights[::-1]
    assert isinstance(am.divergence, KL)
    assert (am.alpha, vertical.alpha) == (1.5, experiment.objective.alpha)


def test_entropy_needs_no_reward_and_has_a_weight_for_each_method() -> None:
    experiment = functional("entropy_2d")
    check_problems(experiment)
    model = build_model(experiment)
    objectives = [build_objective(experiment, m, model) for m in experiment.methods]
    assert all(isinstance(o.utility, Entropy) for o in objectives)
    assert [o.alpha for o in objectives] == [0.5, 0.5, 0.25, 0.1, 0.05, 0.0]


def test_a_weighted_sum_from_the_configuration() -> None:
    parts = [{"name": "expected_reward"}, {"name": "entropy", "weight": 4.0}]
    experiment = functional(objective={"utility": {"kind": "sum", "parts": parts}, "alpha": 1.0})
    utility = build_objective(experiment, "fdc_dA", build_model(experiment)).utility
    assert isinstance(utility, WeightedSum)
    assert [(w, type(f)) for w, f in utility.parts] == [(1.0, ExpectedReward), (4.0, Entropy)]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"utility": {"kind": "entropie"}}, ["objective.utility", "unknown utility 'entropie'", "entropy"]),
        ({"utility": {"kind": "cvar"}}, ["objective.utility", "key mass: missing"]),
        ({"utility": {"kind": "cvar", "lvl": 0.3}}, ["key lvl: unknown", "known keys: mass"]),
        ({"utility": {"kind": "sum", "parts": []}}, ["must have the key parts"]),
        ({"utility": {"kind": "log_barrier", "bound": 3.0}}, ["needs a cost"]),
        ({"utility": {"kind": "diverse_modes", "modes": 2}}, ["a mode for each point"]),
        ({"divergence": {"kind": "renyi", "order": 1.0}}, ["objective.divergence", "order", "KL"]),
        ({"divergence": {"kind": "renyi", "order": -0.5}}, ["objective.divergence", "order", "-0.5"]),
        ({"divergence": {"kind": "mmd", "kernel": "laplace"}}, ["laplace", "gaussian"]),
        ({"divergence": {"kind": "wasserstein1", "weights": [1.0, 0.0]}}, ["positive"]),
    ],
)
def test_bad_terms_are_refused(objective: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_problems(functional(objective=objective))
    for word in ["ot_2d", *words]:
        assert word in str(caught.value)


def test_an_infeasible_barrier_is_refused_with_its_cost() -> None:
    """The expected squared radius of N(0, I) is 2, above a bound of 1."""
    change = {
        "cost": {"centre": [0.0, 0.0], "radius": 1.0},
        "objective": {"utility": {"kind": "log_barrier", "bound": 1.0}},
    }
    with pytest.raises(ConfigError, match=r"expected cost is 1\.9\d+ and must be below the bound 1"):
        check_problems(functional(**change))


def test_a_singular_design_is_refused_with_the_ridge() -> None:
    features = {"kind": "random_fourier", "count": 200, "bandwidth": 5.0}
    design = {"kind": "optimal_design", "criterion": "log_det", "features": features, "ridge": 0.0}
    with pytest.raises(ConfigError, match=r"singular .*ridge"):
        check_problems(functional(objective={"utility": design}))


def test_a_method_override_is_named() -> None:
    experiment = functional(
        methods={"fdc_dB": {"objective": {"divergence": {"kind": "mmd", "kernel": "no"}}}}
    )
    with pytest.raises(ConfigError, match=r"methods\.fdc_dB\.objective\.divergence"):
        check_problems(experiment)


def test_a_likelihood_of_a_model_without_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowtilt.domains.planar.model import PlanarFlow

    monkeypatch.setattr(PlanarFlow, "has_likelihood", False)
    with pytest.raises(ConfigError, match="needs the likelihood"):
        check_problems(functional(objective={"divergence": {"kind": "renyi", "order": 2.0}}))


def test_a_reward_without_a_gradient_is_refused_for_adjoint_matching_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flowtilt.domains.planar.landscapes import Slope

    monkeypatch.setattr(Slope, "differentiable", False)
    with pytest.raises(ConfigError, match="needs the gradient of the reward"):
        check_problems(functional())
    check_problems(functional(solver={"kind": "weighted_fitting"}))


def test_diverse_modes_must_be_those_of_the_data() -> None:
    """The shipped model has two; a model without any is refused as a bad term, above."""
    check_problems(functional("modes_2d"))
    for wrong in (3, 4):
        change = {"utility": {"modes": wrong}}
        with pytest.raises(ConfigError, match=rf"objective\.utility.*{wrong} modes.*from 0 to 1"):
            check_problems(functional("modes_2d", objective=change))


def test_by_exponents_a_first_variation_without_values_is_refused() -> None:
    """The entropy's takes a density; a sum with it does too, and a reward's alone does not."""
    searched = {"fdc_alpha_0.5": {"by": "exponents", "step_weight": None}}
    with pytest.raises(ConfigError) as caught:
        check_problems(functional("entropy_2d", methods=searched))
    for words in (
        "objective.utility: the first variation of Entropy is not known",
        "take its steps by scores",
    ):
        assert words in str(caught.value)
    kl = {"divergence": {"kind": "kl"}, "alpha": 1.0}
    methods = {"fdc_dA": {"by": "exponents", "objective": kl}, "fdc_dB": {"objective": kl}}
    check_problems(functional(methods=methods))
    parts = [{"name": "expected_reward"}, {"name": "entropy"}]
    mixed = {**kl, "utility": {"kind": "sum", "parts": parts}}
    with pytest.raises(ConfigError, match=r"methods\.fdc_dA\.objective\.utility: .* Entropy"):
        check_problems(functional(methods={**methods, "fdc_dA": {"by": "exponents", "objective": mixed}}))
