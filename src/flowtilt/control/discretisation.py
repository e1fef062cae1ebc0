"""What finitely many time steps leave of a tilt, by Adjoint Matching on a problem in closed form.

The problem is the same for all settings: two Gaussian modes on a line, and a linear reward that moves mass
from one to the other. Its path, its tilt and all velocities are known, and the model is every mixture of two
such modes: it holds the optimum exactly, so that whatever it converges to instead is the discretisation's.
Nothing is sampled and nothing is trained. Conditional means along the chain of the memoryless steps are
integrals over one normal variable, taken backwards from the end by Gauss-Hermite quadrature, and where the
regression of :mod:`flowtilt.control.adjoint_matching` stands still is the root of its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import root

from flowtilt.control.adjoint_matching import AdjointEstimate, AdjointMatchingSettings, Target, loss_scale
from flowtilt.control.loss_steps import Parts, shares_in_loss
from flowtilt.interpolants import Columnwise, Interpolant
from flowtilt.model import Context, FlowModel
from flowtilt.sampling import memoryless_steps

Array = npt.NDArray[np.float64]

MEANS = (-1.0, 1.0)
VARIANCE = 0.1
SLOPE = math.pi / 4
"""Of the reward over the KL weight: the tilt multiplies the modes' odds by ``exp(2 SLOPE)``."""

_REACH, _POINTS = 5.0, 201
_NODES, _SHARES = np.polynomial.hermite_e.hermegauss(17)
_SHARES = _SHARES / _SHARES.sum()
_UPPER = np.triu_indices(3)


_DEFAULT = AdjointMatchingSettings()


@dataclass(frozen=True)
class Weight:
    """The weight of the second mode, which has half of the base's mass."""

    exact: float
    reached: float


@dataclass(frozen=True)
class _Modes:
    """Velocity and score of a mixture of two modes at one time, on states x (n,)."""

    velocity: Array
    slope: Array
    """Derivative of the velocity by the state."""
    gradient: Array
    """Derivatives of the velocity by the log-odds and both means, (3, n)."""

    @classmethod
    def at(cls, path: Interpolant, time: float, x: Array, model: Array) -> _Modes:
        """The mixture with a model's log-odds and means."""
        t = torch.tensor(time, dtype=torch.float64, device="cpu")
        alpha, beta, alpha_rate, beta_rate = (
            float(c(t)) for c in (path.alpha, path.beta, path.alpha_rate, path.beta_rate)
        )
        variance = alpha**2 * VARIANCE + beta**2
        own_slope = (alpha_rate * alpha * VARIANCE + beta_rate * beta) / variance
        centred = x - alpha * model[1:, None]
        scores = -centred / variance
        velocities = own_slope * centred + alpha_rate * model[1:, None]
        first, second = _shares(model[0] + 0.5 * (scores[1] * centred[1] - scores[0] * centred[0]))
        shares = np.stack([first, second])
        by_odds = first * second * (velocities[1] - velocities[0])
        by_means = shares * (alpha_rate - own_slope * alpha)
        by_means -= alpha * np.stack([-by_odds * scores[0], by_odds * scores[1]])
        return cls(
            (shares * velocities).sum(0),
            own_slope + by_odds * (scores[1] - scores[0]),
            np.stack([by_odds, *by_means]),
        )


def _shares(log_odds: Array) -> tuple[Array, Array]:
    return 1 / (1 + np.exp(log_odds)), 1 / (1 + np.exp(-log_odds))


class _Line(FlowModel):
    """Path, times and noise of a solver; the velocity is :class:`_Modes`'."""

    def __init__(self, path: Interpolant, times: tuple[float, ...], data_variance: float) -> None:
        super().__init__()
        self.path, self.times, self.data_variance = path, times, data_variance

    def time_grid(self, steps: int) -> list[float]:
        return list(self.times)

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> torch.Tensor:
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, context: Context = None) -> torch.Tensor:
        base = _Modes.at(self.path, float(t), x[:, 0].numpy(), np.array([0.0, *MEANS]))
        return torch.from_numpy(base.velocity)[:, None]


