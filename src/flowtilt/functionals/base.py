"""What a functional of a law is to the solvers: a value and a first variation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.model import Context, FlowModel


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


class FirstVariation(ABC):
    """The first variation of a functional at a fixed law: a function of the endpoint.

    Only its gradient matters to a control solver, since constants do not tilt.
    """

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
    """A functional of the generated law."""

    @abstractmethod
    def value(self, law: Law) -> float:
        """The functional at ``law``, estimated from its samples."""

    @abstractmethod
    def linearise(self, law: Law) -> FirstVariation:
        """The first variation at ``law``."""


@dataclass(frozen=True)
class WeightedVariation(FirstVariation):
    """A weighted sum of first variations; active where its first part is.

    The first part is the utility: divergences keep a gradient everywhere, so counting them would
    hide a hinge that no sample reaches.
    """

    parts: tuple[tuple[float, FirstVariation], ...]

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

    def linearise(self, law: Law) -> FirstVariation:
        return WeightedVariation(
            ((1.0, self.utility.linearise(law)), (-self.alpha, self.divergence.linearise(law)))
        )
