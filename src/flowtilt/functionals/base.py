"""What a functional of a distribution is to the solvers: a value and a first variation.

A distribution comes in two forms. A :class:`Distribution` is a model with samples from it: values are
estimates, and first variations are functions of the endpoint with a gradient. A :class:`FiniteDistribution`
is a vector of probabilities on given points: values and first variations are exact. The second is where every
functional is checked against numerical derivatives, and where optima are known.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flowtilt.model import Context, FlowModel
from flowtilt.rewards import Reward, input_gradient

Tier = Literal["linear", "convex", "general"]
"""FDC's hierarchy (De Santi et al. 2025, table 1): linear, convex and general problems."""

Need = Literal["nothing", "score", "density", "critic"]
"""What the gradient of a first variation takes beside the samples and their rewards, by rising cost."""


@dataclass(frozen=True)
class Distribution:
    """A distribution given by a model and samples from it.

    Attributes:
        samples: draws from it, (batch, ...).
    """

    model: FlowModel
    samples: Tensor
    context: Context = None


@dataclass(frozen=True)
class FiniteDistribution:
    """Probabilities on points of the space.

    Attributes:
        points: float64, (n, ...).
        log_p: log probabilities, (n,); minus infinity where there is no mass.
        log_reference: those of the pretrained distribution on the same points, (n,).
        modes: the mode that each point belongs to, integers from 0, (n,); for distributions of a sample and
            a mode together, where the same point may occur once in every mode.
        evaluated: rewards at the points, see :meth:`values_of`; shared with other distributions on them.
    """

    points: Tensor
    log_p: np.ndarray
    log_reference: np.ndarray
    modes: np.ndarray | None = None
    context: Context = None
    evaluated: dict[int, tuple[Reward, Tensor, np.ndarray]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def values_of(self, reward: Reward) -> np.ndarray:
        """A reward at all points, float64, NaN where it failed, (n,).

        Evaluated once for all distributions on the same points: on a bank a reward may be dear.
        """
        kept = self.evaluated.get(id(reward))
        if kept is None or kept[0] is not reward or kept[1] is not self.points:
            values = reward(self.points, self.context).double().numpy(force=True)
            kept = self.evaluated[id(reward)] = (reward, self.points, values)
        return kept[2]

    @property
    def p(self) -> np.ndarray:
        """Probabilities, (n,)."""
        return np.exp(self.log_p)

    @property
    def reference(self) -> np.ndarray:
        """Probabilities of the pretrained distribution, (n,)."""
        return np.exp(self.log_reference)

    def with_p(self, p: np.ndarray) -> FiniteDistribution:
        """The distribution with other probabilities (n,) on the same points."""
        with np.errstate(divide="ignore"):
            return replace(self, log_p=np.log(p))


def per_sample(factors: Tensor, x: Tensor) -> Tensor:
    """View one factor a sample, (batch,), so that it multiplies ``x`` (batch, ...)."""
    return factors.to(x).reshape(len(x), *(1,) * (x.ndim - 1))


def gradient_of(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of each sample's ``value`` (batch,) at ``x`` (batch, ...), by automatic differentiation.

    Raises:
        RewardError: if the values carry none, as those of a reward that is called instead of its ``value``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return input_gradient(value(x), x, "a first variation")


class NoValues(ValueError):
    """A functional whose first variation weights of samples do not give."""


class FirstVariation(ABC):
    """The first variation of a functional at a fixed distribution: a function of the endpoint.

    Constants do not tilt: its value is known up to one.

    Attributes:
        cheap_values: whether a value costs no more than a gradient; else it takes likelihoods.
    """

    cheap_values: ClassVar[bool] = True

    @abstractmethod
    def value(self, x: Tensor, context: Context = None) -> Tensor:
        """Value at ``x`` (batch, ...) up to a constant that all samples share, (batch,)."""

    @abstractmethod
    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        """Gradient at ``x`` (batch, ...), of the same shape."""

    def on(self, distribution: FiniteDistribution) -> np.ndarray:
        """Values at the points of a finite distribution, float64, (n,); it keeps their rewards."""
        return self.value(distribution.points, distribution.context).detach().double().numpy(force=True)

    def active(self, x: Tensor, context: Context = None) -> Tensor:
        """Samples that carry a gradient, bool (batch,). A hinge is active on one side only."""
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    def active_on(self, distribution: FiniteDistribution) -> np.ndarray:
        """Which points of a finite distribution carry a gradient, bool, (n,); it keeps their rewards."""
        return self.active(distribution.points, distribution.context).numpy(force=True)

    def failed(self, x: Tensor, context: Context = None) -> Tensor:
        """Samples without a value, of a reward that may fail, bool (batch,): NaN by :meth:`value`.

        Solvers leave them out and count them.
        """
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)

    @property
    def sparse(self) -> bool:
        """Whether some samples may be inactive, so that a larger pool is worth its cost."""
        return False

    def split(self) -> tuple[FirstVariation | None, FirstVariation | None]:
        """Two parts whose sum it is: what has cheap values, and what is better known by its gradient."""
        return (self, None) if self.cheap_values else (None, self)


class Functional(ABC):
    """A functional of the generated distribution.

    Attributes:
        needs: what the gradient of its first variation takes.
        by_values: whether weights of samples are enough for its value and its first variation, as for
            functionals of rewards: neither scores nor densities. It then has :meth:`variation_at`.
    """

    tier: Tier = "general"
    needs: Need = "nothing"
    by_values: bool = False

    @abstractmethod
    def value(self, distribution: Distribution) -> float:
        """The functional at ``distribution``, estimated from its samples."""

    @abstractmethod
    def linearise(self, distribution: Distribution) -> FirstVariation:
        """The first variation at ``distribution``."""

    @abstractmethod
    def finite_value(self, distribution: FiniteDistribution) -> float:
        """The functional at a finite distribution, exactly."""

    @abstractmethod
    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        """The first variation at every point of a finite distribution, up to a constant, (n,)."""

    def variation_at(self, distribution: FiniteDistribution) -> FirstVariation:
        """The first variation at weighted samples, as a function of the endpoint.

        Raises:
            NoValues: if it takes more than weights and values.
        """
        raise NoValues(
            f"the first variation of {type(self).__name__} is not known from weights of samples: by "
            "exponents, Flow Density Control raises expected_reward, cvar, sq, mean_variance, log_barrier, "
            "optimal_design and their sums; take its steps by scores"
        )

    @property
    def components(self) -> tuple[Functional, ...]:
        """The functionals that this one is made of: itself, unless it is a sum."""
        return (self,)

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """The rewards whose gradients the first variation takes: all that are attributes."""
        return tuple(value for value in vars(self).values() if isinstance(value, Reward))


class MeanOfVariation(Functional):
    """A functional whose value is the mean of its first variation."""

    def value(self, distribution: Distribution) -> float:
        variation = self.linearise(distribution)
        return float(variation.value(distribution.samples, distribution.context).double().mean())


def _total(parts: Iterable[tuple[float, Any]], of: Callable[[Any], Any], zero: Any) -> Any:
    """``zero`` and what there is ``of`` each part, by its weight; one of weight 0 is not asked."""
    for weight, part in parts:
        if weight != 0:
            zero = zero + weight * of(part)
    return zero


@dataclass(frozen=True)
class WeightedVariation(FirstVariation):
    """A weighted sum of first variations; active where its first part is.

    The first part is the utility: divergences keep a gradient everywhere, so counting them would
    hide a hinge that no sample reaches.
    """

    parts: tuple[tuple[float, FirstVariation], ...]

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return _total(self.parts, lambda part: part.value(x, context), x.new_zeros(len(x)))

    def on(self, distribution: FiniteDistribution) -> np.ndarray:
        return _total(self.parts, lambda part: part.on(distribution), np.zeros(len(distribution.points)))

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return _total(self.parts, lambda part: part.gradient(x, context), torch.zeros_like(x))

    def active(self, x: Tensor, context: Context = None) -> Tensor:
        return self.parts[0][1].active(x, context)

    def active_on(self, distribution: FiniteDistribution) -> np.ndarray:
        return self.parts[0][1].active_on(distribution)

    def failed(self, x: Tensor, context: Context = None) -> Tensor:
        failed = super().failed(x, context)
        for weight, part in self.parts:
            if weight != 0:
                failed = failed | part.failed(x, context)
        return failed

    @property
    def sparse(self) -> bool:
        return self.parts[0][1].sparse

    def split(self) -> tuple[FirstVariation | None, FirstVariation | None]:
        halves: tuple[list[tuple[float, FirstVariation]], ...] = ([], [])
        for weight, part in self.parts:
            for half, own in zip(halves, part.split(), strict=True):
                if own is not None and weight != 0:
                    half.append((weight, own))
        by_value, rest = (WeightedVariation(tuple(half)) if half else None for half in halves)
        return by_value, rest


@dataclass(frozen=True)
class _Sum(Functional):
    """``sum_i w_i F_i``, with the hardest tier and the dearest need of its terms.

    A term of weight 0 is never evaluated: neither its cost nor an infinity of it counts.
    """

    tier: Tier = field(init=False)
    needs: Need = field(init=False)
    by_values: bool = field(init=False)

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a weighted sum of functionals needs at least one part")
        for weight, part in self.terms:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {type(part).__name__} must be finite, got {weight}")
        parts = self.components
        object.__setattr__(self, "by_values", all(part.by_values for part in parts))
        object.__setattr__(self, "tier", max((p.tier for p in parts), key=get_args(Tier).index))
        object.__setattr__(self, "needs", max((p.needs for p in parts), key=get_args(Need).index))

    @property
    @abstractmethod
    def terms(self) -> tuple[tuple[float, Functional], ...]:
        """Weights and functionals; the first is the one whose active samples count."""

    @property
    def components(self) -> tuple[Functional, ...]:
        first = self.terms[0][1].components
        return first + tuple(c for weight, part in self.terms[1:] if weight != 0 for c in part.components)

    @property
    def rewards(self) -> tuple[Reward, ...]:
        return tuple(reward for part in self.components for reward in part.rewards)

    def value(self, distribution: Distribution) -> float:
        return float(_total(self.terms, lambda part: part.value(distribution), 0.0))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return float(_total(self.terms, lambda part: part.finite_value(distribution), 0.0))

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        zero = np.zeros(len(distribution.log_p))
        return _total(self.terms, lambda part: part.finite_variation(distribution), zero)

    def linearise(self, distribution: Distribution) -> WeightedVariation:
        return self._of_terms(lambda part: part.linearise(distribution))

    def variation_at(self, distribution: FiniteDistribution) -> WeightedVariation:
        return self._of_terms(lambda part: part.variation_at(distribution))

    def _of_terms(self, variation: Callable[[Functional], FirstVariation]) -> WeightedVariation:
        (first_weight, first), *rest = self.terms
        parts = [(weight, variation(part)) for weight, part in rest if weight != 0]
        return WeightedVariation(((first_weight, variation(first)), *parts))


@dataclass(frozen=True)
class WeightedSum(_Sum):
    """``sum_i w_i F_i`` of any functionals, wherever a functional can stand.

    Attributes:
        parts: weights, in units of the sum a unit of the part, and functionals. As in
            :class:`WeightedVariation`, samples are active where they are for the first part.
    """

    parts: tuple[tuple[float, Functional], ...]

    @property
    def terms(self) -> tuple[tuple[float, Functional], ...]:
        return self.parts


@dataclass(frozen=True)
class Objective(_Sum):
    """``G(p) = utility(p) - alpha divergence(p)``.

    Attributes:
        divergence: what keeps the distribution near the pretrained one.
        alpha: weight of the divergence, in units of the utility a nat; not negative.
    """

    utility: Functional
    divergence: Functional
    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"the divergence weight alpha must not be negative, got {self.alpha}")
        super().__post_init__()

    @property
    def terms(self) -> tuple[tuple[float, Functional], ...]:
        return ((1.0, self.utility), (-self.alpha, self.divergence))
