"""Quantiles and tail means of weighted samples, in float64.

A tail of mass ``b`` holds exactly the probability ``b``: the sample on its boundary counts with
the fraction of its weight that still fits. So the mean over the lower tail is
``max_t t - E (t - r)_+ / b``, also for a handful of samples and for gridded densities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flowtilt.words import Tail, read_tail


def hinge(rewards: Any, at: float, mass: float, tail: Tail) -> Any:
    """``(r - at)_+ / mass`` for the upper tail, ``-(at - r)_+ / mass`` for the lower: the first variation of
    a tail mean, and TFFT's pseudo-reward.

    Args:
        rewards: an array or a tensor, of any shape; NaN stays NaN.

    Raises:
        ValueError: for a mass outside of (0, 1], or another tail.
    """
    _check_mass(mass)
    excess = rewards - at
    return (excess.clip(max=0.0) if read_tail(tail) == "lower" else excess.clip(min=0.0)) / mass


def _sorted_with_weights(values: ArrayLike, weights: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    v = np.asarray(values, dtype=np.float64).ravel()
    if v.size == 0:
        raise ValueError("a tail statistic needs at least one value")
    if not np.isfinite(v).all():
        raise ValueError(f"tail statistics need finite values; {int((~np.isfinite(v)).sum())} are not")
    w = np.full(v.size, 1.0) if weights is None else np.asarray(weights, dtype=np.float64).ravel()
    if w.shape != v.shape:
        raise ValueError(f"got {v.size} values and {w.size} weights")
    with np.errstate(over="ignore"):
        total = w.sum()
    if not (w >= 0).all() or not 0 < total < np.inf:
        raise ValueError("weights must not be negative, and their sum must be positive and finite")
    order = np.argsort(v, kind="stable")
    return v[order], w[order] / total


def quantile(values: ArrayLike, level: float, weights: ArrayLike | None = None) -> float:
    """Smallest value whose cumulative probability reaches ``level`` (the left-continuous inverse).

    Args:
        level: in (0, 1].
        weights: not negative, of the shape of ``values``; equal if not given.

    Raises:
        ValueError: for a level outside of (0, 1], values that are none or not finite, or such weights.
    """
    _check_mass(level)
    v, w = _sorted_with_weights(values, weights)
    index = int(np.searchsorted(np.cumsum(w), level * (1 - 1e-12)))
    return float(v[min(index, v.size - 1)])


def lower_tail_mean(values: ArrayLike, mass: float, weights: ArrayLike | None = None) -> float:
    """Mean of the worst share ``mass`` in (0, 1] of the values; see :func:`quantile` for the rest."""
    _check_mass(mass)
    v, w = _sorted_with_weights(values, weights)
    before = np.concatenate([[0.0], np.cumsum(w)[:-1]])
    inside = np.clip(mass - before, 0.0, w)
    return float(np.dot(inside / inside.sum(), v))


def upper_tail_mean(values: ArrayLike, mass: float, weights: ArrayLike | None = None) -> float:
    """Mean of the best share ``mass`` in (0, 1] of the values."""
    return -lower_tail_mean(-np.asarray(values, dtype=np.float64), mass, weights)


def tail_mean(values: ArrayLike, mass: float, tail: Tail | str, weights: ArrayLike | None = None) -> float:
    """Mean of the share ``mass`` in (0, 1] of one tail of the values."""
    return (lower_tail_mean if read_tail(tail) == "lower" else upper_tail_mean)(values, mass, weights)


def dominance_violation(values: ArrayLike, reference: ArrayLike) -> float:
    """How far ``values`` are from dominating ``reference`` at first order, in [0, 1].

    The largest amount by which the share of ``values`` at or below any threshold exceeds that of
    ``reference``: zero if every quantile is at least as high. For N and M samples of one distribution it is
    of the order ``sqrt(1 / N + 1 / M)`` (the one-sided Kolmogorov-Smirnov statistic).

    Raises:
        ValueError: if either side has no value, or one that is not finite.
    """
    a, b = (np.sort(np.asarray(v, dtype=np.float64).ravel()) for v in (values, reference))
    if not (a.size and b.size):
        raise ValueError("dominance needs at least one value on either side")
    if bad := int((~np.isfinite(a)).sum() + (~np.isfinite(b)).sum()):
        raise ValueError(f"dominance needs finite values; {bad} are not")
    below_a = np.arange(1, a.size + 1) / a.size
    below_b = np.searchsorted(b, a, side="right") / b.size
    return float(max(0.0, (below_a - below_b).max()))


def _check_mass(mass: float) -> None:
    if not 0 < mass <= 1:
        raise ValueError(f"a tail mass must lie in (0, 1], got {mass}")
