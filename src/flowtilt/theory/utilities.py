"""Concave utilities of a finite distribution that are smooth relative to negative entropy.

A utility F is L_F-smooth relative to negative entropy on a convex set C of distributions if, for p and q in
C,

    D(p, q) := F(q) + <F'(q), p - q> - F(p)  <=  L_F KL(p || q),

and l_F-strongly concave if D(p, q) >= l_F KL(p || q). Both D and KL are the integrals of second
derivatives along the segment from q to p, with the same weight. So it is enough that at every distribution z
of C, and for every v that sums to zero,

    l_F sum v^2 / z  <=  -F''(z)[v, v]  <=  L_F sum v^2 / z:

bounds of generalised eigenvalues, over a *convex* set, are what makes L_F and l_F hold for every pair in
it. Each ``smoothness`` below is such a bound, with its derivation. Ratios D / KL of some pairs are not:
they only show from below how large L_F must be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp

from flowtilt.theory.distributions import excess, kl_divergence


class Utility(ABC):
    """A concave utility F of distributions p on n cells."""

    @abstractmethod
    def value(self, p: np.ndarray) -> float:
        """``F(p)``."""

    @abstractmethod
    def variation(self, p: np.ndarray) -> np.ndarray:
        """First variation ``F'(p)``, (n,)."""

    @abstractmethod
    def divergence(self, log_p: np.ndarray, log_q: np.ndarray) -> float:
        """``D(p, q)`` from log probabilities, computed without cancellation."""

    @abstractmethod
    def curvature(self, p: np.ndarray) -> np.ndarray:
        """``-F''(p)``, (n, n)."""

    @abstractmethod
    def smoothness(self, log_base: np.ndarray, alpha: float) -> float:
        """An L_F that is proven for mirror ascent from ``base`` on ``F - alpha KL(. || base)``."""

    @property
    def strong_concavity(self) -> float:
        """An l_F that is proven on the whole simplex; concavity itself gives zero."""
        return 0.0


@dataclass(frozen=True)
class ExpectedReward(Utility):
    """``E_p[r]``; linear, so that L_F = l_F = 0.

    Attributes:
        reward: (n,).
    """

    reward: np.ndarray

    def value(self, p: np.ndarray) -> float:
        return float(p @ self.reward)

    def variation(self, p: np.ndarray) -> np.ndarray:
        return self.reward

    def divergence(self, log_p: np.ndarray, log_q: np.ndarray) -> float:
        return 0.0

    def curvature(self, p: np.ndarray) -> np.ndarray:
        return np.zeros((p.size, p.size))

    def smoothness(self, log_base: np.ndarray, alpha: float) -> float:
        return 0.0


@dataclass(frozen=True)
class Entropy(Utility):
    """``-weight E_p[log p]``; D is ``weight KL``, so that L_F = l_F = weight."""

    weight: float

    def value(self, p: np.ndarray) -> float:
        return float(-self.weight * p @ np.log(p))

    def variation(self, p: np.ndarray) -> np.ndarray:
        return -self.weight * np.log(p)

    def divergence(self, log_p: np.ndarray, log_q: np.ndarray) -> float:
        return self.weight * kl_divergence(log_p, log_q)

    def curvature(self, p: np.ndarray) -> np.ndarray:
        return np.diag(self.weight / p)

    def smoothness(self, log_base: np.ndarray, alpha: float) -> float:
        return self.weight

    @property
    def strong_concavity(self) -> float:
        return self.weight


