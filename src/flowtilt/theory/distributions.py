"""Distributions on finitely many cells as log probabilities, and divergences that do not cancel.

Near an optimum, gaps and divergences are far smaller than the values that they are differences of.
Everything here is a sum of terms that are not negative, so that it keeps its digits down to 1e-28.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp


def normalise(log_p: np.ndarray) -> np.ndarray:
    """Log probabilities from unnormalised ones, any shape."""
    return log_p - logsumexp(log_p)


def excess(d: np.ndarray) -> np.ndarray:
    """``d + exp(-d) - 1``, which is ``d^2 / 2`` near zero, to 1e-12 of itself."""
    d = np.asarray(d, dtype=np.float64)
    series = d**2 / 2 * (1 - d / 3 * (1 - d / 4 * (1 - d / 5)))
    with np.errstate(over="ignore"):  # infinity is the right value
        return np.where(np.abs(d) < 1e-3, series, d + np.expm1(-d))


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """``KL(p || q) = sum p (d + exp(-d) - 1)`` with ``d = log p - log q``, in nats."""
    return float(np.exp(log_p) @ excess(log_p - log_q))


def square_grid(extent: float, cells: int) -> np.ndarray:
    """Cell centres of a square grid over ``[-extent, extent]^2``, (cells * cells, 2)."""
    axis = extent * ((2 * np.arange(cells) + 1) / cells - 1)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def gaussian_mixture(
    points: np.ndarray, weights: np.ndarray, means: np.ndarray, deviations: np.ndarray
) -> np.ndarray:
    """Log probabilities on cells of a mixture of axis-aligned Gaussians.

    Args:
        points: cell centres, (n, d).
        weights: (k,), positive.
        means, deviations: (k, d).

    Returns:
        (n,), normalised on the cells.
    """
    scaled = (points[:, None, :] - means) / deviations
    logs = np.log(weights) - np.log(deviations).sum(1) - 0.5 * (scaled**2).sum(2)
    return normalise(logsumexp(logs, axis=1))
