"""What the parameters of the registered functionals mean, in sentences for the configuration's reference.

They stand here and not in :mod:`flowtilt.functionals.registry`, which imports torch. A test holds both to
the same names, and the defaults here to those of the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Key(NamedTuple):
    """One parameter.

    Attributes:
        text: a sentence, with units.
        default: of the functional's class, or None if the parameter must be given.
    """

    type: str
    text: str
    default: float | int | str | None = None


class FunctionalKeys(NamedTuple):
    """One functional: what it is, and its parameters by name; those of a nested mapping with a dot."""

    text: str
    keys: Mapping[str, Key] = {}


_MASS = Key("number in (0, 1)", "Share of probability in the tail.")

UTILITY_KEYS: dict[str, FunctionalKeys] = {
    "expected_reward": FunctionalKeys("Mean of the reward."),
    "cvar": FunctionalKeys("Mean of the worst share `mass` of the reward.", {"mass": _MASS}),
    "sq": FunctionalKeys("Mean of the best share `mass` of the reward.", {"mass": _MASS}),
    "mean_variance": FunctionalKeys(
        "Mean of the reward less `risk` times its variance.",
        {"risk": Key("number", "Weight of the variance, in inverse reward units; negative seeks variance.")},
    ),
    "entropy": FunctionalKeys("Differential entropy, in nats."),
    "optimal_design": FunctionalKeys(
        "How much of a feature space the samples span, by their information matrix M.",
        {
            "criterion": Key(
                "`log_det`, `trace` or `eigenvalue`",
                "log det M, minus the trace of its inverse, or minus the inverse's largest eigenvalue.",
            ),
            "features.kind": Key("`polynomial` or `random_fourier`", "The features of a sample."),
            "features.degree": Key("1 or 2", "Largest degree of the monomials; `polynomial`.", 2),
            "features.count": Key("whole number ≥ 1", "Number of the features; `random_fourier`.", 64),
            "features.dimension": Key(
                "whole number ≥ 1", "Coordinates of a sample, 2 in the plane; `random_fourier`.", 2
            ),
            "features.bandwidth": Key(
                "number > 0", "Bandwidth of their kernel, in units of the samples; `random_fourier`.", 1.0
            ),
            "features.seed": Key("whole number", "Seed of the directions and phases; `random_fourier`.", 0),
            "ridge": Key("number ≥ 0", "What is added to the diagonal of the matrix.", 1e-3),
        },
    ),
    "diverse_modes": FunctionalKeys(
        "Mutual information of a sample and its mode, in nats, for models that are conditional on a mode.",
        {"modes": Key("whole number ≥ 2", "Number of the modes.")},
    ),
    "log_barrier": FunctionalKeys(
        "Mean of the reward, and `strength` times the log of what is left of `bound` by the mean cost.",
        {
            "bound": Key("number", "What the mean cost must stay below, in units of the cost."),
            "strength": Key("number > 0", "Weight of the barrier, in units of the reward.", 1.0),
        },
    ),
}

DIVERGENCE_KEYS: dict[str, FunctionalKeys] = {
    "kl": FunctionalKeys("Kullback-Leibler divergence from the pretrained distribution, in nats."),
    "renyi": FunctionalKeys(
        "Rényi divergence from the pretrained distribution, in nats.",
        {
            "order": Key("number > 0, not 1", "Order of the divergence."),
            "samples": Key(
                "whole number ≥ 1", "How many of the distribution's samples its mean is taken over.", 2000
            ),
        },
    ),
    "mmd": FunctionalKeys(
        "Maximum mean discrepancy from the pretrained distribution.",
        {
            "kernel": Key("`gaussian`, `inverse_multiquadric` or `energy`", "The kernel of a distance."),
            "bandwidth": Key("number > 0", "Unit of the distance, in units of the samples.", 1.0),
        },
    ),
    "wasserstein1": FunctionalKeys(
        "Wasserstein-1 distance from the pretrained distribution in a ground metric, by a critic.",
        {
            "weights": Key(
                "list of numbers > 0",
                "Weights w of the coordinates in the metric d(x, y)^2 = sum_i w_i (x_i - y_i)^2.",
            ),
            "critic.updates": Key("whole number ≥ 1", "Optimiser steps of the critic.", 1000),
            "critic.batch": Key("whole number ≥ 1", "Samples of either distribution an update.", 256),
            "critic.width": Key("whole number ≥ 1", "Width of its two hidden layers.", 64),
            "critic.learning_rate": Key("number > 0", "Learning rate of Adam at the start.", 3e-3),
            "critic.penalty": Key(
                "number > 0", "Weight of the squared excess of the gradient's dual norm over 1.", 100.0
            ),
            "critic.seed": Key("whole number", "Seed of the initial weights and the batches.", 0),
        },
    ),
}
