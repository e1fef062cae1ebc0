import math
from dataclasses import replace

import pytest
import torch

from closed_forms import PATHS, Mixture, MixtureFlow, Quadratic, generator
from flowtilt.control import adjoint_matching, weighted_fitting
from flowtilt.control.adjoint_matching import AdjointMatchingSettings
from flowtilt.control.weighted_fitting import WeightedFittingSettings
from flowtilt.fdc import MirrorAscent
from flowtilt.functionals.critic import CriticSettings
from flowtilt.functionals.divergences import KL, ReferenceDraw, Renyi
from flowtilt.functionals.utilities import CVaR, DiverseModes, Entropy, Hinge, RewardVariation
from flowtilt.pretraining import PretrainingSettings, Watch
from flowtilt.sampling import OdeSettings, sample_ode, sample_sde
from flowtilt.tfft import TailProblem
from flowtilt.thresholds import descend_threshold

NAN, INF = math.nan, math.inf
REWARD = Quadratic([1.0, 0.0])
FLOW = MixtureFlow(PATHS["linear"], Mixture.gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))

COUNTS = (0, -1, 1.5, True, NAN, INF)
POSITIVE = (0, -1.0, NAN, INF, "1")
SHARES = (-1, 2, NAN, INF)
OPEN = (0, 1, -0.1, NAN)

SETTINGS = {
    AdjointMatchingSettings(): {
        "updates": COUNTS,
        "batch": (*COUNTS, 1),
        "pool": COUNTS,
        "steps": (*COUNTS, 1),
        "learning_rate": POSITIVE,
        "warmup": SHARES,
        "ramp": SHARES,
        "gradient_clip": POSITIVE,
        "control_clip": POSITIVE,
        "last_share": SHARES,
        "rest_share": SHARES,
        "passes": COUNTS,
        "micro_batch": COUNTS,
    },
    WeightedFittingSettings(): {
        "bank": COUNTS,
        "steps": COUNTS,
        "minimum_ess": (-1, NAN, INF),
        "warning_ess": (-1, NAN, INF),
        "updates": COUNTS,
        "batch": COUNTS,
        "learning_rate": POSITIVE,
        "warmup": SHARES,
        "gradient_clip": POSITIVE,
        "margin": (0, 0.5, -0.1, NAN),
    },
    MirrorAscent(1.0, 10, 2): {
        "step_weight": POSITIVE,
        "distribution_samples": COUNTS,
        "distribution_steps": COUNTS,
    },
    TailProblem("lower", 0.5, 1.0): {"mass": OPEN, "alpha": POSITIVE},
    Hinge(REWARD, 0.0, 0.5, "upper"): {"threshold": (NAN, INF), "mass": (0, 1.1, NAN)},
    CVaR(REWARD, 0.5): {"mass": OPEN},
    OdeSettings(): {"steps": COUNTS, "margin": (-0.1, 0.5, NAN)},
    ReferenceDraw(): {"samples": COUNTS, "steps": COUNTS},
    CriticSettings(): {
        "updates": COUNTS,
        "batch": COUNTS,
        "width": COUNTS,
        "learning_rate": POSITIVE,
        "penalty": POSITIVE,
    },
    Entropy(): {"score_time": OPEN, "pairs": (-1, 1.5)},
    KL(FLOW): {"score_time": OPEN, "pairs": (-1, 1.5)},
    Renyi(FLOW, 2.0): {"score_time": OPEN, "samples": COUNTS, "order": (0, 1, -1, NAN, INF)},
    DiverseModes(2): {"modes": (1, 2.5), "score_time": OPEN},
    PretrainingSettings(): {
        "updates": COUNTS,
        "batch": COUNTS,
        "learning_rate": POSITIVE,
        "margin": (-0.1, 0.5, NAN),
        "times": ((NAN, 1.0), (0.0, 0.0), (0.0, INF)),
        "warmup": SHARES,
        "average": (-0.1, 1, NAN),
        "gradient_clip": POSITIVE,
    },
    Watch(1, print): {"every": COUNTS},
}


@pytest.mark.parametrize(
    ("settings", "key", "bad"),
    [
        pytest.param(settings, key, bad, id=f"{type(settings).__name__}-{key}-{bad}")
        for settings, keys in SETTINGS.items()
        for key, values in keys.items()
        for bad in values
    ],
)
def test_a_setting_out_of_its_range_is_refused_with_its_key_and_what_came(settings, key, bad):
    with pytest.raises(ValueError, match=f"{key}.* must .*got .*") as caught:
        replace(settings, **{key: bad})
    assert str(bad).strip("()") in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (AdjointMatchingSettings(), {"last_share": 0, "rest_share": 1, "ramp": 0, "warmup": 1.0}),
        (AdjointMatchingSettings(), {"steps": 2, "control_clip": None, "micro_batch": None, "batch": 2}),
        (WeightedFittingSettings(), {"bank": 1, "minimum_ess": 0, "steps": 1}),
        (Hinge(REWARD, 0.0, 0.5, "upper"), {"mass": 1}),
        (OdeSettings(), {"steps": 1, "margin": 0}),
    ],
)
def test_the_ends_of_closed_ranges_are_allowed(settings, changes):
    assert replace(settings, **changes) == replace(settings, **changes)


@pytest.mark.parametrize("solver", [adjoint_matching, weighted_fitting])
@pytest.mark.parametrize("weight", [0.0, -1.0, NAN, INF])
def test_kl_weights_are_positive_and_finite(solver, weight):
    kind = AdjointMatchingSettings if solver is adjoint_matching else WeightedFittingSettings
    with pytest.raises(ValueError, match=f"KL weight of a solve must be positive and finite, got {weight}"):
        solver.solve(FLOW, RewardVariation(REWARD), weight, kind(), generator(0))


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_samplers_need_a_whole_number_of_samples(count):
    for draw in (
        lambda: sample_sde(FLOW, count, 2, generator(0)),
        lambda: sample_ode(FLOW, count, generator(0)),
    ):
        with pytest.raises(ValueError, match="count must be a whole number of at least 1"):
            draw()


def test_the_shortest_grid_trains_without_nan():
    flow = MixtureFlow(PATHS["linear"], FLOW.distribution, trainable=True)
    choice = AdjointMatchingSettings(updates=2, batch=8, pool=8, steps=2)
    solution = adjoint_matching.solve(flow, RewardVariation(REWARD), 1.0, choice, generator(0))
    assert all(bool(torch.isfinite(p).all()) for p in solution.model.parameters())


def test_a_descent_is_checked():
    with pytest.raises(ValueError, match="updates of a descent must be"):
        descend_threshold([0.0, 1.0], 1.0, 0.5, updates=-1)
    with pytest.raises(ValueError, match="tolerance of a descent must be"):
        descend_threshold([0.0, 1.0], 1.0, 0.5, tolerance=NAN)