class _Regression:
    """The regression on one chain of steps, its conditional means taken on a grid of states."""

    def __init__(
        self,
        path: Interpolant,
        times: tuple[float, ...],
        data_variance: float,
        estimate: AdjointEstimate,
        target: Target,
        shares: Array,
    ) -> None:
        line = _Line(path, times, data_variance)
        steps = memoryless_steps(line, len(times) - 1)
        scale = loss_scale(line, steps, target)
        self.path, self.times, self.estimate, self.target = path, times, estimate, target
        self.steps = [(float(s.state), float(s.velocity), float(s.noise)) for s in steps]
        self.weights = shares * scale.mean.cpu().numpy() ** 2
        self.ratios = (scale.noise / scale.mean).cpu().numpy()
        self.x = np.linspace(-_REACH, _REACH, _POINTS)
        self.base = [_Modes.at(path, t, self.x, np.array([0.0, *MEANS])) for t in times[:-1]]
        # The end's distribution is that of alpha(1) times the data, but for its noise: so is the reward's
        # slope.
        self.end = -SLOPE / float(path.alpha(torch.tensor(1.0, dtype=torch.float64, device="cpu")))

    def move(self, model: Array) -> Array:
        """The Gauss-Newton step of the regression, (3,), along the trajectories of a model, (3,)."""
        adjoint, sums = np.full_like(self.x, self.end), np.zeros((9, len(self.x)))
        for k in reversed(range(len(self.steps))):
            (state, velocity, noise), base = self.steps[k], self.base[k]
            own = _Modes.at(self.path, self.times[k], self.x, model)
            mean = state * self.x + velocity * own.velocity
            expected = self._expected(np.vstack([adjoint, sums]), mean, noise)
            after = expected[0]
            before = (state + velocity * base.slope) * after
            if self.estimate == "posterior_mean":
                before = self.end * self._posterior_slope(k)
            taken = after if self.target == "step" or k == 0 else before
            residual = own.velocity - base.velocity + self.ratios[k] * taken
            products = (own.gradient[:, None] * own.gradient)[_UPPER]
            sums = expected[1:] + self.weights[k] * np.concatenate([own.gradient * residual, products])
            adjoint = before
        prior = np.exp(-0.5 * self.x**2)
        means = sums @ prior
        normal = np.zeros((3, 3))
        normal[_UPPER] = means[3:]
        normal = normal + np.triu(normal, 1).T
        return np.asarray(np.linalg.solve(normal, means[:3]), dtype=np.float64)

    def _posterior_slope(self, k: int) -> Array:
        """``d E[X_1 | x_k] / d x`` of the base; see :func:`posterior_mean_adjoint` of the solver."""
        t = torch.tensor(self.times[k], dtype=torch.float64, device="cpu")
        alpha, beta, alpha_rate, beta_rate = (
            float(c(t)) for c in (self.path.alpha, self.path.beta, self.path.alpha_rate, self.path.beta_rate)
        )
        return (beta * self.base[k].slope - beta_rate) / (alpha_rate * beta - alpha * beta_rate)

    def _expected(self, values: Array, mean: Array, noise: float) -> Array:
        """``E f(mean + noise xi)`` of functions given on the grid, (functions, n), by local cubics."""
        y = mean[:, None] + noise * _NODES if noise > 0 else mean[:, None]
        place = np.clip((y + _REACH) * (_POINTS - 1) / (2 * _REACH), 1, _POINTS - 3)
        below = np.minimum(place.astype(int), _POINTS - 4)
        u = place - below
        shares = _SHARES if noise > 0 else np.ones(1)
        cubics = (
            -u * (u - 1) * (u - 2) / 6,
            (u + 1) * (u - 1) * (u - 2) / 2,
            -(u + 1) * u * (u - 2) / 2,
            (u + 1) * u * (u - 1) / 6,
        )
        return np.asarray(
            sum((values[:, below + i - 1] * cubic) @ shares for i, cubic in enumerate(cubics)), dtype=float
        )


def discretisation_bias(
    path: Interpolant,
    times: tuple[float, ...],
    data_variance: float = 0.0,
    settings: AdjointMatchingSettings = _DEFAULT,
) -> Weight:
    """The exact weight of the closed-form tilt, and the one that Adjoint Matching reaches.

    Args:
        path: the interpolant; of paths by columns the first one's.
        times: of the memoryless steps, from noise to data, as :meth:`flowtilt.model.FlowModel.time_grid`'s.
        data_variance: of the memoryless steps, see :func:`flowtilt.interpolants.memoryless_step`.
        settings: ``adjoint``, ``target`` and what says which steps are in the loss are taken from it. Either
            ``endpoint_gradient`` has the same conditional means; clipped controls have not, and are left out.

    Raises:
        ValueError: if the regression stands still nowhere near the tilt.
    """
    of_coordinates = path.parts[0][0] if isinstance(path, Columnwise) else path
    parts = settings.parts(times)
    return _reached(of_coordinates, times, data_variance, settings.adjoint, settings.target, parts)


@lru_cache(maxsize=256)
def _reached(
    path: Interpolant,
    times: tuple[float, ...],
    data_variance: float,
    estimate: AdjointEstimate,
    target: Target,
    parts: Parts,
) -> Weight:
    shares = np.array(shares_in_loss(parts, len(times) - 1))
    regression = _Regression(path, times, data_variance, estimate, target, shares)
    log_odds = SLOPE * (MEANS[1] - MEANS[0])
    exact = np.array([log_odds, MEANS[0] + SLOPE * VARIANCE, MEANS[1] + SLOPE * VARIANCE])
    found = root(regression.move, exact, tol=1e-6)
    if not found.success:
        raise ValueError(f"the regression stands still nowhere near the tilt ({found.message})")
    weights = [float(_shares(np.asarray(odds))[1]) for odds in (log_odds, found.x[0])]
    return Weight(*weights)
