"""Optimal experimental design: how much of a feature space a distribution's samples span.

With features ``phi`` the information matrix is ``M = E_p[phi phi^T] + ridge I``. All three classical
criteria are concave in M, and their first variations are quadratic forms of the features (De Santi
et al. 2025, table 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flowtilt.devices import seeded
from flowtilt.functionals.base import (
    Distribution,
    FiniteDistribution,
    FirstVariation,
    Functional,
    gradient_of,
)
from flowtilt.model import Context

Criterion = Literal["log_det", "trace", "eigenvalue"]
"""``log det M``, ``-tr M^-1`` and ``-lambda_max(M^-1)``: D-, A- and E-optimality."""


class SingularDesign(ValueError):
    """An information matrix that cannot be inverted."""


class Features(ABC):
    """Features of a sample."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Features of ``x`` (batch, ...), (batch, features)."""


@dataclass(frozen=True)
class PolynomialFeatures(Features):
    """All monomials of the coordinates up to a degree of 1 or 2, the constant among them.

    ``(1, x, y, x^2, x y, y^2)`` in the plane at degree 2.
    """

    degree: int = 2

    def __post_init__(self) -> None:
        if self.degree not in (1, 2):
            raise ValueError(f"the degree of polynomial features must be 1 or 2, got {self.degree}")

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        linear = [torch.ones_like(flat[:, :1]), flat]
        if self.degree == 1:
            return torch.cat(linear, dim=1)
        i, j = torch.triu_indices(flat.shape[1], flat.shape[1])
        return torch.cat([*linear, flat[:, i] * flat[:, j]], dim=1)


@dataclass(frozen=True)
class RandomFourierFeatures(Features):
    """``sqrt(2 / count) cos(w^T x / bandwidth + b)`` with standard normal w and uniform phases b.

    Inner products of two samples' features approximate the Gaussian kernel of that bandwidth
    (Rahimi and Recht 2007).

    Attributes:
        bandwidth: in units of the samples.
    """

    count: int = 64
    dimension: int = 2
    bandwidth: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.dimension < 1:
            raise ValueError(
                f"random features need a count and a dimension of at least 1, got {self.count} "
                f"and {self.dimension}"
            )
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(
                f"the bandwidth of random features must be positive and finite, got {self.bandwidth}"
            )

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Directions (dimension, count) and phases (count,), float64."""
        random = seeded(self.seed)
        shape = self.dimension, self.count
        directions = torch.randn(shape, generator=random, dtype=torch.float64) / self.bandwidth
        return directions, 2 * math.pi * torch.rand(self.count, generator=random, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        directions, phases = (v.to(x) for v in self._drawn)
        return math.sqrt(2 / self.count) * torch.cos(x.flatten(1) @ directions + phases)


FEATURES: dict[str, type[Features]] = {
    "polynomial": PolynomialFeatures,
    "random_fourier": RandomFourierFeatures,
}


@dataclass(frozen=True)
class FeatureForm(FirstVariation):
    """``phi(x)^T B phi(x)`` with a symmetric matrix B, float64, (features, features)."""

    features: Features
    matrix: Tensor

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        phi = self.features(x.double())
        return ((phi @ self.matrix.to(phi)) * phi).sum(1).to(x.dtype)

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        return gradient_of(self.value, x)


@dataclass(frozen=True)
class OptimalDesign(Functional):
    """A criterion of the information matrix ``M = E_p[phi phi^T] + ridge I``; concave in the distribution.

    Where the smallest eigenvalue of M is shared, the eigenvalue criterion has a kink: one of its
    supergradients is returned.

    Attributes:
        criterion: ``log_det``, ``trace`` or ``eigenvalue``.
        ridge: what is added to the diagonal of M, not negative.
    """

    tier = "convex"
    by_values = True

    criterion: Criterion = "log_det"
    features: Features = PolynomialFeatures()
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise ValueError(
                f"unknown design criterion {self.criterion!r}; known: {', '.join(get_args(Criterion))}"
            )
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"the ridge must be finite and not negative, got {self.ridge}")

    def _spectrum(self, phi: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rising eigenvalues (features,) and eigenvectors (features, features) of M.

        Raises:
            SingularDesign: if M cannot be inverted in float64.
        """
        matrix = phi.T @ (p[:, None] * phi) + self.ridge * np.eye(phi.shape[1])
        values, vectors = np.linalg.eigh(matrix)
        if not values[0] > len(values) * np.finfo(np.float64).eps * values[-1]:
            condition = values[-1] / values[0] if values[0] > 1e-300 * values[-1] else math.inf
            raise SingularDesign(
                f"the information matrix of {len(values)} features is singular "
                f"(condition number {condition:.3g} at ridge {self.ridge:g}): "
                "raise the ridge, or use fewer features or more samples"
            )
        return values, vectors

    def _value(self, spectrum: tuple[np.ndarray, np.ndarray]) -> float:
        values = spectrum[0]
        if self.criterion == "log_det":
            return float(np.log(values).sum())
        return -float((1 / values).sum() if self.criterion == "trace" else 1 / values[0])

    def _matrix(self, spectrum: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The matrix of the first variation: ``M^-1``, ``M^-2`` or ``u u^T / lambda_min(M)^2``."""
        values, vectors = spectrum
        if self.criterion == "eigenvalue":
            weights = np.where(np.arange(len(values)) == 0, values**-2, 0.0)
        else:
            weights = 1 / values if self.criterion == "log_det" else values**-2
        return (vectors * weights) @ vectors.T

    def _of_distribution(self, distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
        count = len(distribution.samples)
        return self._spectrum(self._features(distribution.samples), np.full(count, 1 / count))

    def _features(self, x: Tensor) -> np.ndarray:
        with torch.no_grad():
            return self.features(x.double()).numpy(force=True)

    def value(self, distribution: Distribution) -> float:
        return self._value(self._of_distribution(distribution))

    def linearise(self, distribution: Distribution) -> FeatureForm:
        return FeatureForm(self.features, torch.as_tensor(self._matrix(self._of_distribution(distribution))))

    def finite_value(self, distribution: FiniteDistribution) -> float:
        return self._value(self._spectrum(self._features(distribution.points), distribution.p))

    def finite_variation(self, distribution: FiniteDistribution) -> np.ndarray:
        return self.variation_at(distribution).on(distribution)

    def variation_at(self, distribution: FiniteDistribution) -> FeatureForm:
        matrix = self._matrix(self._spectrum(self._features(distribution.points), distribution.p))
        return FeatureForm(self.features, torch.as_tensor(matrix))
