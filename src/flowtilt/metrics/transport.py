"""Exact optimal transport between samples and between finite distributions, by POT's network simplex.

The ground metric is ``d(x, y) = sqrt(sum_i w_i (x_i - y_i)^2)`` with positive weights: moves along a
coordinate of larger weight are dearer. This module stays clear of torch: POT itself would load it,
which takes longer than the transport of a thousand samples.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike

LARGEST_PROBLEM = 25_000_000
"""Largest number of pairs: 5,000 samples on either side, whose distances take 200 MB."""

LARGEST_COUNT_OF_PIVOTS = 100_000_000


class TransportError(ValueError):
    """An optimal transport problem that cannot be solved; the message says why."""


@dataclass(frozen=True)
class Transport:
    """A solved Kantorovich problem.

    Attributes:
        potential: Kantorovich potential at the points of the first distribution, (n,): the derivative of the
            value with respect to their probabilities, up to a constant.
    """

    value: float
    potential: np.ndarray


@cache
def _pot() -> ModuleType:
    """POT, without torch behind it unless the process has torch anyway."""
    switch = "POT_BACKEND_DISABLE_PYTORCH"
    hidden = "torch" not in sys.modules and switch not in os.environ
    if hidden:
        os.environ[switch] = "1"
    try:
        import ot
    finally:
        if hidden:
            del os.environ[switch]
    return ot


def check_metric(weights: Sequence[float], dimension: int | None = None) -> np.ndarray:
    """The weights of a ground metric as an array, (d,).

    Raises:
        ValueError: unless all are positive and finite, and as many as the ``dimension`` if given.
    """
    array = np.asarray(weights, dtype=np.float64).ravel()
    if array.size == 0 or not (array > 0).all() or not np.isfinite(array).all():
        raise ValueError(f"the weights of a ground metric must be positive and finite, got {list(weights)}")
    if dimension is not None and array.size != dimension:
        raise ValueError(
            f"the ground metric has {array.size} weights and the samples have {dimension} coordinates; "
            "give one weight for each coordinate"
        )
    return array


def ground_distances(x: ArrayLike, y: ArrayLike, weights: Sequence[float] | None = None) -> np.ndarray:
    """Distances between all pairs of samples ``x`` (n, ...) and ``y`` (m, ...), (n, m), in float64.

    Args:
        weights: of the coordinates, all 1 if not given.

    Raises:
        TransportError: for samples that are none, not finite, too many or too far apart.
        ValueError: for weights that are not positive, or not one for each coordinate.
    """
    from scipy.spatial.distance import cdist  # takes a while, and few of the jobs that come by here need it

    a, b = (_flat(np.atleast_1d(np.asarray(v, dtype=np.float64))) for v in (x, y))
    if not (len(a) and len(b)):
        raise TransportError("optimal transport needs at least one sample on either side")
    if len(a) * len(b) > LARGEST_PROBLEM:
        raise TransportError(
            f"optimal transport of {len(a)} to {len(b)} samples has {len(a) * len(b):,} pairs, "
            f"more than {LARGEST_PROBLEM:,}; give it fewer samples"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise TransportError("optimal transport needs finite samples")
    if a.shape[1] != b.shape[1]:
        raise TransportError(f"samples of {a.shape[1]} and of {b.shape[1]} coordinates have no distances")
    roots = np.sqrt(check_metric([1.0] * a.shape[1] if weights is None else weights, a.shape[1]))
    with np.errstate(over="ignore"):
        found = cdist(a * roots, b * roots)
    if not np.isfinite(found).all():
        raise TransportError("samples are too far apart for optimal transport: distances overflow")
    return found


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def sliced_wasserstein(
    x: ArrayLike,
    y: ArrayLike,
    p: ArrayLike | None = None,
    q: ArrayLike | None = None,
    directions: int = 60,
) -> float:
    """The sliced Wasserstein distance of order 2 between finite distributions in the plane.

    That is the root mean over directions of the squared W2 between the projections on them, each exact by
    sorting (Bonneel et al. 2015). Directions are spaced evenly over the half circle: nothing is random.

    Args:
        x: points of one distribution, (n, 2).
        y: of the other, (m, 2).
        p: probabilities of ``x``, (n,); equal if not given.
        q: of ``y``, (m,).
        directions: how many, at least one.

    Raises:
        TransportError: for points that are none, not finite, too far apart or not in the plane, for weights
            that are no probabilities of them, or without directions.
    """
    if directions < 1:
        raise TransportError(f"a sliced distance needs at least one direction, got {directions}")
    sides = []
    for points, weights in ((x, p), (y, q)):
        a = np.asarray(points, dtype=np.float64)
        if a.ndim != 2 or a.shape[1] != 2 or not len(a) or not np.isfinite(a).all():
            raise TransportError(f"a sliced distance needs finite points (n, 2), at least one; got {a.shape}")
        w = np.full(len(a), 1 / len(a)) if weights is None else np.asarray(weights, dtype=np.float64)
        if w.shape != a.shape[:1] or not (w >= 0).all() or abs(w.sum() - 1) > 1e-6:
            raise TransportError(f"a sliced distance needs one probability a point, of sum 1; got {w.shape}")
        sides.append((a, w / w.sum()))
    squares = []
    for angle in np.pi * (np.arange(directions) + 0.5) / directions:
        direction = np.array([np.cos(angle), np.sin(angle)])
        with np.errstate(over="ignore", invalid="ignore"):
            squares.append(_squared_on_a_line(*((a @ direction, w) for a, w in sides)))
    if not np.isfinite(mean := float(np.mean(squares))):
        raise TransportError("the points are too far apart for a sliced distance; rescale them")
    return math.sqrt(mean)


def _squared_on_a_line(*sides: tuple[np.ndarray, np.ndarray]) -> float:
    """Squared W2 of two finite distributions on a line, by their quantile functions."""
    ordered = []
    for values, weights in sides:
        order = np.argsort(values, kind="stable")
        ordered.append((values[order], np.cumsum(weights[order])))
    ends = np.sort(np.concatenate([cumulative for _, cumulative in ordered]))
    widths = np.diff(ends, prepend=0.0)
    middles = ends - 0.5 * widths
    u, v = (
        values[np.searchsorted(cumulative, middles).clip(max=len(values) - 1)]
        for values, cumulative in ordered
    )
    return float(widths @ (u - v) ** 2)


def kantorovich(cost: np.ndarray, p: np.ndarray, q: np.ndarray) -> Transport:
    """Optimal transport of ``p`` to ``q`` with its Kantorovich potential, both exact.

    Between two sets of samples, with equal probabilities, it is that of their *empirical* distributions. With
    N samples its cost lies above that of the distributions behind them, by the order of ``N^(-1/2)`` on a
    line and in the plane (up to a logarithm), ``N^(-1/d)`` beyond. Time grows between the second and the
    third power of the number of samples.

    Probabilities below 1e-15 are dropped, which the solver cannot tell from rounding. With the dual
    variables v of ``q``, the potential is their c-transform ``min_j cost_ij - v_j``: defined at
    points without mass too, and 1-Lipschitz where the cost is a distance.

    Args:
        cost: of each pair, (n, m).
        p: probabilities, (n,).
        q: probabilities, (m,).

    Raises:
        TransportError: if costs are not finite, these are not probabilities, or the solver does not finish.
    """
    if cost.shape != (len(p), len(q)) or not np.isfinite(cost).all():
        raise TransportError(
            f"optimal transport needs finite costs of each pair, ({len(p)}, {len(q)}); got {cost.shape} and "
            f"{int((~np.isfinite(cost)).sum())} that are not finite"
        )
    for distribution in (p, q):
        if not (abs(distribution.sum() - 1) < 1e-6 and (distribution >= -1e-15).all()):
            raise TransportError(
                "optimal transport is of probabilities, which sum to one and are not negative; got a sum of "
                f"{distribution.sum()} and a smallest one of {distribution.min(initial=np.inf)}"
            )
    rows, columns = p > 1e-15, q > 1e-15
    from_p, to_q = p[rows] / p[rows].sum(), q[columns] / q[columns].sum()
    between = np.ascontiguousarray(cost[np.ix_(rows, columns)])
    _, log = _pot().emd(from_p, to_q, between, numItermax=LARGEST_COUNT_OF_PIVOTS, log=True)
    _check(log)
    return Transport(float(log["cost"]), (cost[:, columns] - log["v"]).min(axis=1))


def _check(log: dict[str, object]) -> None:
    if log["warning"] is not None:
        raise TransportError(f"the network simplex did not finish: {log['warning']}; give it fewer samples")
