"""What a functional of a law is to the solvers: a value and a first variation.

A law comes in two forms. A :class:`Law` is a model with samples from it: values are estimates, and
first variations are functions of the endpoint with a gradient. A :class:`FiniteLaw` is a vector of
probabilities on given points: values and first variations are exact. The second is where every
functional is checked against numerical derivatives, and where optima are known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from flowtilt.model import Context, FlowModel

Tier = Literal["linear", "convex", "general"]
"""FDC's hierarchy (De Santi et al. 2025, table 1): linear, convex and general problems."""

Need = Literal["nothing", "score", "density", "critic"]
"""What the gradient of a first variation takes beside the samples and their rewards."""


@dataclass(frozen=True)
class Law:
    """A law given by a model and samples from it.

    Attributes:
        model: the flow whose endpoint law it is.
        samples: draws from it, (batch, ...).
        context: the draws' context.
    """

    model: FlowModel
    samples: Tensor
    context: Context = None


@dataclass(frozen=True)
class FiniteLaw:
    """Probabilities on points of the space.

    Attributes:
        points: float64, (n, ...).
        log_p: log probabilities, (n,); minus infinity where there is no mass.
        log_reference: those of the pretrained law on the same points, (n,).
    """

    points: Tensor
    log_p: np.ndarray
    log_reference: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """Probabilities, (n,)."""
        return np.exp(self.log_p)


class FirstVariation(ABC):
    """The first variation of a functional at a fixed law: a function of the endpoint.

    Constants do not tilt: its value is known up to one.
    """

    @abstractmethod
    def value(self, x: Tensor, context: Context = None) -> Tensor:
        """Value at ``x`` (batch, ...) up to a constant that all samples share, (batch,)."""

    @abstractmethod
    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        """Gradient at ``x`` (batch, ...), of the same shape."""

    def active(self, x: Tensor, context: Context = None) -> Tensor:
        """Samples that carry a gradient, bool (batch,). A hinge is active on one side only."""
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    @property
    def sparse(self) -> bool:
        """Whether some samples may be inactive, so that a larger pool is worth its cost."""
        return False


class Functional(ABC):
    """A functional of the generated law.

    Attributes:
        tier: where FDC's hierarchy puts the functional.
        needs: what the gradient of its first variation takes.
    """

    tier: ClassVar[Tier] = "general"
    needs: ClassVar[Need] = "nothing"

    @abstractmethod
    def value(self, law: Law) -> float:
        """The functional at ``law``, estimated from its samples."""

    @abstractmethod
    def linearise(self, law: Law) -> FirstVariation:
        """The first variation at ``law``."""

    @abstractmethod
    def finite_value(self, law: FiniteLaw) -> float:
        """The functional at a finite law, exactly."""

    @abstractmethod
    def finite_variation(self, law: FiniteLaw) -> np.ndarray:
        """The first variation at every point of a finite law, up to a constant, (n,)."""


@dataclass(frozen=True)
class WeightedVariation(FirstVariation):
    """A weighted sum of first variations; active where its first part is.

    The first part is the utility: divergences keep a gradient everywhere, so counting them would
    hide a hinge that no sample reaches.
    """

    parts: tuple[tuple[float, FirstVariation], ...]

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        total = x.new_zeros(len(x))
        for weight, part in self.parts:
            if weight != 0:
                total = total + weight * part.value(x, context)
        return total

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        total = torch.zeros_like(x)
        for weight, part in self.parts:
            if weight != 0:
                total = total + weight * part.gradient(x, context)
        return total

    def active(self, x: Tensor, context: Context = None) -> Tensor:
        return self.parts[0][1].active(x, context)

    @property
    def sparse(self) -> bool:
        return self.parts[0][1].sparse


@dataclass(frozen=True)
class Objective(Functional):
    """``G(p) = utility(p) - alpha divergence(p)``.

    Attributes:
        utility: what to raise.
        divergence: what keeps the law near the pretrained one.
        alpha: weight of the divergence, in units of the utility a nat; not negative.
    """

    utility: Functional
    divergence: Functional
    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"the divergence weight alpha must not be negative, got {self.alpha}")

    def value(self, law: Law) -> float:
        return self.utility.value(law) - self.alpha * self.divergence.value(law)

    def finite_value(self, law: FiniteLaw) -> float:
        return self.utility.finite_value(law) - self.alpha * self.divergence.finite_value(law)

    def finite_variation(self, law: FiniteLaw) -> np.ndarray:
        first = self.utility.finite_variation(law)
        return first - self.alpha * self.divergence.finite_variation(law)

    def linearise(self, law: Law) -> FirstVariation:
        return WeightedVariation(
            ((1.0, self.utility.linearise(law)), (-self.alpha, self.divergence.linearise(law)))
        )