@dataclass(frozen=True)
class OptimalDesign(Utility):
    """``weight log det M`` with ``M = E_p[phi phi^T] + ridge I``: D-optimal design.

    ``L_F = weight max_i |phi_i|^2 / (4 ridge)`` on the whole simplex. With ``K_ij = phi_i^T M^-1 phi_j``
    the generalised eigenvalues at z are those of the matrix ``S_ij = sqrt(z_i) K_ij^2 sqrt(z_j)``, which
    has no negative entry. By Schur's test with the vector sqrt(z) they are at most
    ``max_i sum_j K_ij^2 z_j = max_i phi_i^T M^-1 (M - ridge I) M^-1 phi_i``, and the eigenvalues of the
    matrix in between are ``b / (b + ridge)^2 <= 1 / (4 ridge)``.

    Attributes:
        features: phi, (n, d).
        ridge: positive.
        weight: positive.
    """

    features: np.ndarray
    ridge: float
    weight: float

    def _moment(self, p: np.ndarray) -> np.ndarray:
        return (self.features * p[:, None]).T @ self.features + self.ridge * np.eye(self.features.shape[1])

    def value(self, p: np.ndarray) -> float:
        return float(self.weight * np.linalg.slogdet(self._moment(p))[1])

    def variation(self, p: np.ndarray) -> np.ndarray:
        return self.weight * (self.features * np.linalg.solve(self._moment(p), self.features.T).T).sum(1)

    def divergence(self, log_p: np.ndarray, log_q: np.ndarray) -> float:
        """Sum of ``x - log(1 + x)`` over the eigenvalues 1 + x of ``M_p`` relative to ``M_q``."""
        factor = np.linalg.cholesky(self._moment(np.exp(log_q)))
        whitened = np.linalg.solve(factor, self.features.T)
        change = np.exp(log_q) * np.expm1(log_p - log_q)
        relative = np.linalg.eigvalsh((whitened * change) @ whitened.T)
        return float(self.weight * excess(-np.log1p(relative)).sum())

    def curvature(self, p: np.ndarray) -> np.ndarray:
        return self.weight * (self.features @ np.linalg.solve(self._moment(p), self.features.T)) ** 2

    def smoothness(self, log_base: np.ndarray, alpha: float) -> float:
        return float(self.weight * (self.features**2).sum(1).max() / (4 * self.ridge))


@dataclass(frozen=True)
class KernelMatching(Utility):
    """``-weight (p - q)^T K (p - q) / 2``: minus half the squared MMD to a target distribution q.

    ``L_F = weight diam^2 / 4`` with ``diam^2 = max_ij K_ii + K_jj - 2 K_ij``, on the whole simplex, and
    no smaller one holds there. A v that sums to zero is ``|v|_1 / 2`` times a difference of two
    distributions, so that ``v^T K v <= |v|_1^2 diam^2 / 4``, and ``|v|_1^2 <= sum v^2 / z`` by Cauchy and
    Schwarz. Both are equalities at the distribution with half its mass on each of two farthest cells.

    Attributes:
        kernel: K, (n, n), positive semidefinite.
        target: q, (n,).
        weight: positive.
    """

    kernel: np.ndarray
    target: np.ndarray
    weight: float

    def value(self, p: np.ndarray) -> float:
        return float(-0.5 * self.weight * (p - self.target) @ self.kernel @ (p - self.target))

    def variation(self, p: np.ndarray) -> np.ndarray:
        return -self.weight * self.kernel @ (p - self.target)

    def divergence(self, log_p: np.ndarray, log_q: np.ndarray) -> float:
        change = np.exp(log_q) * np.expm1(log_p - log_q)
        return float(0.5 * self.weight * change @ self.kernel @ change)

    def curvature(self, p: np.ndarray) -> np.ndarray:
        return self.weight * self.kernel

    def smoothness(self, log_base: np.ndarray, alpha: float) -> float:
        own = np.diag(self.kernel)
        return float(self.weight * (own[:, None] + own - 2 * self.kernel).max() / 4)


