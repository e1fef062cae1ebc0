"""Exact mirror ascent against its convergence bounds (De Santi et al. 2025, section 5).

The problem is ``max_p G(p) = F(p) - alpha KL(p || p_0)`` on finitely many cells, with F concave. If G is
L-smooth and l-strongly concave relative to negative entropy, and each step maximises
``<G'(p_k), p> - L KL(p || p_k)``, then with ``D = KL(p* || p_0)``

    G(p*) - G(p_K)  <=  l D / ((1 - l/L)^-K - 1)  <=  (L - l) D / K

(Lu, Freund and Nesterov 2018, theorem 3.1; at l = 0 the first bound is L D / K, at l = L both are zero
and one step arrives). The proof sums, with weights (1 - l/L)^-(k+1), the inequalities

    G(p*) - G(p_{k+1})  <=  (L - l) KL(p* || p_k) - L KL(p* || p_{k+1}),

and uses smoothness only between successive iterates and strong concavity only between the optimum and
the iterates. Hence two ways to make the bounds theorems:

- *proven*: L = L_F + alpha and l = l_F + alpha, with constants that hold for all distributions which the run
  can reach, known before it (:mod:`flowtilt.theory.utilities`);
- *measured*: L from the largest generalised eigenvalue at distributions between start and optimum, l from the
  smallest ratio of divergences between the optimum and the iterates. This is verified after the run, on
  just the pairs that the proof uses, and then the bounds are theorems about this run.

Ratios over other pairs of distributions are reported as observed; no bound rests on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh

from flowtilt.pipeline.theory.config import MirrorDescentConfig, UtilityConfig
from flowtilt.seeding import seed_of
from flowtilt.theory.distributions import gaussian_mixture, kl_divergence, normalise, square_grid
from flowtilt.theory.utilities import (
    Entropy,
    ExpectedReward,
    KernelMatching,
    LogBarrier,
    OptimalDesign,
    Utility,
)

LOG_ERROR = 1e-13
"""Error of a log probability: some 500 units in the last place of 1. A distribution that is off by so much is
off in G by at most about ``L LOG_ERROR^2 / 2``; gaps below ``L LOG_ERROR^2`` count as zero."""

FIT_ABOVE = 1e4
"""Rates are fitted to gaps so many times that large: the optimum's own error then changes them by 1 %."""

SMALLEST_PAIR = 1e-16
"""Divergence below which a pair of distributions is too close for a ratio: it is then known to 1e-5 only."""


