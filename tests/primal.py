"""KL-regularised tail means on a small discrete space, solved without the duals that are under test.

The solvers keep their constraints to a tolerance only, and may claim more than any distribution attains. So
each one's distribution is normalised, and the objective evaluated there: never above the maximum, and below
it by the square of the distribution's error.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize


def tail_mean(probabilities, rewards, mass, tail):
    """Mean of the tail of exactly ``mass``, by filling it up from its end."""
    order = np.argsort(rewards if tail == "lower" else -rewards)
    left, total = mass, 0.0
    for i in order:
        taken = min(left, probabilities[i])
        total, left = total + taken * rewards[i], left - taken
    return (total + left * rewards[order[-1]]) / mass


def divergence(q, p):
    return float(np.sum(np.where(q > 0, q * np.log(np.maximum(q, 1e-300) / p), 0.0)))


def objective(q, p, rewards, alpha, mass, tail):
    """Tail mean minus ``alpha`` times the KL divergence from ``p``."""
    return tail_mean(q, rewards, mass, tail) - alpha * divergence(q, p)


def _maximise(p, linear, alpha):
    """The distribution q that maximises ``<linear, q> - alpha KL(q || p)``, by a general convex solver."""

    def negative(q):
        return -(linear @ q) + alpha * np.sum(q * np.log(q / p))

    def slope(q):
        return -linear + alpha * (np.log(q / p) + 1)

    simplex = {"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones_like(q)}
    result = minimize(
        negative,
        p,
        jac=slope,
        method="SLSQP",
        bounds=[(1e-12, 1)] * len(p),
        constraints=[simplex],
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return result.x / result.x.sum()


def best_lower(p, rewards, alpha, mass):
    """The lower tail mean is the largest ``t - E (t - r)_+ / mass`` over t in the rewards.

    Its maximisation over distributions is therefore a concave problem for each t, solved one by one.
    """
    distributions = [_maximise(p, -np.maximum(t - rewards, 0) / mass, alpha) for t in rewards]
    return max(objective(q, p, rewards, alpha, mass, "lower") for q in distributions)


def best_upper(p, rewards, alpha, mass):
    """One concave problem in the distribution q and the part w <= q of it that is the tail, E w = mass."""
    n = len(p)

    def negative(z):
        q, w = z[:n], z[n:]
        return -(rewards @ w) / mass + alpha * np.sum(q * np.log(q / p))

    def slope(z):
        return np.concatenate([alpha * (np.log(z[:n] / p) + 1), -rewards / mass])

    ones, zeros, eye = np.ones(n), np.zeros(n), np.eye(n)
    constraints = [
        {"type": "eq", "fun": lambda z: z[:n].sum() - 1, "jac": lambda z: np.concatenate([ones, zeros])},
        {"type": "eq", "fun": lambda z: z[n:].sum() - mass, "jac": lambda z: np.concatenate([zeros, ones])},
        {"type": "ineq", "fun": lambda z: z[:n] - z[n:], "jac": lambda z: np.hstack([eye, -eye])},
    ]
    result = minimize(
        negative,
        np.concatenate([p, mass * p]),
        jac=slope,
        method="SLSQP",
        bounds=[(1e-12, 1)] * n + [(0, 1)] * n,
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    distribution = result.x[:n] / result.x[:n].sum()
    return objective(distribution, p, rewards, alpha, mass, "upper")


def best(p, rewards, alpha, mass, tail):
    """Maximum of :func:`objective` over distributions."""
    return (best_lower if tail == "lower" else best_upper)(p, rewards, alpha, mass)
