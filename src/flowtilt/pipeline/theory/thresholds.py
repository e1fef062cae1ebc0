"""Thresholds of tail means against their exact values, for known distributions of rewards (Wang et al. 2026).

Four questions: how the error of a batch's threshold falls with the batch size; how gradient descent on
the right tail's dual converges; where the duals are convex; and how far the threshold moves when the
batch comes from a distribution p' other than the pretrained distribution p, given only ``KL(p' || p)``.

For the last, write ``phi_t`` for ``(1 - m) exp((r - t) / s)`` beyond t and ``-m`` on the flat side, m the
tail's mass and ``s = alpha m``. A threshold t' of p' (inside the range of rewards, where distributions have
densities) is stationary: ``E_p' phi_t' = 0``. Three bounds follow; all rest on rewards in a known range.

- *Pinsker*: with ``TV <= sqrt(KL / 2)`` and W the largest exponential (``exp((r_max - t) / s)`` on the
  right, 1 on the left), A and B of p and p' differ by at most ``W TV`` and ``TV``, so that the duals'
  slopes differ by at most ``e(t) = W(t) TV / (m Z_p(t))``. Hence ``|slope_p(t')| <= e(t')``.
- *strong convexity*: on an interval that holds all such t' and where the dual's curvature is at least c,
  ``|t' - t*| <= max e / c``: the same, linear in ``sqrt(KL)``.
- *sharp*: the smallest KL divergence of a distribution with ``E phi_t = 0`` is ``I(t) = -min_l log E_p exp(l
  phi_t)`` (Sanov's theorem; attained by a tilt of p). Hence ``I(t') <= KL``, and nothing better can be said
  from the KL divergence alone.

The left dual has no convexity to rule out stationary points far away. There t' also has to be at least
as good as t*: with ``|Z_p' - Z_p| <= TV``, ``dual_p(t') >= dual_p(t*) - alpha [log(1 + TV / Z(t')) -
log(1 - TV / Z(t*))]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from flowtilt.pipeline.theory.config import BatchConfig, ShiftConfig, ThresholdStudyConfig
from flowtilt.seeding import seed_of
from flowtilt.theory.reward_distributions import RewardDistribution, TailDual
from flowtilt.thresholds import descend_threshold, dual_objective, threshold
from flowtilt.words import Tail

Row = dict[str, float | int | str | None]
TAILS: tuple[Tail, Tail] = ("lower", "upper")
HALF_NORMAL_MEDIAN = 0.6744897501960817
SMALLEST_ERROR = 1e-12  # relative to the spread: nearer than that is rounding
OFFSETS = 120  # points of the search for the furthest threshold, on either side
WIDEST_GAPS = 200  # between neighbouring rewards, where second differences are clear of rounding


def study(config: ThresholdStudyConfig) -> dict[str, list[Row]]:
    """All four parts of the study, as rows by the name of the table that they go to."""
    duals = {}
    for name, of in config.problems.items():
        own = of.distribution
        distribution = RewardDistribution(tuple(own.weights), tuple(own.means), tuple(own.deviations))
        duals[name] = {tail: TailDual(distribution, of.alpha, of.mass, tail) for tail in of.tails}
    tables: dict[str, list[Row]] = {"errors": [], "fits": [], "descent": [], "rates": [], "convexity": []}
    for name, pair in duals.items():
        errors = batch_errors(name, pair, config.batches)
        for tail, dual in pair.items():
            tables["errors"] += error_rows(name, dual, errors[tail])
            tables["fits"].append(fit_row(name, dual, errors[tail], config.batches.fit_from))
            tables["convexity"] += convexity(name, dual, config.descent.batch)
            if tail == "upper":
                paths, rates = descents(name, dual, config.descent.batch, config.descent.updates)
                tables["descent"] += paths
                tables["rates"] += rates
    return tables | {"shift": shifts(config.shift)}


# --------------------------------------------------------------------------- errors of batches


Errors = dict[Tail, dict[int, np.ndarray]]


def batch_errors(name: str, duals: dict[Tail, TailDual], config: BatchConfig) -> Errors:
    """``|estimate - threshold|`` of replicate batches, by tail and batch size, each (replicates,)."""
    found: Errors = {tail: {} for tail in duals}
    distribution = next(iter(duals.values())).distribution
    for size in config.sizes:
        errors: dict[Tail, list[float]] = {tail: [] for tail in duals}
        for replicate in range(config.replicates(size)):
            rng = np.random.default_rng(seed_of("threshold", name, size, replicate))
            rewards, counts = distribution.sample(size, rng)
            for tail, dual in duals.items():
                estimate = threshold(rewards, dual.alpha, dual.mass, tail, counts)
                errors[tail].append(abs(estimate - dual.optimum))
        for tail, values in errors.items():
            found[tail][size] = np.array(values)
    return found


def error_rows(name: str, dual: TailDual, errors: dict[int, np.ndarray]) -> list[Row]:
    """Quantiles of the errors beside the limit of their median, one row a batch size."""
    rows: list[Row] = []
    for size, values in errors.items():
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
        rows.append(
            {
                "problem": name,
                "tail": dual.tail,
                "size": size,
                "replicates": values.size,
                "error_10pct": float(low),
                "error_median": float(median),
                "error_90pct": float(high),
                "limit_median": HALF_NORMAL_MEDIAN * dual.deviation() / np.sqrt(size),
            }
        )
    return rows


def weighted_slope(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Slope of the weighted straight line through some points, each argument (n,)."""
    dx = x - weights @ x / weights.sum()
    return float((weights * dx) @ y / ((weights * dx) @ dx))


