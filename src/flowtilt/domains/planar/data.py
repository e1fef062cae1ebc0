"""The planar data: mixtures of axis-aligned Gaussians, one or one for each mode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of axis-aligned Gaussians in the plane.

    Attributes:
        weights: positive, (components,); they need not sum to 1.
        means: (components, 2).
        deviations: standard deviations per axis, (components, 2).
    """

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws, (count, 2)."""
        weights = torch.from_numpy(self.weights)
        component = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        means, deviations = (torch.from_numpy(a).float()[component] for a in (self.means, self.deviations))
        return means + deviations * noise

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Log-density in nats at points (..., 2), shape (...)."""
        z = (points[..., None, :] - self.means) / self.deviations
        log_normaliser = np.log(2 * np.pi) + np.log(self.deviations).sum(-1)
        log_weights = np.log(self.weights / self.weights.sum())
        terms = log_weights - 0.5 * (z**2).sum(-1) - log_normaliser
        return np.asarray(np.logaddexp.reduce(terms, axis=-1))


@dataclass(frozen=True)
class ModeMixtures:
    """A mixture for each mode; modes are equally likely.

    Attributes:
        each: the mixtures, by mode.
    """

    each: tuple[GaussianMixture, ...]

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws, (count, 2), and their modes, long (count,)."""
        modes = torch.randint(len(self.each), (count,), generator=generator)
        draws = torch.stack([mixture.sample(count, generator) for mixture in self.each])
        return draws[modes, torch.arange(count)], modes

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Log-density of each mode in nats at points (..., 2), shape (modes, ...)."""
        return np.stack([mixture.log_density(points) for mixture in self.each])
