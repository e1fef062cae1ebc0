"""Flows whose velocity, distribution and tilts are known exactly, to test solvers without a trained network.

For a mixture of Gaussians everything is closed under what the solvers do: its path is a mixture
at every time, and its tilt by ``exp(c^T x - x^T A x / 2)`` is a mixture again. All is in float64.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowtilt.control.adjoint_matching import Target, lean_adjoint, loss_scale
from flowtilt.control.endpoints import Terminal
from flowtilt.functionals.base import FirstVariation
from flowtilt.interpolants import (
    Coefficient,
    Columnwise,
    Interpolant,
    Linear,
    VariancePreserving,
    broadcast_time,
    time_grid,
)
from flowtilt.model import Context, FlowModel
from flowtilt.rewards import Reward
from flowtilt.sampling import memoryless_steps

PATHS: dict[str, Interpolant] = {"linear": Linear(), "vp": VariancePreserving()}


def tensor(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic(Reward):
    """``c^T x - x^T A x / 2`` with symmetric ``A``; linear if ``A`` is not given."""

    def __init__(self, linear, curvature=None):
        self.linear = tensor(linear)
        self.curvature = (
            torch.zeros(2 * self.linear.shape).double() if curvature is None else tensor(curvature)
        )

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        x = x.flatten(1).double()
        return x @ self.linear - 0.5 * ((x @ self.curvature) * x).sum(1)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians: weights (k,), means (k, d), covariances (k, d, d)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def of(cls, weights, means, covariances) -> Mixture:
        return cls(tensor(weights), tensor(means), tensor(covariances))

    @classmethod
    def gaussian(cls, mean, covariance) -> Mixture:
        return cls(torch.ones(1).double(), tensor(mean)[None], tensor(covariance)[None])

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        centred = self.means - self.mean
        between = torch.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + between

    def log_density(self, x: Tensor) -> Tensor:
        parts = [
            w.log() + torch.distributions.MultivariateNormal(m, c).log_prob(x)
            for w, m, c in zip(self.weights, self.means, self.covariances, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts), dim=0)

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        factors = torch.linalg.cholesky(self.covariances)
        noise = torch.randn(count, self.means.shape[1], generator=rng, dtype=torch.float64)
        return self.means[which] + torch.einsum("nij,nj->ni", factors[which], noise)

    def tilted(self, reward: Quadratic, kl_weight: float) -> Mixture:
        """The distribution proportional to ``p exp(reward / kl_weight)``, by completing squares."""
        precisions = torch.linalg.inv(self.covariances)
        new_precisions = precisions + reward.curvature / kl_weight
        covariances = torch.linalg.inv(new_precisions)
        shifts = torch.einsum("kij,kj->ki", precisions, self.means)
        means = torch.einsum("kij,kj->ki", covariances, shifts + reward.linear / kl_weight)
        log_weights = (
            self.weights.log()
            + 0.5 * (torch.logdet(covariances) - torch.logdet(self.covariances))
            - 0.5 * (shifts * self.means).sum(1)
            + 0.5 * torch.einsum("ki,kij,kj->k", means, new_precisions, means)
        )
        return Mixture(torch.softmax(log_weights, 0), means, covariances)


def by_time(x: Tensor, t: Tensor) -> tuple[list[float], Tensor]:
    """The times of states (batch, d), and the states of each, (times, states of one time, d).

    Times are () or (batch,). Solvers ask for many states at each of some times, one time after another: what
    depends on time alone is then needed once a time.
    """
    if t.ndim == 0:
        return [float(t)], x[None]
    times, counts = t.unique_consecutive(return_counts=True)
    if bool((counts != counts[0]).any()):
        times = t
    return times.tolist(), x.view(len(times), -1, x.shape[1])


@dataclass(frozen=True)
class _AtTimes:
    """What the velocity needs at some times: coefficients (times, 1, 1), slopes and precisions
    (k, times, d, d), log-determinants (k, times, 1)."""

    alpha: Tensor
    alpha_rate: Tensor
    slopes: Tensor
    precisions: Tensor
    log_determinants: Tensor


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Symmetric matrices (k, times, d, d) times vectors (k, times, n, d)."""
    return torch.bmm(vectors.flatten(0, 1), matrices.flatten(0, 1)).view_as(vectors)