def error_slope(errors: dict[int, np.ndarray]) -> tuple[float, float]:
    """Slope of log root-mean-square error against log batch size, and its standard error.

    The log of a root mean square over n batches has a variance of ``k / (4 n)``, k being that of the
    squared errors over their mean (2 for normal errors), to first order in 1 / n. It is pooled over sizes.

    Args:
        errors: by batch size, each (replicates,) and not all zero.
    """
    x = np.log(np.array(list(errors), dtype=np.float64))
    counts = np.array([values.size for values in errors.values()])
    squares = [np.mean(values**2) for values in errors.values()]
    slope = weighted_slope(x, 0.5 * np.log(squares), counts)
    relative = np.concatenate([v**2 / m for v, m in zip(errors.values(), squares, strict=True)])
    spread = counts @ (x - counts @ x / counts.sum()) ** 2
    return slope, float(np.sqrt(np.var(relative) / 4 / spread))


def fit_row(name: str, dual: TailDual, errors: dict[int, np.ndarray], fit_from: int) -> Row:
    """Slope of log error against log batch size; none where every batch has the exact threshold.

    ``over_limit`` compares the errors' root mean square, over sizes from ``fit_from`` on and each over
    its limit by the delta method, with one.
    """
    used = {size: values for size, values in errors.items() if size >= fit_from}
    sizes = np.concatenate([np.full(values.size, float(size)) for size, values in used.items()])
    values = np.concatenate(list(used.values()))
    low, high = dual.distribution.support
    slope: float | None = None
    error: float | None = None
    if all(found.max() > SMALLEST_ERROR * (high - low) for found in used.values()):
        slope, error = error_slope(used)
    deviation = dual.deviation()
    ratio = float(np.sqrt(np.mean(sizes * values**2)) / deviation) if deviation > 0 else None
    return {
        "problem": name,
        "tail": dual.tail,
        "alpha": dual.alpha,
        "mass": dual.mass,
        "threshold": dual.optimum,
        "kind": "regular" if dual.regular else "kink",
        "effective_samples": dual.effective_share() * max(errors),
        "slope": slope,
        "slope_error": error,
        "over_limit": ratio,
    }


# --------------------------------------------------------------------------- gradient descent


def descend(slope: Callable[[float], float], start: float, step: float, updates: int) -> np.ndarray:
    """Gradient descent with a fixed step: the points 0..updates."""
    path = [start]
    for _ in range(updates):
        path.append(path[-1] - step * slope(path[-1]))
    return np.array(path)


def batch_slope(rewards: np.ndarray, alpha: float, mass: float) -> Callable[[float], float]:
    """Derivative of a batch's upper dual: ``1 - A / (mass (A + B))``."""
    ordered = np.sort(rewards)

    def slope(t: float) -> float:
        first = int(np.searchsorted(ordered, t, side="right"))
        log_active = logsumexp((ordered[first:] - t) / (alpha * mass)) if first < ordered.size else -np.inf
        log_idle = np.log(first) if first else -np.inf
        return float(1 - np.exp(log_active - np.logaddexp(log_active, log_idle)) / mass)

    return slope


