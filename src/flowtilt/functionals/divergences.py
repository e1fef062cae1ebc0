"""Divergences from the pretrained distribution.

First variations are those of FDC (De Santi et al. 2025, table 1), up to constants, each with respect
to the first argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowtilt.devices import seeded
from flowtilt.functionals.base import (
    Distribution,
    FiniteDistribution,
    FirstVariation,
    Functional,
    MeanOfVariation,
    gradient_of,
    per_sample,
)
from flowtilt.functionals.critic import CriticPotential, CriticSettings, train_critic
from flowtilt.functionals.kernels import Kernel, kernel_by_name, kernel_matrix, kernel_means
from flowtilt.functionals.smoothing import NO_SMOOTHED_VALUE, smoothed
from flowtilt.metrics.transport import Transport, check_metric, ground_distances, kantorovich
from flowtilt.model import Context, FlowModel, evaluating
from flowtilt.ranges import COUNT, at_least, between, check
from flowtilt.sampling import OdeSettings, log_likelihood, sample_sde


@dataclass(frozen=True)
class ScoreDifference(FirstVariation):
    """First variation ``log p - log q`` of ``KL(p || q)``, by the two models' scores.

    A score follows from a velocity through a division by ``eta``, which vanishes at the data, so
    both are taken at ``time`` just before it, where a solver still trains the velocity. With ``pairs`` of
    noise it is that of the distributions which the two paths have at that time, see
    :func:`flowtilt.functionals.smoothing.smoothed`.
    """

    cheap_values = False

    model: FlowModel
    reference: FlowModel
    time: float
    ode: OdeSettings = field(default_factory=OdeSettings)
    pairs: int = 0

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        if self.pairs:
            raise NotImplementedError(NO_SMOOTHED_VALUE)
        own = log_likelihood(self.model, x, context, self.ode)
        return own - log_likelihood(self.reference, x, context, self.ode)

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        if self.model is self.reference:  # as in the first step of an ascent: two equal scores cost passes
            return torch.zeros_like(x)
        with torch.no_grad(), evaluating(self.model, self.reference):
            t = x.new_tensor(self.time)
            if self.pairs:
                return smoothed(self._difference, self.model, x, t, context, self.pairs)
            return self._difference(x, t, context)

    def _difference(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """Of the two scores; their linear part cancels, and only velocities are left."""
        own = self.model.context_for("control", context)
        difference = self.model.velocity(x, t, own) - self.reference.velocity(x, t, own)
        return difference / self.model.path.eta(t)


def _log_ratios(distribution: FiniteDistribution) -> np.ndarray:
    """``log p - log reference`` at every point, (n,); 0 where neither has mass."""
    neither = np.isneginf(distribution.log_p) & np.isneginf(distribution.log_reference)
    return np.where(neither, 0.0, distribution.log_p) - np.where(neither, 0.0, distribution.log_reference)


@dataclass(frozen=True)
class KL(MeanOfVariation):
    """``KL(p || reference)``; the value needs likelihoods, the gradient only scores.

    Attributes:
        score_time: time at which scores stand for those of the data, in (0, 1).
        pairs: if not zero, the divergence is that of the distributions with noise, see
            :class:`flowtilt.functionals.utilities.Entropy`.
    """

    tier = "linear"
    needs = "score"

    reference: FlowModel
    score_time: float = 0.99
    ode: OdeSettings = field(default_factory=OdeSettings)
    pairs: int = 0

    def __post_init__(self) -> None:
        check(self, "a KL divergence's ", score_time=between(0, 1), pairs=at_least(0))

    def linearise(self, distribution: Distribution) -> ScoreDifference:
        return ScoreDifference(distribution.model, self.reference, self.score_time, self.ode, self.pairs)

    def finite_value(self, distribution: FiniteDistribution) -> float:
        held = distribution.p > 0
        return float(distribution.p[held] @ _log_ratios(distribution)[held])

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        return _log_ratios(distribution)


@dataclass(frozen=True)
class PoweredRatio(FirstVariation):
    """``b / (b - 1) (p / q)^(b - 1) / Z``: first variation of the Renyi divergence of order b.

    Attributes:
        log_ratio: ``log p - log q`` and its gradient.
        log_normaliser: ``log Z = log E_p[(p / q)^(b - 1)]``.
    """

    log_ratio: ScoreDifference
    order: float
    log_normaliser: float

    def _weight(self, x: Tensor, context: Context) -> Tensor:
        """``(p / q)^(b - 1) / Z`` by its logarithm, (batch,)."""
        return torch.exp((self.order - 1) * self.log_ratio.value(x, context) - self.log_normaliser)

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return self.order / (self.order - 1) * self._weight(x, context)

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return per_sample(self.order * self._weight(x, context), x) * self.log_ratio.gradient(x, context)


@dataclass(frozen=True)
class Renyi(Functional):
    """``R_b(p || reference) = log E_p[(p / reference)^(b - 1)] / (b - 1)``.

    Takes densities of both models at every sample, by the likelihood of the probability-flow ODE:
    each gradient costs two solutions of it with the divergence. Far out in the tails the weight
    ``(p / reference)^(b - 1)`` of an order above 1 is not bounded, nor is the variance of its mean.

    Attributes:
        order: b, positive and not 1.
        score_time: time at which scores stand for those of the data, in (0, 1).
        samples: how many of the distribution's samples the mean is taken over, the first ones.
    """

    tier = "general"
    needs = "density"

    reference: FlowModel
    order: float
    score_time: float = 0.99
    ode: OdeSettings = field(default_factory=OdeSettings)
    samples: int = 2000

    def __post_init__(self) -> None:
        if not 0 < self.order < math.inf or self.order == 1:
            raise ValueError(
                f"the order of a Renyi divergence must be positive and not 1, got {self.order}; "
                "its limit at 1 is the KL divergence"
            )
        check(self, "a Renyi divergence's ", samples=COUNT, score_time=between(0, 1))

    def _log_normaliser(self, distribution: Distribution) -> float:
        kept = min(self.samples, len(distribution.samples))
        context = distribution.model.select_context(distribution.context, torch.arange(kept))
        ratios = ScoreDifference(distribution.model, self.reference, self.score_time, self.ode)
        exponents = (self.order - 1) * ratios.value(distribution.samples[:kept], context).double()
        return float(torch.logsumexp(exponents, 0)) - math.log(kept)

    def value(self, distribution: Distribution) -> float:
        return self._log_normaliser(distribution) / (self.order - 1)

    def linearise(self, distribution: Distribution) -> PoweredRatio:
        ratios = ScoreDifference(distribution.model, self.reference, self.score_time, self.ode)
        return PoweredRatio(ratios, self.order, self._log_normaliser(distribution))

    def _finite_terms(self, distribution: FiniteDistribution) -> tuple[np.ndarray, float]:
        """Exponents ``(b - 1) log(p / reference)`` and the log of their mean's exponential."""
        exponents = (self.order - 1) * _log_ratios(distribution)
        held = distribution.p > 0
        return exponents, float(np.logaddexp.reduce(distribution.log_p[held] + exponents[held]))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return self._finite_terms(distribution)[1] / (self.order - 1)

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        exponents, log_normaliser = self._finite_terms(distribution)
        return self.order / (self.order - 1) * np.exp(exponents - log_normaliser)


