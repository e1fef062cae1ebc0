"""What the solvers of the entropy-regularised control problem share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from flowtilt.model import FlowModel
from flowtilt.ranges import NOT_NEGATIVE, below, check_value
from flowtilt.words import check_word

Progress = Callable[[dict[str, float]], None]
"""Called with each update's row of the history."""


class TrainingDiverged(ArithmeticError):
    """A training made things worse: its loss is not finite, or what it measures is beyond its bound."""


MOST_NATS = 100.0
"""Path-space KL divergence from its base, in nats, at which a solve is given up.

A distribution that far away has nothing in common with its base that could be sampled: a density ratio of
e^100. The solves of the shipped experiments spend less than 15.
"""

WINDOW = 5
"""Updates over which what they spend is averaged: a single batch may hold one far trajectory."""


class NoValues(ArithmeticError):
    """A tilt has no value on any sample that a solver has drawn."""


FORWARD, PULLBACK, TRAINING = 1, 2, 3
"""Network passes of one state: forward; forward, and backward to the input; forward, and backward to the
parameters, which goes through every layer twice."""


@dataclass
class Solution:
    """A fine-tuned model and what happened on the way.

    Attributes:
        diagnostics: what the solver found out about the problem as a whole; empty for a solver
            that has nothing to say beside its history.
    """

    model: FlowModel
    history: list[dict[str, float]] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)


Annealing = Literal["cosine", "none"]


def annealed_rate(
    update: int, updates: int, learning_rate: float, warmup: float, annealing: Annealing = "cosine"
) -> float:
    """Learning rate of an update: a linear warm-up, then a cosine to zero, or the largest rate to the end.

    Args:
        update: number of the update, from 0.
        learning_rate: the largest.
        warmup: share of the updates over which it is reached, at least one update.
        annealing: what comes then.
    """
    warm = max(1, round(warmup * updates))
    if update < warm:
        return learning_rate * (update + 1) / warm
    if annealing == "none":
        return learning_rate
    progress = (update - warm) / max(1, updates - warm)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Optimised(Protocol):
    """Settings of an optimiser, which those of all solvers have."""

    @property
    def updates(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def annealing(self) -> Annealing: ...
    @property
    def moments(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...


def check_optimiser(settings: Optimised) -> None:
    """Hold the settings of Adam to their ranges. Raises ValueError, naming the key."""
    check_word(settings.annealing, Annealing, "annealing")
    check_value("weight_decay", settings.weight_decay, NOT_NEGATIVE)
    if len(settings.moments) != 2:
        raise ValueError(f"moments must be two numbers, got {settings.moments!r}")
    for moment in settings.moments:
        check_value("moments", moment, below(1))


def rate_of(update: int, settings: Optimised) -> float:
    """Learning rate of an update by some settings."""
    return annealed_rate(
        update, settings.updates, settings.learning_rate, settings.warmup, settings.annealing
    )
