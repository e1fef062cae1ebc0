"""Utilities of the reward's distribution: its mean and the means of its two tails.

First variations are those of FDC (De Santi et al. 2025, table 1), up to constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowtilt.functionals.base import FiniteLaw, FirstVariation, Functional, Law
from flowtilt.metrics.tails import Side, lower_tail_mean, quantile, upper_tail_mean
from flowtilt.model import Context
from flowtilt.rewards import Reward


@dataclass(frozen=True)
class RewardVariation(FirstVariation):
    """The reward itself: first variation of the expected reward."""

    reward: Reward

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return self.reward(x, context)

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return self.reward.gradient(x, context)


@dataclass(frozen=True)
class Hinge(FirstVariation):
    """A reward cut at a threshold and divided by the mass of the tail.

    ``-(threshold - r)_+ / mass`` for the lower side and ``(r - threshold)_+ / mass`` for the
    upper: the first variation of a tail mean when the threshold is the quantile, and TFFT's
    pseudo-reward when it is the dual solution.

    Attributes:
        reward: the reward.
        threshold: where the hinge bends, in units of the reward.
        mass: probability of the tail, in (0, 1].
        side: the tail on which the hinge is not flat.
    """

    reward: Reward
    threshold: float
    mass: float
    side: Side

    def of_rewards(self, rewards: np.ndarray) -> np.ndarray:
        """The hinge as a function of reward values, any shape."""
        excess = np.asarray(rewards, dtype=np.float64) - self.threshold
        cut = np.minimum(excess, 0.0) if self.side == "lower" else np.maximum(excess, 0.0)
        return cut / self.mass

    @property
    def sparse(self) -> bool:
        return True

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        excess = self.reward(x, context) - self.threshold
        return (excess.clamp(max=0.0) if self.side == "lower" else excess.clamp(min=0.0)) / self.mass

    def active(self, x: Tensor, context: Context = None) -> Tensor:
        rewards = self.reward(x, context)
        return rewards < self.threshold if self.side == "lower" else rewards > self.threshold

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        gradient = torch.zeros_like(x)
        active = self.active(x, context)
        if bool(active.any()):
            gradient[active] = self.reward.gradient(x, context)[active] / self.mass
        return gradient


@dataclass(frozen=True)
class ExpectedReward(Functional):
    """``E_p[r]``; linear in the law."""

    tier = "linear"

    reward: Reward

    def value(self, law: Law) -> float:
        return float(self.reward(law.samples, law.context).double().mean())

    def linearise(self, law: Law) -> RewardVariation:
        return RewardVariation(self.reward)

    def finite_value(self, law: FiniteLaw) -> float:
        return float(law.p @ self.finite_variation(law))

    def finite_variation(self, law: FiniteLaw) -> np.ndarray:
        return self.reward(law.points).double().numpy(force=True)


@dataclass(frozen=True)
class _TailMean(Functional):
    """A mean of one tail of the reward.

    Attributes:
        reward: the reward.
        level: the quantile level b in (0, 1) where the tail begins.
    """

    reward: Reward
    level: float

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"a tail level must lie in (0, 1), got {self.level}")

    def _rewards(self, law: Law) -> np.ndarray:
        return self.reward(law.samples, law.context).double().numpy(force=True)

    def _finite_rewards(self, law: FiniteLaw) -> np.ndarray:
        return self.reward(law.points).double().numpy(force=True)


@dataclass(frozen=True)
class CVaR(_TailMean):
    """Mean of the worst share ``level`` of the reward; convex in the law."""

    tier = "convex"

    def value(self, law: Law) -> float:
        return lower_tail_mean(self._rewards(law), self.level)

    def linearise(self, law: Law) -> Hinge:
        threshold = quantile(self._rewards(law), self.level)
        return Hinge(self.reward, threshold, mass=self.level, side="lower")

    def finite_value(self, law: FiniteLaw) -> float:
        return lower_tail_mean(self._finite_rewards(law), self.level, law.p)

    def finite_variation(self, law: FiniteLaw) -> np.ndarray:
        rewards = self._finite_rewards(law)
        return Hinge(self.reward, quantile(rewards, self.level, law.p), self.level, "lower").of_rewards(
            rewards
        )


@dataclass(frozen=True)
class SQ(_TailMean):
    """Superquantile: mean of the best share ``1 - level`` of the reward; concave in the law."""

    tier = "general"

    def value(self, law: Law) -> float:
        return upper_tail_mean(self._rewards(law), 1 - self.level)

    def linearise(self, law: Law) -> Hinge:
        threshold = quantile(self._rewards(law), self.level)
        return Hinge(self.reward, threshold, mass=1 - self.level, side="upper")

    def finite_value(self, law: FiniteLaw) -> float:
        return upper_tail_mean(self._finite_rewards(law), 1 - self.level, law.p)

    def finite_variation(self, law: FiniteLaw) -> np.ndarray:
        rewards = self._finite_rewards(law)
        at = quantile(rewards, self.level, law.p)
        return Hinge(self.reward, at, 1 - self.level, "upper").of_rewards(rewards)