@dataclass(frozen=True)
class ReferenceDraw:
    """How samples of the pretrained model are drawn, to compare a distribution's samples with.

    By the memoryless process, as the distribution's own in Flow Density Control: with as many steps, errors
    of the discretisation are the same on both sides.
    """

    samples: int = 2000
    steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "a reference draw's ", samples=COUNT, steps=COUNT)

    def of(self, model: FlowModel) -> Tensor:
        """Samples of the model, (samples, ...)."""
        random = seeded(self.seed)
        context = model.draw_context(self.samples, random)
        return sample_sde(model, self.samples, self.steps, random, context)[-1]


@dataclass(frozen=True)
class Witness(FirstVariation):
    """``(E_p k(x, .) - E_q k(x, .)) / size`` over samples of the two distributions.

    Attributes:
        samples: of the distribution, float64, (n, ...).
        reference: of the pretrained distribution, float64, (m, ...).
        kernel: of the distance in units of the bandwidth.
        bandwidth: unit of the distance.
        size: of the difference, in the kernel's norm; at 0 the distributions agree and the variation is 0.
    """

    samples: Tensor
    reference: Tensor
    kernel: Kernel
    bandwidth: float
    size: float

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        if self.size == 0:
            return x.new_zeros(len(x))
        own = kernel_means(self.kernel, x.double(), self.samples, self.bandwidth)
        other = kernel_means(self.kernel, x.double(), self.reference, self.bandwidth)
        return ((own - other) / self.size).to(x.dtype)

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return torch.zeros_like(x) if self.size == 0 else gradient_of(self.value, x)


def _discrepancy(square: float, scale: float) -> float:
    """Root of a squared discrepancy; 0 where it is rounding of sums of the size ``scale``."""
    return math.sqrt(square) if square > 1e-12 * scale else 0.0


