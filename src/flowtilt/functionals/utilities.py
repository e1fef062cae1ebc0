"""Utilities: what to raise. Of the reward's distribution, of the distribution's spread, of its modes.

First variations are those of FDC (De Santi et al. 2025, table 1), up to constants, but for two whose
sign the paper prints the other way round: the log barrier's and that of diverse modes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flowtilt.functionals.base import (
    Distribution,
    FiniteDistribution,
    FirstVariation,
    Functional,
    MeanOfVariation,
    per_sample,
)
from flowtilt.functionals.smoothing import NO_SMOOTHED_VALUE, smoothed
from flowtilt.metrics.tails import hinge, lower_tail_mean, quantile, upper_tail_mean
from flowtilt.model import Context, FlowModel, evaluating
from flowtilt.ranges import FINITE, MASS, at_least, between, check
from flowtilt.rewards import Reward, RewardError
from flowtilt.sampling import OdeSettings, log_likelihood
from flowtilt.words import Tail, read_tail


class InfeasibleBarrier(ValueError):
    """A log barrier at a distribution whose expected cost is not below the bound."""


def _values_of(rewards: Sequence[Reward], distribution: Distribution) -> np.ndarray:
    """Rewards of the distribution's samples, float64, (rewards, n); without the samples on which any of them
    failed.

    Raises:
        RewardError: if none is left.
    """
    every = [
        reward(distribution.samples, distribution.context).double().numpy(force=True) for reward in rewards
    ]
    kept = np.asarray(~np.isnan(every).any(axis=0))
    if not kept.any():
        names = " or ".join(type(reward).__name__ for reward in rewards)
        raise RewardError(
            f"reward {names} failed on all {len(kept)} samples of a distribution; a functional "
            "needs at least one value: look at the model that draws them"
        )
    return np.array([values[kept] for values in every])


def _values(reward: Reward, distribution: Distribution) -> np.ndarray:
    """Values of one reward, (n,); see :func:`_values_of`."""
    return np.asarray(_values_of([reward], distribution)[0])


def _finite_values(reward: Reward, distribution: FiniteDistribution) -> np.ndarray:
    """Rewards at the points of a finite distribution, float64, (n,).

    Raises:
        RewardError: if one failed: a point has its probability, and cannot be left out as a sample can.
    """
    values = distribution.values_of(reward)
    if count := int(np.isnan(values).sum()):
        raise RewardError(
            f"reward {type(reward).__name__} failed on {count} of the {len(values)} points of a finite "
            "distribution, which needs a value at each; leave these points out of the distribution"
        )
    return np.asarray(values)


class _OfRewards(FirstVariation):
    """A function of some rewards: active everywhere, but for samples on which one of them failed."""

    @abstractmethod
    def of(self, *values: Any) -> Any:
        """The function of the rewards' values, arrays or tensors of one shape."""

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        found: Tensor = self.of(*(reward(x, context) for reward in self._rewards()))
        return found

    def on(self, distribution: FiniteDistribution) -> np.ndarray:
        """By the rewards that the distribution keeps."""
        return np.asarray(self.of(*map(distribution.values_of, self._rewards())))

    def _rewards(self) -> list[Reward]:
        return [value for value in vars(self).values() if isinstance(value, Reward)]

    def failed(self, x: Tensor, context: Context = None) -> Tensor:
        failed = super().failed(x, context)
        for reward in self._rewards():
            failed = failed | reward.failed(x, context)
        return failed

    def active(self, x: Tensor, context: Context = None) -> Tensor:
        return ~self.failed(x, context)

    def active_on(self, distribution: FiniteDistribution) -> np.ndarray:
        return ~np.isnan(self.on(distribution))


@dataclass(frozen=True)
class RewardVariation(_OfRewards):
    """The reward itself: first variation of the expected reward."""

    reward: Reward

    def of(self, *values: Any) -> Any:
        return values[0]

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return self.reward.gradient(x, context)