@dataclass(frozen=True)
class Problem:
    """``max_p F(p) - alpha KL(p || base)`` on n cells.

    Attributes:
        alpha: KL weight, positive.
        log_base: log probabilities of the pretrained distribution, (n,).
    """

    utility: Utility
    alpha: float
    log_base: np.ndarray

    def value(self, log_p: np.ndarray) -> float:
        """``G(p)``."""
        return self.utility.value(np.exp(log_p)) - self.alpha * kl_divergence(log_p, self.log_base)

    def variation(self, log_p: np.ndarray) -> np.ndarray:
        """First variation of G up to a constant, (n,)."""
        return self.utility.variation(np.exp(log_p)) - self.alpha * (log_p - self.log_base)

    def divergence(self, log_p: np.ndarray, log_q: np.ndarray) -> float:
        """``G(q) + <G'(q), p - q> - G(p)``; at an optimum q it is the gap ``G(q) - G(p)``."""
        return self.utility.divergence(log_p, log_q) + self.alpha * kl_divergence(log_p, log_q)

    def certificate(self, log_p: np.ndarray) -> float:
        """An upper bound of ``G(p*) - G(p)``.

        F lies below its tangent at p, and the tangent's regularised maximum has a closed form: the tilt
        of the base by ``F'(p) / alpha``. The duality gap is ``alpha KL(p || tilt)``.
        """
        tilt = normalise(self.log_base + self.utility.variation(np.exp(log_p)) / self.alpha)
        return self.alpha * kl_divergence(log_p, tilt)

    def step(self, log_p: np.ndarray, weight: float) -> np.ndarray:
        """The distribution that maximises ``<G'(p), q> - weight KL(q || p)``."""
        return normalise(log_p + self.variation(log_p) / weight)

    def ascend(self, weight: float, iterations: int) -> list[np.ndarray]:
        """Mirror ascent from the base: the iterates 0..K as log probabilities."""
        iterates = [self.log_base]
        for _ in range(iterations):
            iterates.append(self.step(iterates[-1], weight))
        return iterates

    def optimum(self, tolerance: float = 1e-24, steps: int = 100) -> np.ndarray:
        """The maximiser of G by Newton's method, which shares no step with mirror ascent.

        Solves ``u = log base + F'(p) / alpha + const`` for u = log p. With C = diag(p) - p p^T and the
        residual r, the Newton direction is ``(I - F'' C / alpha)^-1 r``, and the slope of G along it is
        ``alpha r^T C (I - F'' C / alpha)^-1 r >= 0``. Steps are halved until G does not fall.

        Raises:
            ArithmeticError: if the certificate stays above ``tolerance``.
        """
        log_p = self.log_base
        for _ in range(steps):
            if self.certificate(log_p) <= tolerance * self.alpha:
                return self._newton_step(log_p)  # one more squares what error is left
            log_p = self._newton_step(log_p)
        raise ArithmeticError(
            f"Newton's method left a duality gap of {self.certificate(log_p):.3g} after {steps} steps; "
            "lower the utility's weight or raise alpha"
        )

    def _newton_step(self, log_p: np.ndarray) -> np.ndarray:
        p = np.exp(log_p)
        residual = self.log_base + self.utility.variation(p) / self.alpha - log_p
        curved = self.utility.curvature(p)
        jacobian = np.eye(p.size) + (curved * p - np.outer(curved @ p, p)) / self.alpha
        direction = np.linalg.solve(jacobian, residual - p @ residual)
        before, length = self.value(log_p), 1.0
        while length > 1e-6:
            trial = normalise(log_p + length * direction)
            # Near the optimum G does not change in its last digits, and the full step is right.
            if self.value(trial) >= before - 1e-13 * max(1.0, abs(before)):
                return trial
            length /= 2
        return self.step(log_p, self.utility.smoothness(self.log_base, self.alpha) + self.alpha)


def relative_curvature(problem: Problem, log_p: np.ndarray) -> tuple[float, float]:
    """Smallest and largest generalised eigenvalue of ``-G''`` against ``diag(1 / p)`` at one distribution.

    Over directions that sum to zero. The smallest and largest over a convex set are the best l and L
    there.
    """
    root = np.exp(0.5 * log_p)
    scaled = root[:, None] * problem.utility.curvature(np.exp(log_p)) * root
    scaled -= np.outer(scaled @ root, root)
    scaled -= np.outer(root, root @ scaled)
    # The direction of root, which no tangent has, is moved away from the eigenvalue zero.
    top = float(np.abs(scaled).sum(1).max()) + 1.0
    values = eigvalsh(scaled + top * np.outer(root, root))
    tangent = np.delete(values, int(np.argmin(np.abs(values - top))))
    return problem.alpha + float(tangent[0]), problem.alpha + float(tangent[-1])