@dataclass(frozen=True)
class MMD(Functional):
    """Maximum mean discrepancy ``sup E_p f - E_q f`` over the kernel's unit ball (not squared).

    Estimated as the V-statistic: the exact discrepancy of the two *empirical* distributions, so that it is
    never negative and the first variation belongs to the value. It is biased upwards: two sets of N
    samples of one distribution are ``sqrt(2 (k(x, x) - E k) / N)`` apart in the root mean square. Where the
    distributions agree the discrepancy has a kink; its first variation is taken as 0 there.

    Attributes:
        kernel: ``gaussian``, ``inverse_multiquadric`` or ``energy``.
        bandwidth: unit of distances, in units of the samples; scales the energy distance.
    """

    tier = "convex"

    reference: FlowModel
    kernel: str = "gaussian"
    bandwidth: float = 1.0
    draw: ReferenceDraw = field(default_factory=ReferenceDraw)

    def __post_init__(self) -> None:
        kernel_by_name(self.kernel)
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"a kernel's bandwidth must be positive and finite, got {self.bandwidth}")

    def value(self, distribution: Distribution) -> float:
        return self.linearise(distribution).size

    def linearise(self, distribution: Distribution) -> Witness:
        kernel = kernel_by_name(self.kernel)
        x, y = distribution.samples.double(), self.draw.of(self.reference).double()
        pairs = ((x, x), (x, y), (y, y))
        own, cross, other = (float(kernel_means(kernel, a, b, self.bandwidth).mean()) for a, b in pairs)
        size = _discrepancy(own - 2 * cross + other, abs(own) + abs(cross) + abs(other))
        return Witness(x, y, kernel, self.bandwidth, size)

    def _finite_terms(self, distribution: FiniteDistribution) -> tuple[np.ndarray, float]:
        """The witness at every point, and the discrepancy."""
        points = distribution.points.double()
        kernel = kernel_matrix(kernel_by_name(self.kernel), points, points, self.bandwidth).numpy(force=True)
        difference = distribution.p - distribution.reference
        witness = kernel @ difference
        return witness, _discrepancy(float(difference @ witness), float(np.abs(kernel).max()))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return self._finite_terms(distribution)[1]

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        witness, size = self._finite_terms(distribution)
        return witness / size if size > 0 else np.zeros_like(witness)


class Unmoved(FirstVariation):
    """The first variation 0, of a divergence at its minimum."""

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return x.new_zeros(len(x))

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Wasserstein1(Functional):
    """Wasserstein-1 distance under ``d(x, y) = sqrt(sum_i w_i (x_i - y_i)^2)``.

    The first variation is the Kantorovich potential: by a critic for a model's distribution, which gives a
    lower estimate of the distance between the two sets of samples; by the network simplex, exactly,
    for a finite distribution. At the pretrained distribution itself the distance has a kink, and the
    variation is 0.

    Attributes:
        weights: of the metric, one for each coordinate, positive.
    """

    tier = "general"
    needs = "critic"

    reference: FlowModel
    weights: tuple[float, ...]
    critic: CriticSettings = field(default_factory=CriticSettings)
    draw: ReferenceDraw = field(default_factory=ReferenceDraw)

    def __post_init__(self) -> None:
        check_metric(self.weights)

    def value(self, distribution: Distribution) -> float:
        potential, reference = self._trained(distribution)
        own, other = potential.value(distribution.samples), potential.value(reference)
        return float(own.double().mean() - other.double().mean())

    def linearise(self, distribution: Distribution) -> FirstVariation:
        # At the pretrained distribution the distance is at its minimum: 0 is a subgradient, where a critic
        # would separate two sets of samples of one distribution by their noise.
        return Unmoved() if distribution.model is self.reference else self._trained(distribution)[0]

    def _trained(self, distribution: Distribution) -> tuple[CriticPotential, Tensor]:
        """The critic, and the samples of the pretrained model that it was trained on."""
        reference = self.draw.of(self.reference)
        return train_critic(distribution.samples, reference, self.weights, self.critic), reference

    def _finite(self, distribution: FiniteDistribution) -> Transport:
        points = distribution.points.numpy(force=True)
        return kantorovich(
            ground_distances(points, points, self.weights), distribution.p, distribution.reference
        )

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return self._finite(distribution).value

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        if np.array_equal(distribution.log_p, distribution.log_reference):
            return np.zeros(len(distribution.log_p))
        return self._finite(distribution).potential
