"""Mixtures of Gaussians and their exponential tilts by quadratic rewards, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax


@dataclass(frozen=True)
class QuadraticReward:
    """``c^T x - x^T A x / 2``.

    Attributes:
        linear: c, (d,).
        curvature: A, symmetric, (d, d).
    """

    linear: np.ndarray
    curvature: np.ndarray


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of k Gaussians in d dimensions.

    Attributes:
        weights: positive, of sum 1, (k,).
        means: (k, d).
        covariances: positive definite, (k, d, d).
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    @classmethod
    def of(cls, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> GaussianMixture:
        """From numbers; the weights need not sum to 1.

        Raises:
            ValueError: if shapes do not fit, a weight is not positive, or a covariance is none.
        """
        w, m, s = (np.asarray(each, dtype=np.float64) for each in (weights, means, covariances))
        if m.ndim != 2 or w.shape != m.shape[:1] or s.shape != (*m.shape, m.shape[1]):
            raise ValueError(
                f"weights (k,), means (k, d) and covariances (k, d, d) do not fit: got {w.shape}, "
                f"{m.shape} and {s.shape}"
            )
        if not (w > 0).all() or not np.allclose(s, s.mT) or not (np.linalg.eigvalsh(s) > 0).all():
            raise ValueError("weights must be positive, and covariances symmetric and positive definite")
        return cls(w / w.sum(), m, s)

    @property
    def mean(self) -> np.ndarray:
        """Of the whole, (d,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> np.ndarray:
        """Of the whole, (d, d)."""
        centred = self.means - self.mean
        return np.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None])

    def expected(self, reward: QuadraticReward) -> float:
        """The mean of a reward."""
        squares = np.einsum("ij,kij->k", reward.curvature, self.covariances)
        squares += np.einsum("ki,ij,kj->k", self.means, reward.curvature, self.means)
        return float(self.weights @ (self.means @ reward.linear - 0.5 * squares))

    def tilted(self, reward: QuadraticReward, kl_weight: float) -> tuple[GaussianMixture, float]:
        """The distribution proportional to ``p exp(reward / kl_weight)``, and the log of its normaliser.

        By completing squares: with ``P = S^-1`` of a component, its tilt has ``S' = (P + A / kl_weight)^-1``
        and ``m' = S' (P m + c / kl_weight)``.

        Raises:
            ValueError: if the tilt has no normaliser.
        """
        precisions = np.linalg.inv(self.covariances)
        after = precisions + reward.curvature / kl_weight
        if not (np.linalg.eigvalsh(after) > 0).all():
            raise ValueError(
                f"the tilt at KL weight {kl_weight:g} has no normaliser; its reward curves upwards"
            )
        covariances = np.linalg.inv(after)
        pulls = np.einsum("kij,kj->ki", precisions, self.means)
        means = np.einsum("kij,kj->ki", covariances, pulls + reward.linear / kl_weight)
        logs = np.log(self.weights) + 0.5 * (
            np.linalg.slogdet(covariances)[1]
            - np.linalg.slogdet(self.covariances)[1]
            - (pulls * self.means).sum(1)
            + np.einsum("ki,kij,kj->k", means, after, means)
        )
        return GaussianMixture(softmax(logs), means, covariances), float(logsumexp(logs))

    def paid(self, reward: QuadraticReward, kl_weight: float) -> float:
        """The divergence of the tilt from this distribution, ``E'[reward] / kl_weight - log Z``, in nats."""
        tilt, log_z = self.tilted(reward, kl_weight)
        return tilt.expected(reward) / kl_weight - log_z


def weight_at(bases: Sequence[GaussianMixture], reward: QuadraticReward, nats: float) -> float:
    """The KL weight at which the tilts of equally probable contexts pay so many nats on average.

    Args:
        bases: of the contexts.
        reward: that does not curve upwards, so that the nats fall as the weight grows.
        nats: positive.
    """

    def excess(log_weight: float) -> float:
        return float(np.mean([base.paid(reward, np.exp(log_weight)) for base in bases])) - nats

    return float(np.exp(brentq(excess, np.log(1e-3), np.log(1e4), xtol=1e-14)))