class MixtureFlow(FlowModel):
    """The flow of a mixture of Gaussians ``N(m, S)`` with its exact velocity and score.

    Given the component, ``x_t`` has the covariance ``Sigma = alpha^2 S + beta^2``; with
    ``r = Sigma^-1 (x - alpha m)`` the posterior means of endpoint and noise are ``m + alpha S r`` and
    ``beta r``, the score is ``-r`` and ``v = alpha' endpoint + beta' noise``. Over components all of
    these are averaged with the posterior shares. Whatever depends on time alone is kept, since
    solvers take many small steps.

    Args:
        path: the interpolant.
        distribution: the mixture.
        data_variance: of the memoryless steps.
        trainable: whether weights and means are parameters: then every tilt by a linear reward is
            in the family.
    """

    def __init__(
        self, path: Interpolant, distribution: Mixture, data_variance: float = 1.0, trainable: bool = False
    ):
        super().__init__()
        self.path, self.distribution, self.data_variance = path, distribution, data_variance
        logits, means = distribution.weights.log(), distribution.means.clone()
        self.logits = nn.Parameter(logits) if trainable else logits
        self.means = nn.Parameter(means) if trainable else means
        self._kept: dict[float, _AtTimes] = {}

    def prior(self, count, generator, context=None):
        return torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)

    def _coefficients(self, times: list[float]) -> _AtTimes:
        path, s, t = self.path, self.distribution.covariances[:, None], tensor(times)[:, None, None]
        a, a_rate, b, b_rate = path.alpha(t), path.alpha_rate(t), path.beta(t), path.beta_rate(t)
        # Along each axis of a covariance all of them are numbers.
        variances, axes = torch.linalg.eigh(s)  # (k, 1, d), (k, 1, d, d)
        at_time = a**2 * variances[..., None, :] + b**2
        precisions = (axes / at_time) @ axes.mT
        slopes = (axes * (a_rate * a * variances[..., None, :] + b_rate * b) / at_time) @ axes.mT
        return _AtTimes(a, a_rate, slopes, precisions, at_time.log().sum(-1))

    def _at(self, times: list[float]) -> _AtTimes:
        if len(times) > 1:
            return self._coefficients(times)
        if times[0] not in self._kept:
            self._kept[times[0]] = self._coefficients(times)
        return self._kept[times[0]]

    def _average(self, x, t, of_component):
        """Mean over components of ``of_component(centred, at)``, both (k, times, n, d)."""
        times, states = by_time(x, t)
        at = self._at(times)
        centred = states - at.alpha * self.means[:, None, None]
        values = of_component(centred, at)
        if len(values) == 1:
            return values[0].view_as(x)
        squares = (_apply(at.precisions, centred) * centred).sum(-1)
        logs = self.logits[:, None, None] - 0.5 * (squares + at.log_determinants)
        return (torch.softmax(logs, 0)[..., None] * values).sum(0).view_as(x)

    def velocity(self, x, t, context=None):
        return self._average(
            x,
            t,
            lambda centred, at: _apply(at.slopes, centred) + at.alpha_rate * self.means[:, None, None],
        )

    def exact_score(self, x, t):
        return self._average(x, t, lambda centred, at: -_apply(at.precisions, centred))

    def affine(self, times):
        """Of a single Gaussian the velocity is affine: matrices (times, d, d) and offsets (times, 1, d)."""
        (mean,), at = self.distribution.means, self._coefficients(times)
        matrices = at.slopes[0]  # symmetric
        return matrices, at.alpha_rate * mean - (at.alpha * mean) @ matrices


