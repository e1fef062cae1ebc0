"""What the solvers of the entropy-regularised control problem share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from flowtilt.model import FlowModel

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


def annealed_rate(update: int, updates: int, learning_rate: float, warmup: float) -> float:
    """Learning rate of an update: a linear warm-up, then a cosine to zero.

    Args:
        update: number of the update, from 0.
        learning_rate: the largest.
        warmup: share of the updates over which it is reached, at least one update.
    """
    warm = max(1, round(warmup * updates))
    if update < warm:
        return learning_rate * (update + 1) / warm
    progress = (update - warm) / max(1, updates - warm)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