def descents(name: str, dual: TailDual, batch: int, updates: int) -> tuple[list[Row], list[Row]]:
    """Gradient descent on the right tail's dual against the exact threshold.

    With a fixed step on the distribution's own dual and on a batch's, and by the package's descent of
    normalised gradients on the batch. The step is one over a bound of the distribution's curvature, so that
    the distribution's dual descends monotonically.

    Returns:
        Errors by update, and one row a descent with its fitted rate.
    """
    rng = np.random.default_rng(seed_of("threshold", name, "descent"))
    values, counts = dual.distribution.sample(batch, rng)
    rewards = np.repeat(values, counts.astype(int))
    step = 1 / dual.largest_curvature()
    exact = threshold(rewards, dual.alpha, dual.mass, "upper")
    on_distribution = descend(dual.slope, dual.distribution.mean, step, updates) - dual.optimum
    slope = batch_slope(rewards, dual.alpha, dual.mass)
    on_batch = descend(slope, float(rewards.mean()), step, updates) - exact
    normalised = np.array(
        [descend_threshold(rewards, dual.alpha, dual.mass, k)[0] - exact for k in range(0, updates + 1, 4)]
    )
    # Between two rewards a batch's dual has the distribution's curvature less the density's part.
    at_kink = bool(np.isin(exact, rewards))
    in_gap = None if at_kink else 1 - step * (1 - dual.mass) / dual.scale
    limit = 1 - step * dual.curvature(dual.optimum) if dual.regular else None
    paths: list[Row] = []
    rates: list[Row] = []
    for kind, every, errors, kink, expected in (
        ("fixed step, distribution", 1, on_distribution, not dual.regular, limit),
        ("fixed step, batch", 1, on_batch, at_kink, in_gap),
        ("normalised, batch", 4, normalised, at_kink, None),
    ):
        sizes = np.abs(errors)
        for k, error in enumerate(sizes):
            paths.append({"problem": name, "descent": kind, "update": k * every, "error": float(error)})
        rates.append(
            {
                "problem": name,
                "descent": kind,
                "minimum": "kink" if kink else "smooth",
                "updates": updates,
                "final_error": float(sizes[-1]),
                "rate": _descent_rate(sizes, SMALLEST_ERROR * float(np.ptp(rewards)), every),
                "expected_rate": expected,
            }
        )
    return paths, rates


def _descent_rate(errors: np.ndarray, floor: float, every: int) -> float | None:
    """Factor per update over the last half of the errors above rounding, by a line's slope."""
    below = np.flatnonzero(errors <= 100 * floor)
    last = int(below[0]) if below.size else errors.size
    first = last // 2
    if last - first < 4:
        return None
    k = every * np.arange(first, last)
    return float(np.exp(weighted_slope(k, np.log(errors[first:last]), np.ones(k.size))))


# --------------------------------------------------------------------------- convexity


def convexity(name: str, dual: TailDual, batch: int) -> list[Row]:
    """Second differences of the dual over the squared step: of the distribution's, and of a batch's.

    The distribution's over the middle of its support; the batch's on the upper tail over the same points, on
    the lower tail between neighbouring rewards, in the widest gaps. On the upper tail a second difference is
    not negative to rounding, which is part of the row.
    """
    rows: list[Row] = []
    low, high = dual.distribution.support
    middle, reach = dual.distribution.mean, 0.35 * (high - low)
    points = np.linspace(middle - reach, middle + reach, 301)
    step = float(points[1] - points[0])
    rng = np.random.default_rng(seed_of("threshold", name, "convexity"))
    values, counts = dual.distribution.sample(batch, rng)

    def on_batch(t: float) -> float:
        return dual_objective(t, values, dual.alpha, dual.mass, dual.tail, counts)

    rows.append(
        _second_differences(name, dual, "distribution", dual.value, points, np.full(points.size, step))
    )
    if dual.tail == "upper":
        rows.append(_second_differences(name, dual, "batch", on_batch, points, np.full(points.size, step)))
    else:
        ordered = np.unique(values)
        gaps = np.diff(ordered)
        widest = np.argsort(gaps)[-WIDEST_GAPS:]
        middles, quarters = ordered[widest] + gaps[widest] / 2, gaps[widest] / 4
        rows.append(_second_differences(name, dual, "batch, between rewards", on_batch, middles, quarters))
    return rows


def _second_differences(
    name: str,
    dual: TailDual,
    where: str,
    function: Callable[[float], float],
    points: np.ndarray,
    steps: np.ndarray,
) -> Row:
    rounding, found = 0.0, []
    for t, h in zip(points, steps, strict=True):
        left, middle, right = function(t - h), function(t), function(t + h)
        found.append((left - 2 * middle + right) / h**2)
        largest = max(abs(left), abs(middle), abs(right), abs(t) + h, dual.alpha)
        rounding = max(rounding, 8 * np.finfo(np.float64).eps * largest / h**2)
    values = np.array(found)
    return {
        "problem": name,
        "tail": dual.tail,
        "where": where,
        "points": len(found),
        "smallest": float(values.min()),
        "largest": float(values.max()),
        "rounding": float(rounding),
        "convex_share": float((values >= -rounding).mean()),
        "concave_share": float((values <= rounding).mean()),
    }


