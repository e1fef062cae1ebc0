"""Divergences from the pretrained law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowtilt.functionals.base import FiniteLaw, FirstVariation, Functional, Law
from flowtilt.model import Context, FlowModel
from flowtilt.sampling import log_likelihood


@dataclass(frozen=True)
class ScoreDifference(FirstVariation):
    """First variation ``log p - log q`` of ``KL(p || q)``, by the two models' scores.

    A score follows from a velocity through a division by ``eta``, which vanishes at the data, so
    both are taken at ``time`` just before it, where a solver still trains the velocity.
    """

    model: FlowModel
    reference: FlowModel
    time: float

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        own = log_likelihood(self.model, x, context)
        return own - log_likelihood(self.reference, x, context)

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        with torch.no_grad():
            t = x.new_tensor(self.time)
            difference = self.model.velocity(x, t, context) - self.reference.velocity(x, t, context)
            # The linear part of the two scores cancels: only velocities are left.
            return difference / self.model.path.eta(t)


@dataclass(frozen=True)
class KL(Functional):
    """``KL(p || reference)``; the value needs likelihoods, the gradient only scores.

    Attributes:
        reference: the pretrained model.
        score_time: time at which scores stand for those of the data, in (0, 1).
    """

    tier = "linear"
    needs = "score"

    reference: FlowModel
    score_time: float = 0.99

    def value(self, law: Law) -> float:
        own = log_likelihood(law.model, law.samples, law.context)
        other = log_likelihood(self.reference, law.samples, law.context)
        return float((own - other).double().mean())

    def linearise(self, law: Law) -> ScoreDifference:
        return ScoreDifference(law.model, self.reference, self.score_time)

    def finite_value(self, law: FiniteLaw) -> float:
        held = law.p > 0
        return float(law.p[held] @ (law.log_p - law.log_reference)[held])

    def finite_variation(self, law: FiniteLaw) -> np.ndarray:
        return law.log_p - law.log_reference
