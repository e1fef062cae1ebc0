"""Thresholds of KL-regularised tail means, from an offline batch of rewards.

KL-regularised tail means have one-dimensional duals (Wang et al. 2026). With rewards ``r_i`` of
pretrained samples, weights ``w_i`` that sum to 1 and the mass ``m`` of the tail,

- upper tail: ``min_t  t + alpha log sum_i w_i exp((r_i - t)_+ / (alpha m))``, convex in t;
- lower tail: ``max_t  t + alpha log sum_i w_i exp(-(t - r_i)_+ / (alpha m))``, convex between
  neighbouring rewards, so that a maximiser is one of them.

Where samples have contexts (numbers of atoms, prompts, modes), whose probabilities ``pi_c`` no fine-tuning
changes, each context has a normaliser of its own: ``alpha log sum_i w_i exp(..)`` becomes
``alpha sum_c pi_c log E[exp(..) | c]``, in which ``t`` is still one threshold for all. A sum of convex
functions is convex: what is said of ``t`` holds as before. Weights that are normalised over all contexts
together would promise mass that a model cannot move, and put the threshold where no model gets.

A reward that is NaN is that of an evaluation that failed: it is left out, as if it had not been drawn, and
the log says how many were. Everything is computed in the log domain: neither extreme ``alpha`` nor extreme
mass overflows. This module stays clear of torch: a threshold takes less time than importing it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flowtilt.ranges import NOT_NEGATIVE, at_least, check_value
from flowtilt.words import Tail, read_tail

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _SortedBatch:
    """Rewards in rising order with log weights and the exponent scale ``alpha m``.

    Attributes:
        rewards: (N,).
        log_weights: of the rewards, of sum 1 before the logarithm, (N,).
        alpha: KL weight.
        scale: of the exponents.
        share: probability of the context whose rewards these are.
    """

    rewards: np.ndarray
    log_weights: np.ndarray
    alpha: float
    scale: float
    share: float = 1.0


def _prepare(
    rewards: ArrayLike,
    alpha: float,
    mass: float,
    weights: ArrayLike | None,
    contexts: ArrayLike | None = None,
) -> list[_SortedBatch]:
    """The rewards of each context, in rising order."""
    r = np.asarray(rewards, dtype=np.float64).ravel()
    if r.size == 0:
        raise ValueError("a threshold needs at least one reward")
    if np.isinf(r).any():
        raise ValueError(f"thresholds need finite rewards; {int(np.isinf(r).sum())} of {r.size} are not")
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if not 0 < mass < 1:
        raise ValueError(f"the mass of the tail must lie in (0, 1), got {mass}")
    w = np.full(r.size, 1.0) if weights is None else np.asarray(weights, dtype=np.float64).ravel()
    if w.shape != r.shape:
        raise ValueError(f"got {r.size} rewards and {w.size} weights")
    if not (w >= 0).all() or not 0 < w.sum() < np.inf:
        raise ValueError("weights must not be negative, and their sum must be positive and finite")
    group = np.zeros(r.size, dtype=np.int64)
    if contexts is not None:
        group = np.unique(np.asarray(contexts).ravel(), return_inverse=True)[1]
    if group.shape != r.shape:
        raise ValueError(f"got {r.size} rewards and {group.size} contexts")
    drawn = np.bincount(group, w)  # what failed of a context does not make it rarer
    if (failed := np.isnan(r)).any():
        logger.warning("a threshold leaves out %d of %d rewards, which failed", failed.sum(), r.size)
    kept = ~failed & (w > 0)
    if not kept.any():
        raise ValueError("a threshold needs at least one reward that has a value and weight")
    r, w, group = r[kept], w[kept], group[kept]
    # Beyond these bounds exponents would overflow or vanish, and the limit is reached long before.
    spread = max(float(r.max() - r.min()), np.finfo(np.float64).tiny)
    scale = max(alpha * mass, 1e-290 * spread, np.finfo(np.float64).tiny)
    if scale > 1e20 * spread:
        scale = 1e20 * spread
        alpha = scale / mass
    order = np.argsort(r, kind="stable")
    r, w, group = r[order], w[order], group[order]
    held, batches = np.flatnonzero(np.bincount(group)), []
    for own in held:
        of_own = slice(None) if len(held) == 1 else group == own
        logs = np.log(w[of_own] / w[of_own].sum())
        batches.append(_SortedBatch(r[of_own], logs, alpha, scale, drawn[own] / drawn[held].sum()))
    return batches


def dual_objective(
    t: float,
    rewards: ArrayLike,
    alpha: float,
    mass: float,
    tail: Tail,
    weights: ArrayLike | None = None,
    contexts: ArrayLike | None = None,
) -> float:
    """The dual objective of one tail at the threshold ``t``, in units of the reward.

    All other arguments are those of :func:`threshold`.
    """
    cut = np.minimum if read_tail(tail) == "lower" else np.maximum
    value = t
    for batch in _prepare(rewards, alpha, mass, weights, contexts):
        exponents = cut(batch.rewards - t, 0.0) / batch.scale
        value += batch.share * batch.alpha * _log_mean_exp(exponents, batch.log_weights)
    return float(value)


def _log_mean_exp(exponents: np.ndarray, log_weights: np.ndarray) -> float:
    """``log sum_i w_i exp(e_i)``, also where it is small and a large alpha would magnify its rounding."""
    if exponents.max() < 700:  # the exponential does not overflow
        change = float(np.dot(np.exp(log_weights), np.expm1(exponents)))
        if change > -0.5:
            return float(np.log1p(change))
    return _logsumexp(exponents + log_weights)


def _logsumexp(a: np.ndarray) -> float:
    top = a.max()
    return float(top + np.log(np.exp(a - top).sum()))


def threshold(
    rewards: ArrayLike,
    alpha: float,
    mass: float,
    tail: Tail,
    weights: ArrayLike | None = None,
    contexts: ArrayLike | None = None,
) -> float:
    """Exact optimal threshold of one tail, in O(N log N); on the lower tail times the number of contexts.

    Args:
        rewards: of pretrained samples, (N,).
        alpha: KL weight, positive.
        mass: of the tail, in (0, 1): the papers' b for the lower tail, 1 - b for the upper.
        tail: the tail, ``lower`` (or ``left``) or ``upper`` (or ``right``).
        weights: of the samples, not negative; equal if not given.
        contexts: a number for each sample, (N,), if they have contexts whose probabilities are given: those
            of the weights, failed samples included.

    Raises:
        ValueError: for parameters out of range, another tail, rewards that are infinite, or none that has a
            value.
    """
    tail, batches = read_tail(tail), _prepare(rewards, alpha, mass, weights, contexts)
    if tail == "lower":
        return _lower_threshold(batches)
    return _upper_threshold(batches[0], mass) if len(batches) == 1 else _upper_common(batches, mass)


def _lower_threshold(batches: list[_SortedBatch]) -> float:
    """The best of all rewards."""
    rewards = np.unique(np.concatenate([batch.rewards for batch in batches]))
    with np.errstate(over="ignore"):  # minus infinity is the right value of a hopeless threshold
        means = sum(batch.share * _lower_log_means(batch, rewards) for batch in batches)
        objective = rewards + batches[0].alpha * means
    return float(rewards[int(np.argmax(objective))])


def _lower_log_means(batch: _SortedBatch, at: np.ndarray) -> np.ndarray:
    """``log sum_i w_i exp(-(t - r_i)_+ / scale)`` at every threshold ``t`` of ``at``, (m,).

    Sums over the rewards up to each come from windows of doubling length, so that all exponents are
    differences of rewards, and nothing cancels: neither the log of what is kept of the weight, nor
    what is lost of it, which is the accurate one where little is. Up to the next reward they fall
    by one factor for all.
    """
    r, log_kept = batch.rewards, batch.log_weights.copy()
    weight, lost = np.exp(log_kept), np.zeros_like(r)
    span = 1
    while span < r.size:
        drop = (r[span:] - r[:-span]) / batch.scale
        log_kept[span:] = np.logaddexp(log_kept[span:], log_kept[:-span] - drop)
        lost[span:] += np.exp(-drop) * lost[:-span] + np.expm1(-drop) * weight[:-span]
        weight[span:] += weight[:-span]
        span *= 2
    log_above = np.full_like(r, -np.inf)
    log_above[:-1] = np.logaddexp.accumulate(batch.log_weights[::-1])[-2::-1]
    last = np.searchsorted(r, at, side="right") - 1  # the last reward that is not above t
    drop = np.where(last < 0, 0.0, (at - r[last]) / batch.scale)
    lost = np.exp(-drop) * lost[last] + np.expm1(-drop) * weight[last]
    means = np.logaddexp(log_kept[last] - drop, log_above[last])
    means = np.where(lost > -0.5, np.log1p(np.maximum(lost, -0.5)), means)
    return np.where(last < 0, 0.0, means)  # below all rewards nothing is cut


def _upper_threshold(batch: _SortedBatch, mass: float) -> float:
    """The point where the tilted distribution has exactly ``mass`` above the threshold, or a kink.

    With the rewards after ``j`` active, the slope of the dual vanishes at
    ``scale (log sum_{i > j} w_i exp(r_i / scale) - log(mass / (1 - mass)) - log sum_{i <= j} w_i)``.
    The dual is convex: the minimiser lies before the first reward that is above its own root.
    """
    centred = (batch.rewards - batch.rewards[-1]) / batch.scale
    log_active = np.full_like(centred, -np.inf)
    log_active[:-1] = np.logaddexp.accumulate((batch.log_weights + centred)[::-1])[-2::-1]
    log_inactive = np.logaddexp.accumulate(batch.log_weights)
    roots = log_active - np.log(mass) + np.log1p(-mass) - log_inactive
    first = int(np.argmax(roots <= centred))
    if first == 0:
        return float(batch.rewards[0])
    root = batch.rewards[-1] + batch.scale * roots[first - 1]
    return float(min(max(root, batch.rewards[first - 1]), batch.rewards[first]))


def _upper_common(batches: list[_SortedBatch], mass: float) -> float:
    """The same for several contexts: the root of ``sum_c pi_c P_c(r > t) = mass``, or a kink.

    Tilted, the mass of a context above t is ``1 / (1 + exp(t / scale + b_c - a_c))``, where b_c is the log
    weight of the rewards up to t, and a_c is ``log sum w_i exp(r_i / scale)`` over those above. It falls in t
    as long as none is passed, and with each that is.
    """
    rewards = np.unique(np.concatenate([batch.rewards for batch in batches]))
    shares, scale = np.array([batch.share for batch in batches]), batches[0].scale

    def logs(passed: float) -> tuple[np.ndarray, np.ndarray]:
        """a_c of rewards less ``passed``, and b_c, for each context with the rewards up to there passed."""
        above, below = np.full(len(batches), -np.inf), np.full(len(batches), -np.inf)
        for c, batch in enumerate(batches):
            split = int(np.searchsorted(batch.rewards, passed, side="right"))
            exponents = (batch.rewards[split:] - passed) / scale + batch.log_weights[split:]
            above[c] = _logsumexp(exponents) if exponents.size else -np.inf
            below[c] = _logsumexp(batch.log_weights[:split]) if split else -np.inf
        return above, below

    def tail(log_odds: np.ndarray) -> float:
        """Mass above the threshold, from ``b_c - a_c`` there."""
        with np.errstate(over="ignore"):
            return float(shares @ (1 / (1 + np.exp(log_odds))))

    def beyond(index: int) -> bool:
        """Whether there is more than ``mass`` above a reward."""
        above, below = logs(rewards[index])
        return tail(below - above) > mass

    low, high = -1, len(rewards) - 1  # above the best reward there is nothing
    while high - low > 1:
        between = (low + high) // 2
        low, high = (between, high) if beyond(between) else (low, between)
    if low < 0:
        return float(rewards[0])
    above, below = logs(rewards[low])
    span = float(rewards[high] - rewards[low])
    if tail(below - above + span / scale) >= mass:  # the mass falls below only as the next reward is passed
        return float(rewards[high])
    left, right = 0.0, span
    while left < (half := 0.5 * (left + right)) < right:
        left, right = (half, right) if tail(below - above + half / scale) > mass else (left, half)
    return float(rewards[low] + right)


def descend_threshold(
    rewards: ArrayLike, alpha: float, mass: float, updates: int = 200, tolerance: float = 1e-10
) -> tuple[float, int]:
    """Upper-tail threshold by gradient descent on the convex dual, as in the paper.

    The gradient is normalised to its sign, since slopes differ by orders of magnitude from one side
    of a kink to the other. The step starts at the spread of the rewards and is halved whenever the
    sign changes; the descent ends at ``tolerance`` times the spread.

    Returns:
        The threshold, and the number of updates taken.
    """
    check_value("the updates of a descent", updates, at_least(0))
    check_value("the tolerance of a descent", tolerance, NOT_NEGATIVE)
    (batch,) = _prepare(rewards, alpha, mass, None)
    spread = float(np.ptp(batch.rewards))
    t, step, previous = float(batch.rewards.mean()), spread, 0.0
    for update in range(updates):
        slope = _upper_slope(batch, t, mass)
        if slope == 0 or step <= tolerance * spread:
            return t, update
        if slope * previous < 0:
            step *= 0.5
        t, previous = t - step * float(np.sign(slope)), float(np.sign(slope))
    return t, updates


def _upper_slope(batch: _SortedBatch, t: float, mass: float) -> float:
    """Derivative of the upper dual at ``t``: 1 - (tilted weight above t) / mass."""
    exponents = batch.log_weights + np.maximum(batch.rewards - t, 0.0) / batch.scale
    active = batch.rewards > t
    if not active.any():
        return 1.0
    return 1.0 - np.exp(_logsumexp(exponents[active]) - _logsumexp(exponents)) / mass


def active_share(rewards: ArrayLike, at: float, tail: Tail) -> float:
    """Share of samples on which the hinge at ``at`` has a gradient, of those whose reward has not failed."""
    r = np.asarray(rewards, dtype=np.float64)
    r = r[~np.isnan(r)]
    if not r.size:
        raise ValueError("an active share needs at least one reward that has a value")
    return float(np.mean(r < at if read_tail(tail) == "lower" else r > at))