@dataclass(frozen=True)
class Hinge(_OfRewards):
    """A reward cut at a threshold and divided by the mass of the tail.

    ``-(threshold - r)_+ / mass`` for the lower tail and ``(r - threshold)_+ / mass`` for the
    upper: the first variation of a tail mean when the threshold is the quantile, and TFFT's
    pseudo-reward when it is the dual solution. It is not active on evaluations that failed.

    Attributes:
        threshold: where the hinge bends, in units of the reward.
        mass: probability of the tail, in (0, 1].
        tail: the tail on which the hinge is not flat; ``left`` and ``right`` are taken for ``lower`` and
            ``upper``, all else is refused.
    """

    reward: Reward
    threshold: float
    mass: float
    tail: Tail

    def __post_init__(self) -> None:
        object.__setattr__(self, "tail", read_tail(self.tail))
        check(self, "a hinge's ", threshold=FINITE, mass=MASS)

    def of(self, *values: Any) -> Any:
        return hinge(values[0], self.threshold, self.mass, self.tail)

    def of_rewards(self, rewards: np.ndarray) -> np.ndarray:
        """The hinge as a function of reward values, any shape."""
        return np.asarray(self.of(np.asarray(rewards, dtype=np.float64)))

    @property
    def sparse(self) -> bool:
        return True

    def active(self, x: Tensor, context: Context = None) -> Tensor:
        rewards = self.reward(x, context)
        return rewards < self.threshold if self.tail == "lower" else rewards > self.threshold

    def active_on(self, distribution: FiniteDistribution) -> np.ndarray:
        rewards = distribution.values_of(self.reward)
        return rewards < self.threshold if self.tail == "lower" else rewards > self.threshold

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        gradient = torch.zeros_like(x)
        active = self.active(x, context)
        if bool(active.any()):
            gradient[active] = self.reward.gradient(x, context)[active] / self.mass
        return gradient


class _FunctionalOfRewards(Functional):
    """A functional of the distribution of some rewards, which weights of samples are enough for."""

    by_values = True

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        for reward in self.rewards:
            _finite_values(reward, distribution)  # raises where one failed
        return self.variation_at(distribution).on(distribution)


@dataclass(frozen=True)
class ExpectedReward(_FunctionalOfRewards):
    """``E_p[r]``; linear in the distribution."""

    tier = "linear"

    reward: Reward

    def value(self, distribution: Distribution) -> float:
        return float(_values(self.reward, distribution).mean())

    def linearise(self, distribution: Distribution) -> RewardVariation:
        return RewardVariation(self.reward)

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return float(distribution.p @ self.finite_variation(distribution))

    def variation_at(self, distribution: FiniteDistribution) -> RewardVariation:
        return RewardVariation(self.reward)


@dataclass(frozen=True)
class _TailMean(_FunctionalOfRewards):
    """A mean of one tail of the reward.

    Attributes:
        mass: share of probability in the tail, in (0, 1).
    """

    tail: ClassVar[Tail]

    reward: Reward
    mass: float

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1:
            raise ValueError(f"the mass of a tail must lie in (0, 1), got {self.mass}")

    def _mean(self, values: np.ndarray, p: np.ndarray | None = None) -> float:
        return (lower_tail_mean if self.tail == "lower" else upper_tail_mean)(values, self.mass, p)

    def _hinge(self, values: np.ndarray, p: np.ndarray | None = None) -> Hinge:
        level = self.mass if self.tail == "lower" else 1 - self.mass
        return Hinge(self.reward, quantile(values, level, p), self.mass, self.tail)

    def value(self, distribution: Distribution) -> float:
        return self._mean(_values(self.reward, distribution))

    def linearise(self, distribution: Distribution) -> Hinge:
        return self._hinge(_values(self.reward, distribution))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return self._mean(_finite_values(self.reward, distribution), distribution.p)

    def variation_at(self, distribution: FiniteDistribution) -> Hinge:
        return self._hinge(_finite_values(self.reward, distribution), distribution.p)


@dataclass(frozen=True)
class CVaR(_TailMean):
    """Mean of the worst share ``mass`` of the reward; convex in the distribution.

    The papers write CVaR_b with the quantile level b where the tail ends: b is ``mass``.
    """

    tier = "convex"
    tail = "lower"