def ratios(problem: Problem, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """``D_G(p, q) / KL(p || q)`` of the pairs (p, q) that are far enough apart."""
    found = []
    for log_p, log_q in pairs:
        kl = kl_divergence(log_p, log_q)
        if kl > SMALLEST_PAIR:
            found.append(problem.divergence(log_p, log_q) / kl)
    return found


def mixtures(distributions: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random distributions from the convex hull of some: mixtures with Dirichlet(1/2) weights."""
    stacked = np.exp(np.array(distributions))
    return [np.log(rng.dirichlet(np.full(len(distributions), 0.5)) @ stacked) for _ in range(count)]


def bounds(L: float, l: float, kl: float, iterations: int) -> tuple[np.ndarray, np.ndarray]:  # noqa: E741
    """The bounds of ``G(p*) - G(p_K)`` for K = 1..iterations, in units of G.

    Args:
        L, l: relative smoothness and strong concavity, ``L >= l >= 0``.
        kl: ``KL(p* || p_0)`` in nats.

    Returns:
        ``(L - l) kl / K`` and ``l kl / ((1 - l/L)^-K - 1)``, each (iterations,).
    """
    k = np.arange(1, iterations + 1)
    sublinear = (L - l) * kl / k
    if l <= 0:
        return sublinear, sublinear
    if l >= L:
        return sublinear, np.zeros(iterations)
    with np.errstate(over="ignore"):  # the bound then underflows to zero, as it should
        return sublinear, l * kl / np.expm1(-k * np.log1p(-l / L))


def fitted_rate(gaps: np.ndarray, above: float) -> tuple[float, float] | None:
    """Factor per iteration by which gaps fall at their end, and its standard error.

    A straight line through the logarithms of the last half of the gaps, up to the first that is
    not above ``above``.

    Returns:
        None if fewer than four are left to fit.
    """
    below = np.flatnonzero(gaps <= above)
    last = int(below[0]) if below.size else gaps.size
    k = np.arange(last // 2, last)
    if k.size < 4:
        return None
    logs = np.log(gaps[k])
    centred = k - k.mean()
    slope = float(centred @ logs / (centred @ centred))
    left = logs - logs.mean() - slope * centred
    error = float(np.sqrt(left @ left / (k.size - 2) / (centred @ centred)))
    return float(np.exp(slope)), float(np.exp(slope)) * error


# --------------------------------------------------------------------------------- the study


def build_problem(config: UtilityConfig, points: np.ndarray, log_base: np.ndarray) -> Problem:
    """A configured problem on a grid in the plane.

    Args:
        points: cell centres, (n, 2).
        log_base: log probabilities of the pretrained distribution, (n,).
    """
    weight = config.weight or 0.0
    utility: Utility
    if config.utility == "expected_reward":
        utility = ExpectedReward(points @ np.array(config.direction))
    elif config.utility == "entropy":
        utility = Entropy(weight)
    elif config.utility == "optimal_design":
        utility = OptimalDesign(points, config.ridge or 0.0, weight)
    elif config.utility == "kernel_matching":
        assert config.target is not None  # the configuration admits no other
        assert config.bandwidth is not None
        squared = ((points[:, None, :] - points) ** 2).sum(2)
        kernel = np.exp(-squared / (2 * config.bandwidth**2))
        mean, deviation = np.array([config.target.mean]), np.full((1, 2), config.target.deviation)
        target = np.exp(gaussian_mixture(points, np.ones(1), mean, deviation))
        utility = KernelMatching(kernel, target, weight)
    else:
        cost = 0.5 * (points**2).sum(1)
        utility = LogBarrier(points @ np.array(config.direction), cost, config.budget or 0.0, weight)
    return Problem(utility, config.alpha, log_base)


@dataclass(frozen=True)
class Run:
    """One run of mirror ascent and its constants.

    Attributes:
        name: ``proven``, ``proven x 4`` and so on, or ``measured``.
        L, l: the constants of its bounds; L is the KL weight of its steps.
        iterates: log probabilities, 0..K.
    """

    name: str
    L: float
    l: float  # noqa: E741
    iterates: list[np.ndarray]


def _proven_run(problem: Problem, multiple: float, iterations: int) -> Run:
    L = multiple * (problem.utility.smoothness(problem.log_base, problem.alpha) + problem.alpha)
    name = "proven" if multiple == 1 else f"proven x {multiple:g}"
    iterates = problem.ascend(L, iterations)
    return Run(name, L, problem.utility.strong_concavity + problem.alpha, iterates)


def _measured_run(problem: Problem, optimum: np.ndarray, earlier: Run, name: str) -> Run:
    """A run with L as large as the curvature between start and optimum asks for, and no larger. Raises
    ArithmeticError if some step of the run needs a larger L after all."""
    some = [earlier.iterates[k] for k in sorted({0, 1, 2, len(earlier.iterates) // 2})] + [optimum]
    between = mixtures(some, 3, np.random.default_rng(seed_of("mirror descent", name, "curvature")))
    L = max(relative_curvature(problem, distribution)[1] for distribution in [*some, *between])
    iterates = problem.ascend(L, len(earlier.iterates) - 1)
    needed = max(ratios(problem, zip(iterates[1:], iterates[:-1], strict=True)), default=0.0)
    if needed > L * (1 + 1e-9):
        raise ArithmeticError(
            f"{name}: a step needs L = {needed:.6g}, above the measured {L:.6g}; the bounds do not apply"
        )
    to_optimum = ratios(problem, ((optimum, iterate) for iterate in iterates[:-1]))
    return Run("measured", L, min([L, *to_optimum]), iterates)


Row = dict[str, float | int | str | None]


def study(config: MirrorDescentConfig) -> dict[str, list[Row]]:
    """Every problem's runs against their bounds.

    Returns:
        ``runs``: one row a problem and run, with its constants and rates; ``iterations``: one row a
        problem, run and K.

    Raises:
        ArithmeticError: if an optimum or a measured constant cannot be certified.
        ValueError: if a barrier is infeasible.
    """
    points = square_grid(config.grid.extent, config.grid.cells)
    data = config.data
    base = gaussian_mixture(points, *map(np.array, (data.weights, data.means, data.deviations)))
    runs: list[Row] = []
    iterations: list[Row] = []
    for name, settings in config.problems.items():
        try:
            problem = build_problem(settings, points, base)
            done = _runs_of(problem, settings, config.iterations, name)
        except (ValueError, ArithmeticError) as error:
            raise type(error)(f"problem {name}: {error}") from None
        runs += done[0]
        iterations += done[1]
    return {"runs": runs, "iterations": iterations}


def _runs_of(
    problem: Problem, settings: UtilityConfig, iterations: int, name: str
) -> tuple[list[Row], list[Row]]:
    optimum = problem.optimum()
    done = [_proven_run(problem, multiple, iterations) for multiple in settings.multiples]
    if done[0].l < done[0].L:  # else there is nothing left to measure
        done.append(_measured_run(problem, optimum, done[0], name))
    run_rows: list[Row] = []
    rows: list[Row] = []
    for run in done:
        found = _against_bounds(problem, run, optimum, name)
        rows += found
        run_rows.append(_run_row(problem, run, optimum, name, found))
    return run_rows, rows


def _against_bounds(problem: Problem, run: Run, optimum: np.ndarray, name: str) -> list[Row]:
    """The gap beside both bounds for K = 1..; a gap of less than rounding counts as zero."""
    kl = kl_divergence(optimum, problem.log_base)
    count = len(run.iterates) - 1
    sublinear, linear = bounds(run.L, run.l, kl, count)
    rows: list[Row] = []
    for k in range(1, count + 1):
        gap = problem.divergence(run.iterates[k], optimum)
        allowed = min(sublinear[k - 1], linear[k - 1]) * (1 + 1e-9) + run.L * LOG_ERROR**2
        rows.append(
            {
                "problem": name,
                "run": run.name,
                "K": k,
                "gap": gap,
                "sublinear_bound": float(sublinear[k - 1]),
                "linear_bound": float(linear[k - 1]),
                "verdict": "holds" if gap <= allowed else "violated",
            }
        )
    return rows


def _run_row(problem: Problem, run: Run, optimum: np.ndarray, name: str, found: list[Row]) -> Row:
    rng = np.random.default_rng(seed_of("mirror descent", name, run.name, "pairs"))
    hull = [*mixtures([*run.iterates, optimum], 40, rng), optimum]
    pairs = [(hull[i], hull[j]) for i, j in rng.integers(0, len(hull), (200, 2)) if i != j]
    observed = ratios(problem, [*pairs, *zip(run.iterates[1:], run.iterates[:-1], strict=True)])
    gaps = np.array([row["gap"] for row in found], dtype=np.float64)
    rate = fitted_rate(gaps, FIT_ABOVE * run.L * LOG_ERROR**2)
    return {
        "problem": name,
        "run": run.name,
        "alpha": problem.alpha,
        "L": run.L,
        "l": run.l,
        "observed_L": max(observed),
        "observed_l": min(observed),
        "kl": kl_divergence(optimum, problem.log_base),
        "initial_gap": problem.divergence(problem.log_base, optimum),
        "certificate": problem.certificate(optimum),
        "fitted_rate": None if rate is None else rate[0],
        "fitted_rate_error": None if rate is None else rate[1],
        "guaranteed_rate": 1 - run.l / run.L,
        "squared_rate": (1 - run.l / run.L) ** 2,
        "holds": sum(row["verdict"] == "holds" for row in found),
        "iterations": len(found),
    }
