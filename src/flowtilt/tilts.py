"""Exponential tilts of a bank of samples, normalised within each context.

What a sample is conditional on (a number of atoms, a prompt, a mode) has a distribution of its own, which
no fine-tuning changes. With probabilities ``pi_c`` of the contexts, the maximiser of ``E f - alpha KL`` is

    p(x | c)  proportional to  p_base(x | c) exp(f(x) / alpha),    for each context c by itself,

each with its own normaliser. Weights of a bank that are normalised over all contexts together move mass from
one context to another: they promise a mean of ``f`` that a model with given contexts cannot reach, by

    alpha (log sum_c pi_c Z_c - sum_c pi_c log Z_c)  in the optimal value,    Z_c = E[exp(f / alpha) | c].

So everything here is per context: weights, effective sample sizes, what they promise, and what they cost.

This module stays clear of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from flowtilt.ranges import COUNT, MASS, check_value

LEAST = 10
"""Samples from which a context has a normaliser of its own; see :meth:`Groups.of`."""


@dataclass(frozen=True)
class Groups:
    """Which samples of a bank have a normaliser in common, and the probability of each group.

    Attributes:
        labels: of the samples, whole numbers from 0, (N,).
        shares: probability of each group, of sum 1, (groups,).
        contexts: how many contexts the groups hold.
        pooled: samples whose group holds more contexts than their own.
    """

    labels: np.ndarray
    shares: np.ndarray
    contexts: int = 1
    pooled: int = 0

    @classmethod
    def single(cls, count: int) -> Groups:
        """All of ``count`` samples together."""
        return cls(np.zeros(count, dtype=np.int64), np.ones(1))

    @classmethod
    def of(cls, contexts: ArrayLike | None, kept: ArrayLike, least: int = 1) -> Groups:
        """The groups of the samples that are kept.

        A context with fewer than ``least`` samples has no normaliser worth the name: the mean of ``n``
        exponentials is off by a share of about ``1 / n`` for every unit of their variance, and one sample
        is not tilted at all. In the order of their numbers, contexts are therefore taken together until they
        hold as many; what is left at the end joins the last group. Neighbours in number should be alike, as
        numbers of atoms are. Within a pool mass may move between contexts: :attr:`pooled` counts its samples.

        A group has the probability with which its contexts were *drawn*, whatever failed of it: what has no
        value is left out of its context, and does not make that context rarer. Only a context of which
        nothing is kept leaves its probability to the others.

        Args:
            contexts: a whole number for each sample that was drawn, (drawn,); None if all have the same.
            kept: which of these are in the bank, in its order, indices (N,).
            least: samples of a group, at least 1.

        Raises:
            ValueError: if no sample is kept, or contexts are not one whole number a sample.
        """
        check_value("the least samples of a group", least, COUNT)
        index = np.asarray(kept, dtype=np.int64)
        if not index.size:
            raise ValueError("a bank needs at least one sample")
        if contexts is None:
            return cls.single(index.size)
        numbers = np.asarray(contexts)
        if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(
                "contexts must be one whole number a sample, "
                f"got {numbers.dtype} of shape {numbers.shape}: give each context a number"
            )
        _, dense = np.unique(numbers, return_inverse=True)
        drawn, held = np.bincount(dense), np.bincount(dense[index], minlength=dense.max() + 1)
        group = _pools(held, least)
        shares = np.bincount(group[held > 0], drawn[held > 0])
        of_group = np.bincount(group[held > 0])
        pooled = held[(held > 0) & (of_group[group] > 1)].sum()
        return cls(group[dense[index]], shares / shares.sum(), int((held > 0).sum()), int(pooled))

    def __len__(self) -> int:
        return len(self.shares)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of the samples before any tilt: equal within a group, (N,)."""
        return (self.shares / np.bincount(self.labels, minlength=len(self)))[self.labels]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of ``values`` (N,) over each group, (groups,)."""
        if len(self) == 1:
            return values.sum(keepdims=True)
        return np.bincount(self.labels, values, minlength=len(self))

    def each(self, values: np.ndarray) -> np.ndarray:
        """What each sample has of ``values`` (groups,) of the groups: (N,), or (1,) for a single group."""
        return values if len(self) == 1 else values[self.labels]

    def log_sums(self, exponents: np.ndarray) -> np.ndarray:
        """``log sum exp`` of ``exponents`` (N,) over each group, (groups,)."""
        top = self.largest(exponents)
        return top + np.log(self.sums(np.exp(exponents - self.each(top))))

    def largest(self, values: np.ndarray) -> np.ndarray:
        """The largest of ``values`` (N,) in each group, (groups,)."""
        if len(self) == 1:
            return values.max(keepdims=True)
        top = np.full(len(self), -np.inf)
        np.maximum.at(top, self.labels, values)
        return top


def _pools(held: np.ndarray, least: int) -> np.ndarray:
    """Group of each context by the number of samples ``held`` in it, whole numbers from 0, (contexts,)."""
    group, inside, last = np.zeros(len(held), dtype=np.int64), 0, 0
    for context, count in enumerate(held):
        if inside >= least:
            last, inside = last + 1, 0
        group[context] = last
        inside += int(count)
    if last and inside < least:
        group[group == last] = last - 1
    return group


@dataclass(frozen=True)
class Tilted:
    """A bank under a tilt.

    Attributes:
        probabilities: of the samples, of sum 1; each group has the probability that it had before, (N,).
        log_weights: log ratios to the probabilities before, (N,).
        kl: what the tilt costs, ``sum_i q_i log(q_i / p_i)``, in nats.
        effective_share: ``1 / sum_i q_i^2 / p_i``, in (0, 1]: effective samples over samples. Over groups
            it is the harmonic mean of their own, weighted by their probabilities: what the variance of means
            follows.
        effective_shares: of each group by itself, (groups,).
        gaining_share: the same of what the tilt *adds*, ``(sum a)^2 / sum a^2 / p`` with ``a = (q - p)_+``. A
            hinge that moves a hundredth of the mass may put it on one sample, and all others hide it.
    """

    probabilities: np.ndarray
    log_weights: np.ndarray
    kl: float
    effective_share: float
    effective_shares: np.ndarray
    gaining_share: float

    def mean(self, values: ArrayLike) -> float:
        """The mean of ``values`` (N,) that the weights promise."""
        return float(self.probabilities @ np.asarray(values, dtype=np.float64))


def tilted(exponents: ArrayLike, groups: Groups, log_p: ArrayLike | None = None) -> Tilted:
    """The bank with probabilities proportional to ``p_i exp(exponents_i)`` within each group.

    Args:
        exponents: of the samples, in nats, finite, (N,).
        groups: of the samples.
        log_p: log probabilities of the samples before, of sum 1 and with some in each group; those of
            the groups if not given.

    Raises:
        ValueError: for exponents that are not one finite number a sample.
    """
    e = np.asarray(exponents, dtype=np.float64)
    if e.shape != groups.labels.shape or not np.isfinite(e).all():
        raise ValueError(
            f"a tilt needs one finite exponent for each of {groups.labels.size} samples, got shape "
            f"{e.shape} with {int((~np.isfinite(e)).sum())} that are not finite"
        )
    e = e - groups.each(groups.largest(e))  # beside large exponents log p would be lost in rounding
    log_p = np.log(groups.probabilities) if log_p is None else np.asarray(log_p, dtype=np.float64)
    log_held = np.log(groups.sums(np.exp(log_p)))
    log_w = e - groups.each(groups.log_sums(log_p + e) - log_held)
    q = np.exp(log_p + log_w)
    spread = groups.sums(np.exp(log_p + 2 * log_w)) / np.exp(log_held)  # E_q[q / p] of each group
    share = 1 / float(np.exp(log_held) @ spread)
    p = np.exp(log_p)
    added = np.maximum(q - p, 0)
    squares = float(np.divide(added**2, p, out=np.zeros_like(p), where=p > 0).sum())
    gaining = float(added.sum()) ** 2 / squares if squares > 0 else 1.0
    return Tilted(q, log_w, float(q @ log_w), share, 1 / spread, gaining)


def strongest(
    exponents: ArrayLike,
    groups: Groups,
    share: float,
    log_p: ArrayLike | None = None,
    most: float = 1.0,
    gaining: float = 0.0,
) -> float:
    """The largest strength ``s`` up to ``most`` at which the tilt by ``s exponents`` keeps its samples.

    That is an effective share of at least ``share``, and of at least ``gaining`` for what it adds. The first
    falls with the strength: for one group it is
    ``exp(2 psi(s) - psi(2 s))`` with psi the cumulant generating function of the exponents, which is convex.
    So the bisection finds it, to twelve digits.

    Args:
        exponents: in nats at strength 1, (N,).
        groups: of the samples.
        share: to be kept, in (0, 1].
        log_p: log probabilities of the samples before, as in :func:`tilted`.
        most: the strength that is wanted, positive.
        gaining: least :attr:`Tilted.gaining_share`; where it is below at any strength, none is kept.
    """
    check_value("the effective share of a tilt", share, MASS)
    e = np.asarray(exponents, dtype=np.float64)

    def keeps(strength: float) -> bool:
        under = tilted(strength * e, groups, log_p)
        return under.effective_share >= share * (1 - 1e-12) and under.gaining_share >= gaining

    if keeps(most):
        return most
    low, high = 0.0, most
    while high > most * 1e-30 and not keeps(high / 16):  # far from 1: find the power first
        high /= 16
    low = high / 16
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
