"""Words that stand for one of a few things: no other word is taken for one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from closed_forms import Quadratic
from flowtilt.control.adjoint_matching import AdjointMatchingSettings
from flowtilt.control.endpoints import Ends
from flowtilt.control.weighted_fitting import WeightedFittingSettings
from flowtilt.domains.images.model import LatentFlow
from flowtilt.domains.images.schedule import DiscreteSchedule
from flowtilt.domains.planar.grid import hinge_tilt, mirror_ascent, tail_tilt
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.domains.planar.problems import build_term
from flowtilt.domains.planar.sections import TermConfig
from flowtilt.functionals.curvature import measured_tier
from flowtilt.functionals.design import OptimalDesign, PolynomialFeatures
from flowtilt.functionals.divergences import MMD
from flowtilt.functionals.registry import Ingredients, check_needs
from flowtilt.functionals.utilities import Entropy, Hinge
from flowtilt.interpolants import Linear, convert
from flowtilt.metrics.tails import hinge, lower_tail_mean, tail_mean, upper_tail_mean
from flowtilt.tfft import TailProblem
from flowtilt.theory.reward_distributions import RewardDistribution, TailDual
from flowtilt.thresholds import active_share, dual_objective, threshold
from flowtilt.words import check_word, read_tail

SOURCE = Path(__file__).parents[1] / "src"
REWARDS = np.random.default_rng(0).normal(size=50)
LOG_P = np.full(50, -np.log(50))
DISTRIBUTION = RewardDistribution(np.array([0.4, 0.6]), np.array([-1.0, 1.0]), np.array([0.5, 0.7]))
REWARD = Quadratic(torch.tensor([1.0, 0.5]))
X = torch.tensor([[0.1, 0.4], [2.0, -1.0], [-0.5, 0.2]])

BY_TAIL: dict[str, Callable[[Any], Any]] = {
    "threshold": lambda tail: threshold(REWARDS, 0.5, 0.2, tail),
    "dual_objective": lambda tail: dual_objective(0.1, REWARDS, 0.5, 0.2, tail),
    "active_share": lambda tail: active_share(REWARDS, 0.3, tail),
    "tail_mean": lambda tail: tail_mean(REWARDS, 0.2, tail),
    "TailProblem": lambda tail: TailProblem(tail, 0.2, 0.5).threshold(REWARDS),
    "TailProblem.pseudo_reward": lambda tail: (
        TailProblem(tail, 0.2, 0.5).pseudo_reward(REWARD, -1.0).value(X)
    ),
    "Hinge.of_rewards": lambda tail: Hinge(REWARD, 0.1, 0.2, tail).of_rewards(REWARDS),
    "Hinge.value": lambda tail: Hinge(REWARD, -1.0, 0.2, tail).value(X),
    "Hinge.active": lambda tail: Hinge(REWARD, -1.0, 0.2, tail).active(X),
    "tails.hinge": lambda tail: hinge(REWARDS, 0.1, 0.2, tail),
    "grid.tail_tilt": lambda tail: tail_tilt(LOG_P, REWARDS, 0.5, 0.2, tail)[0],
    "grid.hinge_tilt": lambda tail: hinge_tilt(LOG_P, REWARDS, 0.1, 0.5, 0.2, tail),
    "grid.mirror_ascent": lambda tail: mirror_ascent(LOG_P, REWARDS, 0.5, 1.0, 0.2, tail, 2)[-1],
    "RewardDistribution.active": lambda tail: DISTRIBUTION.active(0.1, 0.5, tail),
    "RewardDistribution.idle": lambda tail: DISTRIBUTION.idle(0.1, tail),
    "TailDual": lambda tail: TailDual(DISTRIBUTION, 0.5, 0.2, tail).optimum,
}


@pytest.mark.parametrize("name", BY_TAIL)
def test_left_is_lower_right_is_upper_and_no_other_word_is_a_tail(name: str) -> None:
    by = BY_TAIL[name]
    np.testing.assert_array_equal(by("left"), by("lower"))
    np.testing.assert_array_equal(by("right"), by("upper"))
    assert not np.array_equal(by("lower"), by("upper"))
    for wrong in ("Left", "low", "both", "", None, 0, ["lower"]):
        with pytest.raises(ValueError, match=r"a tail must be lower \(or left\) or upper \(or right\), got"):
            by(wrong)


def test_tail_means_are_those_of_their_tail() -> None:
    assert tail_mean(REWARDS, 0.2, "left") == lower_tail_mean(REWARDS, 0.2)
    assert tail_mean(REWARDS, 0.2, "right") == upper_tail_mean(REWARDS, 0.2)


def test_a_tail_is_kept_by_one_of_two_words() -> None:
    assert Hinge(REWARD, 0.0, 0.2, "left").tail == "lower"  # type: ignore[arg-type]
    assert TailProblem("right", 0.2, 0.5).tail == "upper"  # type: ignore[arg-type]
    assert TailDual(DISTRIBUTION, 0.5, 0.2, "right").tail == "upper"  # type: ignore[arg-type]


SCHEDULE = DiscreteSchedule((0.9, 0.5, 0.1))


def diffusion(**words: Any) -> LatentFlow:
    return LatentFlow(nn.Identity(), SCHEDULE, (1, 2, 2), **words)


def ends(estimator: Any) -> Ends:
    hinge_of = Hinge(REWARD, 0.0, 0.2, "lower")
    model, active = PlanarFlow(Linear(), (4,), "relu", "velocity"), torch.ones(3, dtype=torch.bool)
    return Ends.of(model, hinge_of, X[None], active, [], None, estimator)


WORDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "AdjointMatchingSettings.adjoint": (
        lambda w: AdjointMatchingSettings(adjoint=w),
        "lean or posterior_mean",
    ),
    "AdjointMatchingSettings.endpoint_gradient": (
        lambda w: AdjointMatchingSettings(endpoint_gradient=w),
        "pathwise or likelihood_ratio",
    ),
    "Ends.of": (ends, "pathwise or likelihood_ratio"),
    "WeightedFittingSettings.sampler": (lambda w: WeightedFittingSettings(sampler=w), "'ode' or 'sde'"),
    "WeightedFittingSettings.penalty": (lambda w: WeightedFittingSettings(penalty=w), "reverse_kl"),
    "LatentFlow.target": (lambda w: diffusion(target=w), "epsilon or v_prediction or sample"),
    "LatentFlow.spacing": (lambda w: diffusion(spacing=w), "leading or trailing"),
    "LatentFlow.precision": (lambda w: diffusion(precision=w), "float32 or bfloat16 or float16"),
    "DiscreteSchedule.grid": (lambda w: SCHEDULE.grid(2, w), "leading or trailing"),
    "PlanarFlow.activation": (lambda w: PlanarFlow(Linear(), (4,), w, "velocity"), "relu or silu"),
    "PlanarFlow.prediction": (lambda w: PlanarFlow(Linear(), (4,), "relu", w), "velocity or score"),
    "convert.source": (
        lambda w: convert(X, X, torch.tensor(0.5), Linear(), w, "velocity"),
        "velocity or score",
    ),
    "convert.target": (
        lambda w: convert(X, X, torch.tensor(0.5), Linear(), "velocity", w),
        "velocity or score",
    ),
    "build_term": (
        lambda w: build_term(w, TermConfig(kind="entropy"), Ingredients()),
        "utility or divergence",
    ),
    "check_needs": (
        lambda w: check_needs(Entropy(), PlanarFlow(Linear(), (4,), "relu", "velocity"), takes=w),
        "gradient or value",
    ),
    "measured_tier": (lambda w: measured_tier("concave", w), "utility or divergence"),
    "OptimalDesign": (lambda w: OptimalDesign(criterion=w, features=PolynomialFeatures()), "log_det"),
    "MMD": (lambda w: MMD(PlanarFlow(Linear(), (4,), "relu", "velocity"), kernel=w), "gaussian"),
}


@pytest.mark.parametrize("name", WORDS)
def test_an_unknown_word_is_refused_with_the_known_ones(name: str) -> None:
    make, known = WORDS[name]
    with pytest.raises(ValueError) as caught:
        make("wrong")
    assert known in str(caught.value)
    assert "wrong" in str(caught.value)


def test_words_are_told_from_what_is_no_text() -> None:
    check_word("a", ("a", "b"), "it")
    for wrong in (None, 1, ["a"], "c"):
        with pytest.raises(ValueError, match="it must be a or b, got"):
            check_word(wrong, ("a", "b"), "it")
    with pytest.raises(ValueError, match="a tail must be"):
        read_tail(["lower"])


PLANE, THEORY = "domains/planar", "pipeline/theory"


def test_tails_are_compared_only_where_they_have_been_checked() -> None:
    """A bare comparison with one tail takes every other word for the other tail."""
    compared = {
        (str(file.relative_to(SOURCE / "flowtilt")), found[1])
        for file in SOURCE.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if (found := re.search(r"(\S+) [!=]= \"(lower|upper|left|right)\"", line))
    }
    assert {
        (file, word) for file, word in compared if not word.startswith(("read_tail(", "(read_tail("))
    } == {
        ("thresholds.py", "tail"),  # tail = read_tail(tail) stands before it
        (f"{THEORY}/thresholds.py", "tail"),  # of the known tails, each in turn
        *((file, "self.tail") for file in ("functionals/utilities.py", "theory/reward_distributions.py")),
        *((f"{THEORY}/thresholds.py", of) for of in ("dual.tail", "self.dual.tail")),
        (f"{PLANE}/experiment.py", "self.objective.tail"),  # checked as they were read
        *((file, "problem.tail") for file in (f"{PLANE}/build.py", "control/annealed_fitting.py")),
    }
