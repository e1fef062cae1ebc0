"""Tail-aware Flow Fine-Tuning: a threshold from an offline batch, then one fine-tuning (Wang et al. 2026)."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import ArrayLike

from flowtilt.functionals.utilities import Hinge
from flowtilt.ranges import POSITIVE, between, check
from flowtilt.rewards import Reward
from flowtilt.thresholds import threshold
from flowtilt.words import Tail, read_tail


@dataclass(frozen=True)
class TailProblem:
    """A KL-regularised tail mean: what TFFT solves in one fine-tuning.

    Attributes:
        tail: the tail; ``left`` and ``right`` are taken for ``lower`` and ``upper``, all else is refused.
        mass: its probability, in (0, 1).
        alpha: KL weight, in units of the reward a nat.
    """

    tail: Tail
    mass: float
    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "tail", read_tail(self.tail))
        check(self, "a tail problem's ", mass=between(0, 1), alpha=POSITIVE)

    def threshold(
        self, rewards: ArrayLike, weights: ArrayLike | None = None, contexts: ArrayLike | None = None
    ) -> float:
        """The exact dual threshold of an offline batch; see :func:`flowtilt.thresholds.threshold`."""
        return threshold(rewards, self.alpha, self.mass, self.tail, weights, contexts)

    def pseudo_reward(self, reward: Reward, at: float) -> Hinge:
        """The hinge whose expected value, under KL weight ``alpha``, the fine-tuning raises."""
        return Hinge(reward, at, self.mass, self.tail)