@dataclass(frozen=True)
class LogBarrier(Utility):
    """``E_p[r] + weight log(budget - E_p[c])``: reward under a soft limit of the mean cost.

    On the whole simplex no L_F holds if costs exceed the budget. But steps that ascend stay in the set
    where the objective G is at least its value at the start, and there the mean cost is at most some
    ``m_max`` below the budget. On the convex set ``{E_z c <= m_max}``, with m the mean cost at z,

        -F''(z)[v, v] = weight (sum c v)^2 / (budget - m)^2  <=  L_F sum v^2 / z,
        L_F = weight max_m (c_max - m)(m - c_min) / (budget - m)^2,

    since the generalised eigenvalue is ``weight Var_z(c) / (budget - m)^2`` and a variance is at most
    ``(c_max - m)(m - c_min)`` (Bhatia and Davis 2000). Steps with a KL weight of L_F + alpha cannot
    leave the set: the path of steps from an infinite KL weight down to it ascends while it stays within.

    Attributes:
        reward, cost: (n,).
        weight, budget: positive.

    Raises:
        ValueError: by ``smoothness``, if the mean cost at the start is not below the budget.
    """

    reward: np.ndarray
    cost: np.ndarray
    budget: float
    weight: float

    def _slack(self, p: np.ndarray) -> float:
        return float(self.budget - p @ self.cost)

    def value(self, p: np.ndarray) -> float:
        slack = self._slack(p)
        return float(p @ self.reward + self.weight * np.log(slack)) if slack > 0 else -np.inf

    def variation(self, p: np.ndarray) -> np.ndarray:
        return self.reward - self.weight * self.cost / self._slack(p)

    def divergence(self, log_p: np.ndarray, log_q: np.ndarray) -> float:
        """``weight (x - log(1 + x))`` with 1 + x the ratio of the slacks."""
        q = np.exp(log_q)
        relative = -(q * np.expm1(log_p - log_q)) @ self.cost / self._slack(q)
        if relative <= -1:
            return np.inf
        return float(self.weight * excess(-np.log1p(relative)))

    def curvature(self, p: np.ndarray) -> np.ndarray:
        return self.weight / self._slack(p) ** 2 * np.outer(self.cost, self.cost)

    def smoothness(self, log_base: np.ndarray, alpha: float) -> float:
        low, high = float(self.cost.min()), float(self.cost.max())
        most = self._largest_mean_cost(log_base, alpha)
        # With y = 1 / slack the ratio is (high - budget)(budget - low) y^2 + (...) y - 1: it rises with y,
        # but for an interior maximum if no cost exceeds the budget.
        over, under, y = high - self.budget, self.budget - low, 1 / (self.budget - most)
        if over < 0:
            y = min(y, (under - over) / (-2 * over * under))
        return float(self.weight * (over * under * y**2 + (under - over) * y - 1))

    def _largest_mean_cost(self, log_base: np.ndarray, alpha: float) -> float:
        """An upper bound of the mean cost where ``G >= G(base)``.

        At mean cost m, weak duality bounds ``E r - alpha KL`` by ``k m + alpha log E_base exp((r - k c) /
        alpha)`` for every number k; the barrier adds ``weight log(budget - m)``.
        """
        base = np.exp(log_base)
        if not self._slack(base) > 0:
            raise ValueError(
                f"the barrier is infeasible: the pretrained mean cost {base @ self.cost:.4g} is not below "
                f"budget {self.budget:g}; raise the budget"
            )

        def surplus(m: float) -> float:
            """Upper bound of ``G - G(base)`` at mean cost m, the best over k."""

            def bound(k: float) -> float:
                tilted = logsumexp(log_base + (self.reward - k * self.cost) / alpha)
                return float(k * m + alpha * tilted)

            best = minimize_scalar(bound, bracket=(-1.0, 1.0)).fun
            return float(best + self.weight * np.log(self.budget - m) - self.value(base))

        start = float(base @ self.cost)
        end = min(self.budget, float(self.cost.max()))
        last = end - 1e-9 * (end - start)
        if surplus(last) > 0:
            return last if end == self.budget else end
        return float(brentq(surplus, start, last, xtol=1e-10)) + 1e-9