class ColumnwiseFlow(FlowModel):
    """The exact flow of a Gaussian ``N(m, S)`` whose columns have paths of their own.

    With ``A`` and ``B`` the diagonal matrices of alpha and beta, ``x_t`` has the covariance
    ``Sigma = A S A + B^2``; with ``r = Sigma^-1 (x - A m)`` the posterior means of endpoint and noise are
    ``m + S A r`` and ``B r``, and the score is ``-r``.
    """

    def __init__(self, path: Columnwise, distribution: Mixture, data_variance: float = 1.0):
        super().__init__()
        self.path, self.distribution, self.data_variance = path, distribution, data_variance
        self._kept: dict[float, tuple[Tensor, ...]] = {}

    def prior(self, count, generator, context=None):
        return torch.randn(count, len(self.distribution.mean), generator=generator, dtype=torch.float64)

    def _coefficients(self, t: Tensor) -> tuple[Tensor, ...]:
        """Of velocity and score, affine at each time: matrices (d, d), from the right, and offsets (1, d)."""
        mean, s = self.distribution.mean, self.distribution.covariance
        alpha, beta = self.path.alpha(t), self.path.beta(t)
        alpha_rate, beta_rate = self.path.alpha_rate(t), self.path.beta_rate(t)
        precision = torch.linalg.inv(alpha[:, None] * s * alpha + torch.diag(beta**2))
        slope = precision @ (alpha[:, None] * s * alpha_rate + torch.diag(beta_rate * beta))
        offset = alpha_rate * mean - (alpha * mean) @ slope
        return slope, offset[None], -precision, ((alpha * mean) @ precision)[None]

    def _affine(self, x: Tensor, t: Tensor, which: int) -> Tensor:
        times, states = by_time(x, t)
        for time in times:
            if time not in self._kept:
                self._kept[time] = self._coefficients(tensor(time))
        matrices, offsets = (torch.stack([self._kept[time][i] for time in times]) for i in (which, which + 1))
        return torch.baddbmm(offsets, states, matrices).view_as(x)

    def velocity(self, x, t, context=None):
        return self._affine(x, t, 0)

    def affine(self, times):
        """Matrices (times, d, d), from the right, and offsets (times, 1, d) of the velocity."""
        parts = [self._coefficients(tensor(time))[:2] for time in times]
        matrices, offsets = (torch.stack(part) for part in zip(*parts, strict=True))
        return matrices, offsets

    def exact_score(self, x, t):
        return self._affine(x, t, 2)


def tilt_gain(path: Interpolant, t: Tensor) -> Tensor:
    """``eta alpha = beta (alpha' beta - alpha beta')``: the size of a tilt's change of the velocity.

    A tilt changes the score by ``alpha`` times something that stays of one size over all times, so
    that corrections in these units are equally easy to learn at all times.
    """
    alpha, beta = path.alpha(t), path.beta(t)
    return beta * (path.alpha_rate(t) * beta - alpha * path.beta_rate(t))


class AffineTable(nn.Module):
    """A correction ``gain_k (B_k x + c_k)`` with one entry for each time step, zero at the start."""

    def __init__(self, path: Interpolant, steps: int, dimension: int = 2):
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(steps, dimension, dimension, dtype=torch.float64))
        self.offsets = nn.Parameter(torch.zeros(steps, dimension, dtype=torch.float64))
        times = path.start + (1 - path.start) * tensor(time_grid(steps)[:-1])
        self.register_buffer("gains", tilt_gain(path, times[:, None]))

    def affine(self, times):
        """Matrices (times, d, d), from the right, and offsets (times, 1, d)."""
        steps = self.gains.shape[0]
        entries = [min(round(time * steps), steps - 1) for time in times]
        if len(entries) == 1:  # a view, where an index by a list is a copy
            entries = slice(entries[0], entries[0] + 1)
        gains = self.gains[entries, None]
        return gains * self.matrices[entries].mT, gains * self.offsets[entries, None]

    def forward(self, x, t):
        times, states = by_time(x, t)
        matrices, offsets = self.affine(times)
        return torch.baddbmm(offsets, states, matrices).view_as(x)


