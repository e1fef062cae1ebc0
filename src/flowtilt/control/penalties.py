"""f-divergence penalties, and the weights that solve a penalised problem on a bank of samples.

On samples with probabilities ``p_i`` and values ``g_i`` the problem

    max over distributions q = w p  of  sum_i q_i g_i - alpha sum_i p_i f(w_i)

is concave. With the convex conjugate ``f*`` its dual is

    min over nu  of  nu + alpha sum_i p_i f*((g_i - nu) / alpha),

and at the optimum ``w_i = (f*)'(s_i)`` at the slope ``s_i = (g_i - nu) / alpha``, where ``nu`` makes
the mean weight 1. With KL these are the weights ``exp(g / alpha)``, normalised: the exponential tilt.
The five penalties are those of the Fenchel-tilting comparison (Bobrin et al. 2026).

Where samples have contexts of given probabilities, q has those of p (see :mod:`flowtilt.tilts`): the problem
is then one for each context, with a ``nu`` of its own.

All of them are of the power family of Cressie and Read (1984), of order k:

    f(w)   = (w^k - k w + k - 1) / (k (k - 1))
    (f*)'(s) = (1 + (k - 1) s)_+^(1 / (k - 1))
    f*(s)  = ((f*)'(s)^k - 1) / k

with ``f(1) = f'(1) = 0``, ``f''(1) = 1``, and the orders 1 and 0 as limits. Everything below is written
in ``log w``, where the conjugate is ``expm1(k log w) / k`` for every order: nothing overflows, and
nothing is lost where weights are near 1 or slopes near the end of their domain.

Orders below 1 bound the slopes. If the values are not bounded above on the base distribution, a larger bank
then puts ever more weight on its best sample instead of approaching a distribution with a density: the
effective sample size shows it.

This module stays clear of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flowtilt.tilts import Groups


@dataclass(frozen=True)
class Penalty:
    """``curvature`` times the power divergence of one order.

    A penalty of curvature c under the weight alpha is the one of curvature 1 under ``c alpha``.

    Attributes:
        order: k of the power family.
        curvature: ``f''(1)``.
    """

    order: float
    curvature: float = 1.0

    def divergence(self, weights: ArrayLike) -> np.ndarray:
        """``f(w)`` for ``w >= 0``, any shape; infinite at 0 for orders of 0 and less."""
        with np.errstate(divide="ignore"):
            return self.curvature * _divergence(self.order, np.log(np.asarray(weights, dtype=np.float64)))

    def weight(self, slopes: ArrayLike) -> np.ndarray:
        """``(f*)'(s)``, any shape; infinite from the end of the domain on, for orders below 1."""
        s = np.asarray(slopes, dtype=np.float64) / self.curvature
        return np.exp(_log_weights(self.order, 0.0, -s))


PENALTIES: dict[str, Penalty] = {
    "kl": Penalty(1.0),
    "pearson": Penalty(2.0),
    "cressie_read_3": Penalty(3.0),
    "reverse_kl": Penalty(0.0),
    "squared_hellinger": Penalty(0.5, curvature=0.5),
}
"""Penalties by name, with f, f* and the weight at slope s:

| name | f(w) | f*(s) | weight |
|---|---|---|---|
| kl | w log w - w + 1 | exp(s) - 1 | exp(s) |
| pearson | (w - 1)^2 / 2 | ((1+s)_+^2 - 1) / 2 | (1+s)_+ |
| cressie_read_3 | (w^3 - 3 w + 2) / 6 | ((1+2s)_+^(3/2) - 1) / 3 | (1+2s)_+^(1/2) |
| reverse_kl | w - 1 - log w | -log(1-s), s < 1 | 1 / (1-s) |
| squared_hellinger | (sqrt(w) - 1)^2 | s / (1-s), s < 1 | 1 / (1-s)^2 |

The squared Hellinger distance in the form that has the weight ``1 / (1-s)^2`` has the curvature
``f''(1) = 1/2``, the others 1: under equal alpha it holds the distribution half as firmly near the base.
"""