@dataclass(frozen=True)
class SQ(_TailMean):
    """Superquantile: mean of the best share ``mass`` of the reward; concave in the distribution.

    The papers write SQ_b with the quantile level b where the tail begins: b is ``1 - mass``.
    """

    tier = "general"
    tail = "upper"


@dataclass(frozen=True)
class CentredRisk(_OfRewards):
    """``r - risk (r^2 - 2 mean r)``: first variation of mean minus ``risk`` times variance."""

    reward: Reward
    risk: float
    mean: float

    def of(self, *values: Any) -> Any:
        (rewards,) = values
        return rewards - self.risk * (rewards - 2 * self.mean) * rewards

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        rewards = self.reward(x, context)
        # NaN times the gradient 0 of a failed evaluation would be NaN.
        centred = torch.where(rewards.isnan(), 0.0, rewards - self.mean)
        return per_sample(1 - 2 * self.risk * centred, x) * self.reward.gradient(x, context)


@dataclass(frozen=True)
class MeanVariance(_FunctionalOfRewards):
    """``E r - risk Var r``; the variance is the samples' own, without Bessel's correction.

    The variance is concave in the distribution, so that this is convex for a positive ``risk``.

    Attributes:
        risk: weight of the variance, in inverse units of the reward; negative seeks variance.
    """

    tier = "general"

    reward: Reward
    risk: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.risk):
            raise ValueError(f"the weight of the variance must be finite, got risk={self.risk}")

    def value(self, distribution: Distribution) -> float:
        rewards = _values(self.reward, distribution)
        return float(rewards.mean() - self.risk * rewards.var())

    def linearise(self, distribution: Distribution) -> CentredRisk:
        return CentredRisk(self.reward, self.risk, float(_values(self.reward, distribution).mean()))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        rewards = _finite_values(self.reward, distribution)
        mean = distribution.p @ rewards
        return float(mean - self.risk * (distribution.p @ (rewards - mean) ** 2))

    def variation_at(self, distribution: FiniteDistribution) -> CentredRisk:
        mean = float(distribution.p @ _finite_values(self.reward, distribution))
        return CentredRisk(self.reward, self.risk, mean)


@dataclass(frozen=True)
class NegativeLogDensity(FirstVariation):
    """``-log p``, with the gradient by the model's score at a ``time`` just before the data.

    With ``pairs`` of noise it is that of the distribution ``p_t`` which the path has at that time, see
    :func:`flowtilt.functionals.smoothing.smoothed`.
    """

    cheap_values = False

    model: FlowModel
    time: float
    ode: OdeSettings
    pairs: int = 0

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        if self.pairs:
            raise NotImplementedError(NO_SMOOTHED_VALUE)
        return -log_likelihood(self.model, x, context, self.ode)

    @torch.no_grad()
    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        t = x.new_tensor(self.time)
        with evaluating(self.model):
            if self.pairs:
                return -smoothed(self.model.score, self.model, x, t, context, self.pairs)
            return -self.model.score(x, t, context)


@dataclass(frozen=True)
class Entropy(MeanOfVariation):
    """``-E log p``, in nats; the value needs likelihoods, the gradient only scores.

    For a model it is the differential entropy, for a finite distribution that of its probabilities.

    Attributes:
        score_time: time at which the score stands for that of the data, in (0, 1).
        pairs: if not zero, it is the entropy of the distribution with the noise that the path has at
            ``score_time``, whose gradient is a mean over so many pairs of noise. What differs by less than
            the noise then counts for little, and scores are asked for where the model was trained. There is
            no value.
    """

    tier = "convex"
    needs = "score"

    score_time: float = 0.99
    ode: OdeSettings = field(default_factory=OdeSettings)
    pairs: int = 0

    def __post_init__(self) -> None:
        check(self, "an entropy's ", score_time=between(0, 1), pairs=at_least(0))

    def linearise(self, distribution: Distribution) -> NegativeLogDensity:
        return NegativeLogDensity(distribution.model, self.score_time, self.ode, self.pairs)

    def finite_value(self, distribution: FiniteDistribution) -> float:
        held = distribution.p > 0
        return -float(distribution.p[held] @ distribution.log_p[held])

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        return -distribution.log_p