class Perceptron(nn.Module):
    """A correction by the gain times a small network of (x, t), zero at the start."""

    def __init__(self, path: Interpolant, width: int = 32, dimension: int = 2, seed: int = 0):
        super().__init__()
        self.path = path
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            last = nn.Linear(width, dimension)
            hidden = [nn.Linear(dimension + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last).double()

    def forward(self, x, t):
        t = t.expand(len(x))[:, None]
        return tilt_gain(self.path, t) * self.layers(torch.cat([x, t], dim=1))


class CorrectedFlow(FlowModel):
    """An exact flow plus a trainable correction of its velocity."""

    def __init__(self, exact: FlowModel, correction: nn.Module):
        super().__init__()
        self.exact, self.correction = exact, correction
        self.path, self.data_variance = exact.path, exact.data_variance

    def prior(self, count, generator, context=None):
        return self.exact.prior(count, generator, context)

    def velocity(self, x, t, context=None):
        return self.exact.velocity(x, t, context) + self.correction(x, t)


class AffineFlow(CorrectedFlow):
    """A Gaussian's exact flow plus a table: the sum is affine in the state, so that its derivative is known.

    What solvers do with it is a tenth of the operations of :class:`CorrectedFlow`, with the same numbers.
    """

    def __init__(self, exact: MixtureFlow | ColumnwiseFlow, correction: AffineTable):
        super().__init__(exact, correction)
        self._kept: dict[float, tuple[Tensor, Tensor]] = {}

    def affine(self, times):
        if missing := [time for time in times if time not in self._kept]:
            found = self.exact.affine(missing)
            self._kept |= {time: (found[0][i], found[1][i]) for i, time in enumerate(missing)}
        matrices, offsets = zip(*(self._kept[time] for time in times), strict=True)
        more_matrices, more_offsets = self.correction.affine(times)
        return torch.stack(matrices) + more_matrices, torch.stack(offsets) + more_offsets

    def velocity(self, x, t, context=None):
        times, states = by_time(x, t)
        matrices, offsets = self.affine(times)
        return torch.baddbmm(offsets, states, matrices).view_as(x)

    def linearised(self, states, times, context=None):
        matrices, offsets = (part.detach() for part in self.affine(times[: len(states)].tolist()))
        velocities = torch.baddbmm(offsets, states, matrices)
        return lambda k: (velocities[k], lambda a: a @ matrices[k].T)


class Stacked(FlowModel):
    """The same flow with states of shape (batch, d, 1): nothing may depend on how states are shaped."""

    def __init__(self, flat: FlowModel):
        super().__init__()
        self.flat, self.path, self.data_variance = flat, flat.path, flat.data_variance

    def prior(self, count, generator, context=None):
        return self.flat.prior(count, generator, context)[..., None]

    def velocity(self, x, t, context=None):
        return self.flat.velocity(x[..., 0], t, context)[..., None]


def affine_velocity(model: FlowModel, t: float, dimension: int = 2) -> tuple[Tensor, Tensor]:
    """Matrix and offset of a velocity that is affine in the state, read off d + 1 evaluations."""
    probes = torch.eye(dimension + 1, dtype=torch.float64)[:, 1:]
    with torch.no_grad():
        values = model.velocity(probes, tensor(t))
    return (values[1:] - values[0]).T, values[0]


def diagonal(coefficient: Coefficient, dimension: int) -> Tensor:
    """A coefficient of all columns, or one for each, as a matrix."""
    return torch.diag(tensor(coefficient).expand(dimension))


def chain_distribution(model: FlowModel, steps: int, dimension: int = 2) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the endpoint of ``sample_sde``, for a velocity affine in the state.

    Every step of the memoryless sampler is then affine with Gaussian noise, so that the distribution after
    all steps is Gaussian and follows from a recursion: a discretisation error without sampling error.
    """
    eye = torch.eye(dimension, dtype=torch.float64)
    mean, covariance = torch.zeros_like(eye[0]), eye
    for t, step in zip(model.time_grid(steps)[:-1], memoryless_steps(model, steps), strict=True):
        matrix, offset = affine_velocity(model, t, dimension)
        state, velocity, noise = (diagonal(c, dimension) for c in (step.state, step.velocity, step.noise))
        jacobian = state + velocity @ matrix
        mean = jacobian @ mean + velocity @ offset
        covariance = jacobian @ covariance @ jacobian.T + noise**2
    return mean, covariance


def memoryless_limit(
    path: Interpolant, distribution: Mixture, reward: Quadratic | None = None, kl_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean and covariance at time 1 of the controlled memoryless SDE of a Gaussian, as steps go to 0.

    The control tilts the distribution of the end given the start; the start stays ``N(0, I)``. Where
    ``alpha(0) = 0`` this is the tilt of the data's distribution. On the variance-preserving path a little
    memory is left: the end given the start x is ``N(m + R (x - alpha m), S - R Sigma R^T)`` with
    ``Sigma = alpha^2 S + beta^2`` and ``R = alpha S Sigma^-1``.
    """
    m, s = distribution.mean, distribution.covariance
    eye = torch.eye(len(m), dtype=torch.float64)
    alpha, beta = path.alpha(tensor(0.0)), path.beta(tensor(0.0))
    at_start = alpha**2 * s + beta**2 * eye
    regression = alpha * s @ torch.linalg.inv(at_start)
    given_start = Mixture.gaussian(m - regression @ (alpha * m), s - regression @ at_start @ regression.T)
    if reward is not None:
        precision = torch.linalg.inv(given_start.covariance)
        given_start = given_start.tilted(reward, kl_weight)
        regression = given_start.covariance @ precision @ regression
    return given_start.mean, given_start.covariance + regression @ regression.T


def flow_map(path: Interpolant, distribution: Mixture, x: Tensor, t: float, s: float) -> Tensor:
    """The exact solution at time s of a Gaussian's probability-flow ODE through ``x`` at time t.

    Along each axis of the covariance the ODE keeps the standardised coordinate.
    """
    variances, axes = torch.linalg.eigh(distribution.covariance)
    alpha_t, beta_t, alpha_s, beta_s = (c(tensor(u)) for u in (t, s) for c in (path.alpha, path.beta))
    stretch = torch.sqrt((alpha_s**2 * variances + beta_s**2) / (alpha_t**2 * variances + beta_t**2))
    return alpha_s * distribution.mean + ((x - alpha_t * distribution.mean) @ axes * stretch) @ axes.T


def pushforward(path: Interpolant, distribution: Mixture, t: float, s: float) -> Mixture:
    """The distribution to which a Gaussian's probability-flow ODE carries ``N(0, I)`` from time t to s."""
    probes = torch.eye(3, dtype=torch.float64)[:, 1:]
    origin, *images = flow_map(path, distribution, probes, t, s)
    jacobian = torch.stack(images, dim=1) - origin[:, None]
    return Mixture.gaussian(origin, jacobian @ jacobian.T)


def matched_distribution(
    flow: FlowModel, reward: Quadratic, kl_weight: float, steps: int, target: Target = "state"
) -> tuple[Tensor, Tensor]:
    """Endpoint mean and covariance of what Adjoint Matching converges to with finitely many steps.

    For a Gaussian flow everything is affine and the fixed point of the regression follows from a
    recursion backwards in time. At the fixed point the mean of step k moves by
    ``-velocity_k g_k E[a | x_k]``, g_k the ratio of the loss's two scales and ``a`` the adjoint of the state
    before or after the step, by the target; with the product P of the Jacobians after that state and
    ``E[x_N | x_{k+1}] = R x_{k+1} + q``, the conditional adjoint is
    ``P^T (A (R x_{k+1} + q) - c) / kl_weight``, where x_{k+1} contains the move itself.
    """
    coefficients = memoryless_steps(flow, steps)
    scale = loss_scale(flow, coefficients, target)
    c, a = reward.linear / kl_weight, reward.curvature / kl_weight
    eye = torch.eye(len(c), dtype=torch.float64)
    # The adjoint of an affine flow is a product of constant Jacobians, one row a terminal unit vector.
    products, _ = lean_adjoint(flow, torch.zeros(steps + 1, *eye.shape).double(), Terminal(eye), coefficients)
    matrices, offsets = [], []
    r, q = eye, torch.zeros_like(c)
    for k in reversed(range(steps)):
        step = coefficients[k]
        slope, offset = affine_velocity(flow, flow.time_grid(steps)[k], len(c))
        velocity = diagonal(step.velocity, len(c))
        jacobian, shift = diagonal(step.state, len(c)) + velocity @ slope, velocity @ offset
        pull = (
            velocity
            @ diagonal(scale.noise[k] / scale.mean[k], len(c))
            @ products[max(k - 1, 0) if target == "state" else k].T
        )
        implicit = eye + pull @ a @ r
        matrices.append(jacobian - torch.linalg.solve(implicit, pull @ a @ r @ jacobian))
        offsets.append(shift - torch.linalg.solve(implicit, pull @ (a @ (r @ shift + q) - c)))
        r, q = r @ matrices[-1], r @ offsets[-1] + q
    mean, covariance = torch.zeros_like(c), eye
    for step, matrix, offset in zip(coefficients, matrices[::-1], offsets[::-1], strict=True):
        mean = matrix @ mean + offset
        covariance = matrix @ covariance @ matrix.T + diagonal(step.noise, len(c)) ** 2
    return mean, covariance


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact value."""
    return float(torch.linalg.norm(value - exact) / torch.linalg.norm(exact))


def halving_orders(errors: list[float]) -> list[float]:
    """Observed orders of convergence from errors at steps h, h/2, h/4, ..."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


class AffinePolynomial(nn.Module):
    """A correction ``gain(t) sum_j T_j(2t - 1) (B_j x + c_j)``, T_j Chebyshev's, zero at the start."""

    def __init__(self, path, degree=4):
        super().__init__()
        self.path = path
        self.matrices = nn.Parameter(torch.zeros(degree + 1, 2, 2, dtype=torch.float64))
        self.offsets = nn.Parameter(torch.zeros(degree + 1, 2, dtype=torch.float64))

    def forward(self, x, t):
        t = t.expand(len(x))
        angles = torch.acos((2 * t - 1).clamp(-1, 1))[:, None]
        basis = torch.cos(angles * torch.arange(len(self.offsets)))
        moved = torch.einsum("nj,nja->na", basis, torch.einsum("nb,jab->nja", x, self.matrices))
        moved = moved + basis @ self.offsets
        return tilt_gain(self.path, t)[:, None] * moved


def ode_distribution(model, steps=160):
    """Mean and covariance at time 1 of the probability-flow ODE, for a velocity affine in the state.

    By the implicit midpoint rule, of order 2 in the step.
    """
    mean, covariance = torch.zeros(2).double(), torch.eye(2).double()
    for k in range(steps):
        matrix, offset = affine_velocity(model, (k + 0.5) / steps)
        half = torch.eye(2).double() - 0.5 / steps * matrix
        step = torch.linalg.solve(half, torch.eye(2).double() + 0.5 / steps * matrix)
        mean = step @ mean + torch.linalg.solve(half, offset / steps)
        covariance = step @ covariance @ step.T
    return mean, covariance


class Values(FirstVariation):
    """A reward whose gradient nobody may ask for."""

    def __init__(self, reward):
        self.reward = reward

    def value(self, x, context=None):
        return self.reward(x, context)

    def gradient(self, x, context=None):
        raise AssertionError("weighted fitting asks for values, never for gradients")


class GaussianFlow(FlowModel):
    """The exact flow of ``N(mean, factor factor^T)`` in the plane, of both as parameters: of any Gaussian."""

    data_variance = 1.0

    def __init__(self, path: Interpolant, distribution: Mixture):
        super().__init__()
        self.path = path
        self.mean = nn.Parameter(distribution.mean.clone())
        self.factor = nn.Parameter(torch.linalg.cholesky(distribution.covariance))

    @property
    def covariance(self) -> Tensor:
        lower = torch.tril(self.factor)
        return lower @ lower.T

    def prior(self, count, generator, context=None):
        return torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)

    def velocity(self, x, t, context=None):
        at = broadcast_time(t, x).expand(len(x), 1).double()
        a, b, a_rate, b_rate = (
            c(at) for c in (self.path.alpha, self.path.beta, self.path.alpha_rate, self.path.beta_rate)
        )
        s = self.covariance
        first, second, between = a**2 * s[0, 0] + b**2, a**2 * s[1, 1] + b**2, a**2 * s[0, 1]
        x0, x1 = (x - a * self.mean).split(1, dim=1)
        r = torch.cat([second * x0 - between * x1, first * x1 - between * x0], dim=1)
        r = r / (first * second - between**2)
        return a_rate * (self.mean + a * (r @ s)) + b_rate * b * r