def penalty_named(name: str) -> Penalty:
    """A penalty of :data:`PENALTIES`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PENALTIES:
        raise ValueError(f"unknown penalty {name!r}; there are {', '.join(PENALTIES)}")
    return PENALTIES[name]


def _log_weights(order: float, log_top: float, drops: np.ndarray) -> np.ndarray:
    """Log weights of slopes ``s(log_top) - drops``, where ``s(log_top)`` has the log weight ``log_top``."""
    if order == 1:
        return log_top - drops
    k = order - 1
    base = np.exp(k * log_top) - k * drops  # 1 + k s: accurate where it is small
    change = np.expm1(k * log_top) - k * drops  # k s: accurate where that is
    with np.errstate(divide="ignore"):
        far = np.log(np.maximum(base, 0.0))
    return np.where(np.abs(change) < 0.5, np.log1p(np.clip(change, -0.5, 0.5)), far) / k


def _divergence(order: float, log_w: np.ndarray) -> np.ndarray:
    """``f`` with curvature 1; an error of rounding times ``log w``, not times 1."""
    excess = np.expm1(log_w)
    if order == 0:
        return excess - log_w
    if order == 1:
        return np.exp(log_w) * np.maximum(log_w, np.finfo(np.float64).min) - excess
    return (np.expm1(order * log_w) - order * excess) / (order * (order - 1))


def _conjugate(order: float, log_w: np.ndarray) -> np.ndarray:
    """``f*`` with curvature 1, at the slope whose log weight is ``log_w``."""
    return log_w if order == 0 else np.expm1(order * log_w) / order


@dataclass(frozen=True)
class BankWeights:
    """The solution of a penalised problem on a bank.

    Attributes:
        weights: density ratios ``w_i = q_i / p_i`` with mean 1 under p, (N,); 0 where p is.
        probabilities: ``q_i``, (N,).
        nu: normalising constant, in units of the values; over groups the mean of theirs.
        primal: value of the problem at q, in units of the values.
        dual: value of the dual at ``nu``.
        gap: dual minus primal, computed without what they share; not negative but for rounding.
        relative_gap: the gap over the range of the values.
        effective_sample_size: ``(sum q)^2 / sum q^2``, from 1 to N.
        effective_shares: of each group by itself, ``(sum q)^2 / sum q^2 / n``, (groups,).
    """

    weights: np.ndarray
    probabilities: np.ndarray
    nu: float
    primal: float
    dual: float
    gap: float
    relative_gap: float
    effective_sample_size: float
    effective_shares: np.ndarray

    @property
    def kl(self) -> float:
        """``sum_i q_i log(q_i / p_i)``, in nats."""
        held = self.probabilities > 0
        return float(self.probabilities[held] @ np.log(self.weights[held]))


def solve_weights_within(values: ArrayLike, alpha: float, penalty: Penalty, groups: Groups) -> BankWeights:
    """Weights of a bank whose groups of samples keep their probabilities: :func:`solve_weights` in each.

    Args:
        values: of the samples, (N,).
        alpha: weight of the penalty, positive, in units of the values.

    Raises:
        ValueError: as :func:`solve_weights`.
    """
    g = np.asarray(values, dtype=np.float64)
    if len(groups) == 1:
        return solve_weights(g, alpha, penalty)
    weights, parts = np.empty(g.size), []
    order = np.argsort(groups.labels, kind="stable")
    for own in np.split(order, np.cumsum(np.bincount(groups.labels))[:-1]):
        parts.append(solve_weights(g[own], alpha, penalty))
        weights[own] = parts[-1].weights
    q = groups.probabilities * weights
    spread = float(np.ptp(g))
    nu, primal, dual, gap = (
        float(groups.shares @ [getattr(part, name) for part in parts])
        for name in ("nu", "primal", "dual", "gap")
    )
    return BankWeights(
        weights=weights,
        probabilities=q,
        nu=nu,
        primal=primal,
        dual=dual,
        gap=gap,
        relative_gap=gap / spread if spread > 0 else 0.0,
        effective_sample_size=float(q.sum() ** 2 / (q @ q)),
        effective_shares=np.concatenate([part.effective_shares for part in parts]),
    )


def solve_weights(
    values: ArrayLike, alpha: float, penalty: Penalty, probabilities: ArrayLike | None = None
) -> BankWeights:
    """Weights of the bank that solve ``max_q <values, q> - alpha D_f(q || p)``.

    The normalisation is solved by bisection to the last digit in the log weight of the best sample,
    which lies between 0 and minus the log of its probability; a value shared by all drops out.

    Args:
        values: of the samples, (N,).
        alpha: weight of the penalty, positive, in units of the values.
        probabilities: of the samples, not negative; they are normalised, and equal if not given.

    Raises:
        ValueError: for a weight that is not positive and finite, or values or probabilities that
            cannot be used.
    """
    g, every = _checked(values, alpha, probabilities)
    kept, order = every > 0, penalty.order
    p, best, least = every[kept] / every[kept].sum(), float(g[kept].max()), float(g[kept].min())
    with np.errstate(over="ignore"):
        spread = best - least
    if not np.isfinite(spread):
        raise ValueError(f"values from {least} to {best} are too far apart; rescale them")
    # From here on values are drops from the best in [0, 1], and so is alpha in units of their range.
    scale = spread if spread > 0 else 1.0
    falls = (best - g[kept]) / scale
    # Far beyond these bounds lie no other weights, only overflow: the limits are reached long before.
    alpha = float(np.clip(alpha * penalty.curvature / scale, 1e-150, 1e150))
    log_w, log_top = np.zeros_like(falls), 0.0
    if spread > 0:
        log_top = _best_log_weight(order, falls / alpha, p)
        log_w = _log_weights(order, log_top, falls / alpha)
    slope = log_top if order == 1 else float(np.expm1((order - 1) * log_top)) / (order - 1)
    dual = -alpha * slope + alpha * float(p @ _conjugate(order, log_w))
    nu = best - spread * (alpha * slope)

    # What rounding left of the normalisation is divided out, so that q is a distribution.
    log_w = log_w - np.log1p(float(p @ np.expm1(log_w)))
    q = p * np.exp(log_w)
    primal = -float(q @ falls) - alpha * float(p @ _divergence(order, log_w))
    weights, distribution = np.zeros(kept.size), np.zeros(kept.size)
    weights[kept], distribution[kept] = np.exp(log_w), q
    ess = float(q.sum() ** 2 / (q @ q))
    return BankWeights(
        weights=weights,
        probabilities=distribution,
        nu=float(nu),
        primal=best + spread * primal,
        dual=best + spread * dual,
        gap=spread * (dual - primal),
        relative_gap=dual - primal,
        effective_sample_size=ess,
        effective_shares=np.array([ess / q.size]),
    )


def _checked(
    values: ArrayLike, alpha: float, probabilities: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values and probabilities as they can be used, each (N,)."""
    g = np.asarray(values, dtype=np.float64).ravel()
    if g.size == 0:
        raise ValueError("weights need a bank of at least one sample")
    if not np.isfinite(g).all():
        raise ValueError(f"weights need finite values; {int((~np.isfinite(g)).sum())} of {g.size} are not")
    if not 0 < alpha < np.inf:
        raise ValueError(f"the weight of the penalty must be positive and finite, got {alpha}")
    p = np.ones(g.size) if probabilities is None else np.asarray(probabilities, dtype=np.float64).ravel()
    if p.shape != g.shape:
        raise ValueError(f"got {g.size} values and {p.size} probabilities")
    if not (p >= 0).all() or not 0 < p.sum() < np.inf:
        raise ValueError("probabilities must not be negative, and their sum must be positive and finite")
    return g, p


def _best_log_weight(order: float, drops: np.ndarray, p: np.ndarray) -> float:
    """Log weight of the best sample at which the mean weight is 1, by bisection to the last digit.

    Args:
        drops: of the slopes from the best sample's, (N,), not all 0.
        p: positive probabilities, (N,).
    """
    low, high = 0.0, _largest_log_weight(order, drops, p)
    while low < (middle := 0.5 * (low + high)) < high:
        if p @ np.expm1(_log_weights(order, middle, drops)) < 0:
            low = middle
        else:
            high = middle
    return high


def _largest_log_weight(order: float, drops: np.ndarray, p: np.ndarray) -> float:
    """A bound on the best sample's log weight: its mass stays below 1, and so do not all weights."""
    on_top = drops == 0
    mass, rest = float(p[on_top].sum()), float(p[~on_top].sum())
    bound = -np.log(mass) if mass < 0.5 else -np.log1p(-rest)
    # There the least sample's weight is 1, hence every other at least that; outside the domain, infinite.
    with np.errstate(divide="ignore", invalid="ignore"):
        at_least = _log_weights(order, 0.0, -drops.max(keepdims=True))[0]
    return (1 + 1e-6) * float(min(bound, at_least))