# --------------------------------------------------------------------------- shifted batches


@dataclass(frozen=True)
class ShiftBounds:
    """Bounds of ``|t' - t*|`` from ``KL(p' || p)`` alone; see the module's text.

    Attributes:
        dual: of the pretrained distribution p, with rewards in a finite range.
        kl: ``KL(p' || p)`` in nats.
    """

    dual: TailDual
    kl: float

    def __post_init__(self) -> None:
        if not np.isfinite([self.dual.distribution.low, self.dual.distribution.high]).all():
            raise ValueError(
                "without a bound of the rewards no KL divergence bounds the threshold's shift; clip them"
            )

    @property
    def variation(self) -> float:
        """Total variation by Pinsker's inequality, at most 1."""
        return min(1.0, float(np.sqrt(self.kl / 2)))

    def slope_error(self, t: float) -> float:
        """``e(t)``: how far the duals' slopes can be apart at t."""
        dual = self.dual
        largest = np.exp((dual.distribution.high - t) / dual.scale) if dual.tail == "upper" else 1.0
        return float(largest * self.variation / (dual.mass * sum(dual.parts(t))))

    def _good_enough(self, t: float) -> bool:
        """Whether t can be as good as t* for some p': only asked on the left."""
        dual, best = self.dual, self.dual.optimum
        share = self.variation / sum(dual.parts(best))
        if dual.tail == "upper" or share >= 1:
            return True
        allowed = np.log1p(self.variation / sum(dual.parts(t))) - np.log1p(-share)
        return dual.value(t) >= dual.value(best) - dual.alpha * allowed

    def pinsker(self) -> tuple[float, float]:
        """The interval of thresholds that Pinsker's inequality leaves."""
        return self._interval(lambda t: abs(self.dual.slope(t)) <= self.slope_error(t))

    def sharp(self) -> tuple[float, float]:
        """The interval that the KL divergence leaves; on the right, both ends are attained."""
        return self._interval(lambda t: rate_function(self.dual, t)[0] <= self.kl)

    def strong_convexity(self) -> float | None:
        """``max e / min |curvature|`` over :meth:`pinsker`'s interval. None where that says nothing: if the
        curvature changes its sign there, or if the bound exceeds the range of the rewards."""
        points = np.linspace(*self.pinsker(), 101)[1:-1]
        sign = 1 if self.dual.tail == "upper" else -1
        curvature = min(sign * self.dual.curvature(float(t)) for t in points)
        if curvature <= 0:
            return None
        bound = max(self.slope_error(float(t)) for t in points) / curvature
        return bound if bound < self.dual.distribution.high - self.dual.distribution.low else None

    def _interval(self, possible: Callable[[float], bool]) -> tuple[float, float]:
        best = self.dual.optimum
        low, high = self.dual.distribution.low, self.dual.distribution.high

        def both(t: float) -> bool:
            return possible(t) and self._good_enough(t)

        return best - _furthest(both, best, low - best), best + _furthest(both, best, high - best)


def _furthest(possible: Callable[[float], bool], start: float, reach: float) -> float:
    """The largest distance from ``start``, towards ``reach``, at which a threshold is possible. Searched on a
    geometric grid of distances and bisected."""
    distances = np.geomspace(1e-7 * abs(reach), abs(reach) * (1 - 1e-9), OFFSETS)
    inside = [j for j, d in enumerate(distances) if possible(start + np.sign(reach) * d)]
    if not inside:
        return float(distances[0])
    if inside[-1] == OFFSETS - 1:
        return abs(reach)
    near, far = float(distances[inside[-1]]), float(distances[inside[-1] + 1])
    for _ in range(40):
        middle = 0.5 * (near + far)
        if possible(start + np.sign(reach) * middle):
            near = middle
        else:
            far = middle
    return far