@dataclass(frozen=True)
class BarrierVariation(_OfRewards):
    """``r - slope c``: a reward, and a cost that weighs the more the nearer its bound is.

    Attributes:
        slope: ``strength / (bound - E c)``.
    """

    reward: Reward
    cost: Reward
    slope: float

    def of(self, *values: Any) -> Any:
        rewards, costs = values
        return rewards - self.slope * costs

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        gradient = self.reward.gradient(x, context) - self.slope * self.cost.gradient(x, context)
        # Where one of the two failed the other would pull alone.
        return torch.where(per_sample(self.failed(x, context), x) > 0, 0.0, gradient)


def slack(bound: float, expected_cost: float) -> float:
    """``bound - E c``, what a barrier is the logarithm of.

    Raises:
        InfeasibleBarrier: if it is not positive.
    """
    if not expected_cost < bound:
        raise InfeasibleBarrier(
            f"the log barrier is infeasible: the expected cost is {expected_cost:.6g} and must be "
            f"below the bound {bound:.6g}; raise the bound, or start from a distribution of "
            "lower cost"
        )
    return bound - expected_cost


@dataclass(frozen=True)
class LogBarrier(_FunctionalOfRewards):
    """``E r + strength log(bound - E c)``: the expected reward with the expected cost kept below a bound.

    Attributes:
        bound: what the expected cost must stay below, in units of the cost.
        strength: of the barrier, positive, in units of the reward.
    """

    tier = "convex"

    reward: Reward
    cost: Reward
    bound: float
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.bound):
            raise ValueError(f"the bound of a log barrier must be finite, got {self.bound}")
        if not 0 < self.strength < math.inf:
            raise ValueError(
                f"the strength of a log barrier must be positive and finite, got {self.strength}"
            )

    def value(self, distribution: Distribution) -> float:
        reward, cost = (float(values.mean()) for values in _values_of([self.reward, self.cost], distribution))
        return reward + self.strength * math.log(slack(self.bound, cost))

    def linearise(self, distribution: Distribution) -> BarrierVariation:
        cost = float(_values_of([self.reward, self.cost], distribution)[1].mean())
        return BarrierVariation(self.reward, self.cost, self.strength / slack(self.bound, cost))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        left = slack(self.bound, float(distribution.p @ _finite_values(self.cost, distribution)))
        reward = float(distribution.p @ _finite_values(self.reward, distribution))
        return reward + self.strength * math.log(left)

    def variation_at(self, distribution: FiniteDistribution) -> BarrierVariation:
        left = slack(self.bound, float(distribution.p @ _finite_values(self.cost, distribution)))
        return BarrierVariation(self.reward, self.cost, self.strength / left)


@dataclass(frozen=True)
class CostVariation(_OfRewards):
    """``-slope c``: a cost that weighs the more the nearer its bound is."""

    cost: Reward
    slope: float

    def of(self, *values: Any) -> Any:
        return -self.slope * values[0]

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return -self.slope * self.cost.gradient(x, context)


@dataclass(frozen=True)
class Barrier(_FunctionalOfRewards):
    """``log(bound - E c)``: what keeps an expected cost below a bound, to be added to any utility.

    Attributes:
        bound: what the expected cost must stay below, in units of the cost.
    """

    tier = "convex"

    cost: Reward
    bound: float

    def __post_init__(self) -> None:
        check(self, "a barrier's ", bound=FINITE)

    def value(self, distribution: Distribution) -> float:
        return math.log(slack(self.bound, float(_values(self.cost, distribution).mean())))

    def linearise(self, distribution: Distribution) -> CostVariation:
        expected = float(_values(self.cost, distribution).mean())
        return CostVariation(self.cost, 1 / slack(self.bound, expected))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return math.log(slack(self.bound, float(distribution.p @ _finite_values(self.cost, distribution))))

    def variation_at(self, distribution: FiniteDistribution) -> CostVariation:
        expected = float(distribution.p @ _finite_values(self.cost, distribution))
        return CostVariation(self.cost, 1 / slack(self.bound, expected))


@dataclass(frozen=True)
class ModeLogRatio(FirstVariation):
    """``log p_z(x) - log mean_k p_k(x)`` at a sample x of mode z.

    The gradient is the score of the sample's own mode minus the mean of all modes' scores, weighted
    by the probability of each mode given x.

    Attributes:
        model: whose context is the mode, an integer for each sample.
    """

    cheap_values = False

    model: FlowModel
    modes: int
    time: float
    ode: OdeSettings

    def _log_densities(self, x: Tensor) -> Tensor:
        """Of ``x`` under every mode, (modes, batch)."""
        each = (torch.full((len(x),), k, device=x.device) for k in range(self.modes))
        return torch.stack([log_likelihood(self.model, x, context, self.ode) for context in each])

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        own = self.own_modes(context, x)
        logs = self._log_densities(x)
        return logs[own, torch.arange(len(x))] - torch.logsumexp(logs, 0) + math.log(self.modes)

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        own = self.own_modes(context, x)
        posterior = torch.softmax(self._log_densities(x), 0)
        t = x.new_tensor(self.time)
        with torch.no_grad(), evaluating(self.model):
            total = self.model.score(x, t, own)
            for k, share in enumerate(posterior):
                total = total - per_sample(share, x) * self.model.score(x, t, torch.full_like(own, k))
        return total

    def own_modes(self, context: Context, x: Tensor) -> Tensor:
        """The modes of the samples ``x`` (batch, ...), long (batch,).

        Raises:
            ValueError: if the context is anything else than one mode for each sample.
        """
        if (
            not isinstance(context, Tensor)
            or context.is_floating_point()
            or context.shape != (len(x),)
            or not bool(((context >= 0) & (context < self.modes)).all())
        ):
            raise ValueError(
                f"diverse modes need a model whose context is one integer from 0 to {self.modes - 1} "
                f"for each sample, got {_described(context)}"
            )
        return context.long()


def _described(context: Context) -> str:
    if not isinstance(context, Tensor):
        return type(context).__name__
    if context.is_floating_point() or context.ndim != 1 or not len(context):
        return f"a tensor of {context.dtype} of shape {tuple(context.shape)}"
    return f"integers from {int(context.min())} to {int(context.max())} of shape {tuple(context.shape)}"


@dataclass(frozen=True)
class DiverseModes(MeanOfVariation):
    """``E_z KL(p_z || mean_k p_k)`` over modes z: how well a sample tells its mode, in nats.

    It is the mutual information of sample and mode, at most ``log modes``. The modes of a model are
    equally likely. A finite distribution is one of pairs of a point and a mode: it takes the mutual
    information of the pair, whatever its modes' probabilities, which fine-tuning does not change.

    Attributes:
        modes: their number M, at least 2.
        score_time: time at which scores stand for those of the data, in (0, 1).
        ode: how the likelihoods are solved, one for each mode and sample.
    """

    tier = "general"
    needs = "density"

    modes: int
    score_time: float = 0.99
    ode: OdeSettings = field(default_factory=OdeSettings)

    def __post_init__(self) -> None:
        check(self, "diverse modes' ", modes=at_least(2), score_time=between(0, 1))

    def linearise(self, distribution: Distribution) -> ModeLogRatio:
        variation = ModeLogRatio(distribution.model, self.modes, self.score_time, self.ode)
        variation.own_modes(distribution.context, distribution.samples)
        return variation

    def finite_value(self, distribution: FiniteDistribution) -> float:
        held = distribution.p > 0
        return float(distribution.p[held] @ self.finite_variation(distribution)[held])

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        if distribution.modes is None:
            raise ValueError(
                "diverse modes need a finite distribution with a mode for each point: give it modes"
            )
        if distribution.modes.min() != 0 or distribution.modes.max() != self.modes - 1:
            raise ValueError(
                f"diverse modes of {self.modes} modes got a finite distribution with modes from "
                f"{distribution.modes.min()} to {distribution.modes.max()}"
            )
        flat = distribution.points.flatten(1).numpy(force=True)
        point = np.unique(flat, axis=0, return_inverse=True)[1].ravel()
        with np.errstate(divide="ignore", invalid="ignore"):
            of_mode, of_point = (
                np.log(np.bincount(k, distribution.p))[k] for k in (distribution.modes, point)
            )
            return distribution.log_p - of_mode - of_point