def rate_function(dual: TailDual, t: float) -> tuple[float, float]:
    """``I(t) = -min_l log E exp(l phi_t)`` in nats, and the multiplier l where it is attained."""
    phi, weights = dual.influence(t)
    kept = weights > 0
    phi, logs = phi[kept], np.log(weights[kept])

    def mean(multiplier: float) -> float:
        """Sign and size of the tilted mean of phi, which rises with the multiplier."""
        exponents = logs + multiplier * phi
        tilted = np.exp(exponents - exponents.max())
        return float(tilted @ phi / tilted.sum())

    if phi.min() >= 0 or phi.max() <= 0:
        return np.inf, 0.0
    # Multipliers are in units of 1 / phi; the bracket grows until it holds the root.
    bound = 1e-3 / float(np.abs(phi).max())
    while mean(bound) < 0 or mean(-bound) > 0:
        bound *= 4
    multiplier = float(brentq(mean, -bound, bound, xtol=1e-15, rtol=1e-13))
    return max(0.0, -float(logsumexp(logs + multiplier * phi))), multiplier


def worst_threshold(dual: TailDual, at: float) -> tuple[float, float]:
    """The threshold of the distribution nearest to p that has a stationary point at ``at``, and its
    divergence.

    The distribution is p's tilt by ``l phi_at``. Its threshold is found anew, from its own dual's slope, on
    the right tail, whose dual is convex.

    Returns:
        The threshold, and ``KL`` of the tilted distribution from p in nats.
    """
    multiplier = rate_function(dual, at)[1]
    nodes, weights = dual.distribution.quadrature(at)
    exponents = multiplier * dual.moment_function(nodes, at)
    log_total = float(logsumexp(exponents, b=weights))
    kl = float((weights * np.exp(exponents - log_total)) @ (exponents - log_total))

    def imbalance(t: float) -> float:
        nodes, weights = dual.distribution.quadrature(at, t)
        tilted = weights * np.exp(multiplier * dual.moment_function(nodes, at) - log_total)
        return float(tilted @ dual.moment_function(nodes, t))

    low, high = dual.distribution.support
    inside = 1e-9 * (high - low)
    return float(brentq(imbalance, low + inside, high - inside, xtol=1e-13)), kl


def shifts(config: ShiftConfig) -> list[Row]:
    """The threshold's shift under batches from other models, beside its bounds.

    The reward is a coordinate of the model, clipped. Models whose coordinate is N(delta, 1) instead of
    N(0, 1) have a KL divergence of ``delta^2 / 2``, and their rewards no more than that. On the right
    tail the distributions that attain the sharp bound stand beside them.
    """
    rows: list[Row] = []
    distribution = RewardDistribution((1.0,), (0.0,), (1.0,), -config.clip, config.clip)
    for tail in TAILS:
        dual = TailDual(distribution, config.alpha, config.mass, tail)
        for delta in config.deltas:
            bounds = ShiftBounds(dual, 0.5 * delta**2)
            pinsker, sharp, linear = bounds.pinsker(), bounds.sharp(), bounds.strong_convexity()
            for sign in (1, -1):
                moved = TailDual(distribution.moved(sign * delta), config.alpha, config.mass, tail).optimum
                batch = f"mean moved {'up' if sign > 0 else 'down'}"
                rows.append(_shift_row(bounds, batch, delta, bounds.kl, moved, pinsker, sharp, linear))
                end = sharp[1] if sign > 0 else sharp[0]
                if tail == "upper" and distribution.low < end < distribution.high:
                    worst, kl = worst_threshold(dual, end)
                    batch = f"worst, {'up' if sign > 0 else 'down'}"
                    rows.append(_shift_row(bounds, batch, delta, kl, worst, pinsker, sharp, linear))
    return rows


def _shift_row(
    bounds: ShiftBounds,
    batch: str,
    delta: float,
    kl: float,
    moved: float,
    pinsker: tuple[float, float],
    sharp: tuple[float, float],
    linear: float | None,
) -> Row:
    best = bounds.dual.optimum
    shift = moved - best
    allowed = [
        (ends[1] - best if shift > 0 else best - ends[0]) * (1 + 1e-6) + 1e-9 for ends in (pinsker, sharp)
    ]
    if linear is not None:
        allowed.append(linear * (1 + 1e-6) + 1e-9)
    return {
        "tail": bounds.dual.tail,
        "batch": batch,
        "delta": delta,
        "kl": kl,
        "threshold": best,
        "shift": shift,
        "sharp_bound": sharp[1] - best if shift > 0 else best - sharp[0],
        "pinsker_bound": pinsker[1] - best if shift > 0 else best - pinsker[0],
        "strong_convexity_bound": linear,
        "verdict": "holds" if all(abs(shift) <= bound for bound in allowed) else "violated",
    }
