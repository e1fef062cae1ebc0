"""Interpolants between noise and data, and the quantities that follow from them.

A path is ``x_t = alpha(t) x_1 + beta(t) x_0`` with ``x_0 ~ N(0, I)`` and time running from noise
(``t = 0``) to data (``t = 1``). The rates ``kappa = alpha'/alpha`` and
``eta = beta (kappa beta - beta')`` turn a velocity into a score and back,
``v = kappa x + eta s``, and the noise that makes the two ends of the generative process
independent ("memoryless") is ``sigma^2 = 2 eta`` (Domingo-Enrich et al. 2025, section 4.3).

All of this holds for each coordinate of the state alone, so that groups of coordinates may follow paths
of their own, :class:`Columnwise`: what is a number for one path is then a vector over columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from flowtilt.words import check_word

Prediction = Literal["velocity", "score", "noise", "endpoint"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

Coefficient = float | Tensor
"""A number; or, where columns of the state have paths of their own, one for each of them, (columns,)."""


class Interpolant(ABC):
    """The coefficients of a path, as functions of a tensor of times in [0, 1].

    All methods take times of any shape and return a tensor of the same shape.
    """

    @property
    def start(self) -> float:
        """Where samplers begin, with the noise of time 0: later, if the velocity at 0 is that of any data."""
        return 0.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data, rising to ``alpha(1) = 1``."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Coefficient of the noise, falling to ``beta(1) = 0``."""

    @abstractmethod
    def alpha_rate(self, t: Tensor) -> Tensor:
        """Time derivative of ``alpha``."""

    @abstractmethod
    def beta_rate(self, t: Tensor) -> Tensor:
        """Time derivative of ``beta``; may be infinite at ``t = 1``."""

    def kappa(self, t: Tensor) -> Tensor:
        """``alpha' / alpha``; may be infinite at ``t = 0``."""
        return self.alpha_rate(t) / self.alpha(t)

    def eta(self, t: Tensor) -> Tensor:
        """``beta (kappa beta - beta')``: half the squared memoryless noise."""
        beta = self.beta(t)
        return beta * (self.kappa(t) * beta - self.beta_rate(t))


@dataclass(frozen=True)
class Linear(Interpolant):
    """The straight path of flow matching: ``alpha = t``, ``beta = 1 - t``."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def beta(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def beta_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def eta(self, t: Tensor) -> Tensor:
        return (1 - t) / t


@dataclass(frozen=True)
class VariancePreserving(Interpolant):
    """The path of the variance-preserving SDE (Song et al. 2021) with a linear noise rate.

    The rate rises from ``rate_min`` at the data to ``rate_max`` at the noise;
    ``alpha^2 + beta^2 = 1`` throughout, and ``kappa = eta = rate / 2`` is finite at both ends.
    ``alpha(0)`` is small and not zero: 0.049 for the rates 0.1 and 12.
    """

    rate_min: float = 0.1
    rate_max: float = 12.0

    def __post_init__(self) -> None:
        if not 0 < self.rate_min <= self.rate_max:
            raise ValueError(
                f"noise rates must satisfy 0 < rate_min <= rate_max, got {self.rate_min} and {self.rate_max}"
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        remaining = 1 - t
        growth = self.rate_max - self.rate_min
        return -0.5 * (self.rate_min * remaining + 0.5 * growth * remaining**2)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def beta(self, t: Tensor) -> Tensor:
        # expm1 keeps the small values near the data exact.
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def kappa(self, t: Tensor) -> Tensor:
        return 0.5 * (self.rate_min + (1 - t) * (self.rate_max - self.rate_min))

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self.kappa(t) * self.alpha(t)

    def beta_rate(self, t: Tensor) -> Tensor:
        return -self.kappa(t) * self.alpha(t) ** 2 / self.beta(t)

    def eta(self, t: Tensor) -> Tensor:
        return self.kappa(t)


@dataclass(frozen=True)
class Cosine(Interpolant):
    """The path ``alpha = sin^2(pi w^nu / 2)``, ``beta = 1 - alpha`` of FlowMol (Dunn and Koes 2024).

    FlowMol's time is w, in which a path rests at both ends. Here time is that in which the path of ``nu = 1``
    is the straight one, ``t = sin^2(pi w / 2)``: near the data ``beta = nu^2 (1 - t)``, as smooth as there.
    With a larger nu the path lags behind: near the noise ``alpha`` is of order ``t^nu``, so that at 0 the
    velocity is 0 whatever the data are. Samplers begin at :attr:`start` instead, where a straight path has
    ``alpha`` of 1e-6, and this one less: the distribution there is that of the noise to this order.

    Rates are for times strictly between 0 and 1.
    """

    nu: float

    def __post_init__(self) -> None:
        if not self.nu >= 1:
            raise ValueError(f"a cosine path needs nu of at least 1, got {self.nu}")

    @property
    def start(self) -> float:
        return 2.0**-20

    def _power(self, t: Tensor, exponent: float) -> Tensor:
        return (2 / math.pi * torch.asin(torch.sqrt(t))) ** exponent

    def _sines(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Sine and cosine of ``pi w^nu / 2``, the latter exact near the data."""
        to_end = 2 / math.pi * torch.asin(torch.sqrt(1 - t))  # 1 - w
        rest = -0.5 * math.pi * torch.expm1(self.nu * torch.log1p(-to_end))
        return torch.sin(0.5 * math.pi * self._power(t, self.nu)), torch.sin(rest)

    def alpha(self, t: Tensor) -> Tensor:
        return self._sines(t)[0] ** 2

    def beta(self, t: Tensor) -> Tensor:
        return self._sines(t)[1] ** 2

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self.kappa(t) * self.alpha(t)

    def beta_rate(self, t: Tensor) -> Tensor:
        return -self.alpha_rate(t)

    def kappa(self, t: Tensor) -> Tensor:
        sine, cosine = self._sines(t)
        return self.nu * self._power(t, self.nu - 1) * cosine / (sine * torch.sqrt(t * (1 - t)))

    def eta(self, t: Tensor) -> Tensor:
        return self.beta(t) * self.kappa(t)  # since alpha + beta = 1


@dataclass(frozen=True)
class Columnwise(Interpolant):
    """Paths side by side: runs of columns along the last axis of the state, each on a path of its own.

    Methods take times () or with a last axis of length 1, as :func:`broadcast_time` makes them, and return
    that axis with the length of all columns.

    Attributes:
        parts: the path and the number of columns of each run, in the order of the state.
    """

    parts: tuple[tuple[Interpolant, int], ...]

    def __post_init__(self) -> None:
        if not self.parts or min(width for _, width in self.parts) < 1:
            raise ValueError(f"each path needs at least one column, got {[width for _, width in self.parts]}")

    @property
    def start(self) -> float:
        return max(path.start for path, _ in self.parts)

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """One value a path, () or (..., 1), repeated for its columns: (columns,) or (..., columns)."""
        widths = [width for _, width in self.parts]
        return torch.cat([v.expand(*v.shape[:-1], n) for v, n in zip(values, widths, strict=True)], dim=-1)

    def _of_each(self, coefficient: Callable[[Interpolant], Tensor], t: Tensor) -> Tensor:
        if t.ndim and t.shape[-1] != 1:
            raise ValueError(
                f"paths by columns take times () or with a last axis of length 1, got {tuple(t.shape)}; "
                "use broadcast_time"
            )
        return self.spread([coefficient(path) for path, _ in self.parts])

    def alpha(self, t: Tensor) -> Tensor:
        return self._of_each(lambda path: path.alpha(t), t)

    def beta(self, t: Tensor) -> Tensor:
        return self._of_each(lambda path: path.beta(t), t)

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self._of_each(lambda path: path.alpha_rate(t), t)

    def beta_rate(self, t: Tensor) -> Tensor:
        return self._of_each(lambda path: path.beta_rate(t), t)

    def kappa(self, t: Tensor) -> Tensor:
        return self._of_each(lambda path: path.kappa(t), t)

    def eta(self, t: Tensor) -> Tensor:
        return self._of_each(lambda path: path.eta(t), t)


def broadcast_time(t: Tensor, x: Tensor) -> Tensor:
    """View times of shape () or (batch,) so that they broadcast against ``x`` (batch, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def convert(
    value: Tensor, x: Tensor, t: Tensor, path: Interpolant, source: Prediction, target: Prediction
) -> Tensor:
    """Turn one prediction at ``(x, t)`` into another.

    The four are linear in each other: with noise ``n`` and endpoint ``y``,
    ``x = alpha y + beta n``, ``v = alpha' y + beta' n`` and ``s = -n / beta``.

    Args:
        value: the prediction, of the shape of ``x``.
        x: states, (batch, ...).
        t: times in (0, 1), () or (batch,). At an end where a coefficient of the path diverges
            or vanishes the conversion that divides by it is not defined.
        source: what ``value`` is.

    Raises:
        ValueError: for another word in either.
    """
    if source not in PREDICTIONS or target not in PREDICTIONS:  # at every step of every sampler
        check_word(source, PREDICTIONS, "a prediction")
        check_word(target, PREDICTIONS, "a prediction")
    if source == target:
        return value
    t = broadcast_time(t, x)
    if {source, target} == {"velocity", "score"}:
        # The short form keeps its accuracy at the end where the noise vanishes.
        kappa, eta = rates(path, t)
        return kappa * x + eta * value if source == "score" else (value - kappa * x) / eta
    noise, endpoint = _noise_and_endpoint(value, x, t, path, source)
    if target == "noise":
        return noise
    if target == "endpoint":
        return endpoint
    if target == "score":
        return -noise / path.beta(t)
    return path.alpha_rate(t) * endpoint + path.beta_rate(t) * noise


def rates(path: Interpolant, t: Tensor) -> tuple[Coefficient, Coefficient]:
    """``kappa`` and ``eta``; numbers if all samples and columns share the time and the path."""
    if t.ndim == 0 and t.device.type == "cpu":  # where reading the number waits for nothing
        kappa, eta = _rates_at(path, float(t))
        return _like(kappa, t), _like(eta, t)
    return path.kappa(t), path.eta(t)


@lru_cache(maxsize=1024)
def _rates_at(path: Interpolant, t: float) -> tuple[Coefficient, Coefficient]:
    """``kappa`` and ``eta`` at one time; as tensors they would cost as much as a layer of a small network."""
    at = torch.tensor(t, dtype=torch.float64, device="cpu")
    kappa, eta = path.kappa(at), path.eta(at)
    return (kappa, eta) if kappa.ndim else (float(kappa), float(eta))


def _like(coefficient: Coefficient, x: Tensor) -> Coefficient:
    """A vector of coefficients in the type and on the device of ``x``; numbers fit any."""
    return coefficient.to(x) if isinstance(coefficient, Tensor) else coefficient


def add_scaled(x: Tensor, y: Tensor, factor: Coefficient) -> Tensor:
    """``x + factor y``."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, y, factor)
    return torch.add(x, y, alpha=factor)


def _noise_and_endpoint(
    value: Tensor, x: Tensor, t: Tensor, path: Interpolant, source: Prediction
) -> tuple[Tensor, Tensor]:
    """The pair behind a prediction, neither by way of the other where that would divide by zero."""
    alpha, beta = path.alpha(t), path.beta(t)
    if source == "velocity":
        # Solves x = alpha y + beta n, v = alpha' y + beta' n.
        alpha_rate, beta_rate = path.alpha_rate(t), path.beta_rate(t)
        wronskian = alpha_rate * beta - alpha * beta_rate
        return (alpha_rate * x - alpha * value) / wronskian, (beta * value - beta_rate * x) / wronskian
    if source == "endpoint":
        return (x - alpha * value) / beta, value
    noise = -beta * value if source == "score" else value
    return noise, (x - beta * noise) / alpha


def time_grid(steps: int, power: float = 1.0) -> list[float]:
    """``steps + 1`` times from 0 to 1, which are ``1 - (1 - u)^power`` of equally spaced ``u``.

    Where structure appears late, a power above 1 spends the steps there.

    Raises:
        ValueError: if there is no step.
    """
    if steps < 1:
        raise ValueError(f"a time grid needs at least one step, got {steps}")
    even = [k / steps for k in range(steps + 1)]
    return even if power == 1 else [1 - (1 - u) ** power for u in even]


@dataclass(frozen=True)
class MemorylessStep:
    """One step ``x_s = state x_t + velocity v(x_t, t) + noise xi`` of the memoryless process.

    Vectors over columns are float64; :meth:`like` makes them fit a state.
    """

    state: Coefficient
    velocity: Coefficient
    noise: Coefficient

    @property
    def noisy(self) -> bool:
        """Whether any column has noise."""
        return bool(self.noise.any()) if isinstance(self.noise, Tensor) else self.noise > 0

    def like(self, x: Tensor) -> MemorylessStep:
        """The step for states of the type and on the device of ``x``."""
        return MemorylessStep(_like(self.state, x), _like(self.velocity, x), _like(self.noise, x))


def memoryless_step(path: Interpolant, t: float, s: float, data_variance: float = 0.0) -> MemorylessStep:
    """Coefficients of the memoryless step from time ``t`` to the later time ``s``.

    Reversed in time, the memoryless process is the Markov chain that adds noise to data, so the
    distribution of ``x_s`` given ``x_t`` and the endpoint is a Gaussian known exactly. The step draws from
    it with the endpoint replaced by its prediction, and widens it by the variance that the
    endpoint would have if the data were isotropic Gaussian with ``data_variance``. With 0 this is
    DDPM's ancestral step (DDIM with eta = 1), with 1 the other end of DDPM's range (Ho et al.
    2020, section 3.2), exact for standard normal data on the variance-preserving path.

    It agrees with Euler-Maruyama on ``dX = (2 v - kappa X) dt + sigma dB`` to first order, and
    stays finite at both ends: at ``t = 0`` where ``sigma`` may diverge, and at ``s = 1`` where
    the step becomes the predicted endpoint itself, without noise; unless the path itself ends in a
    little noise, ``beta(1) > 0``, which then is there.

    Raises:
        ValueError: unless ``0 <= t < s <= 1``, and the velocity at ``t`` depends on the endpoint.
    """
    if not 0 <= t < s <= 1:
        raise ValueError(f"a memoryless step needs 0 <= t < s <= 1, got t={t}, s={s}")
    if isinstance(path, Columnwise):
        return _columnwise_step(path, t, s, data_variance)
    at, to = (torch.tensor(u, dtype=torch.float64, device="cpu") for u in (t, s))
    alpha_t, beta_t, alpha_s, beta_s = (
        float(c) for c in (path.alpha(at), path.beta(at), path.alpha(to), path.beta(to))
    )
    ratio = alpha_t / alpha_s
    added = beta_t**2 - ratio**2 * beta_s**2  # variance that noising adds from s back to t
    on_state = ratio * beta_s**2 / beta_t**2
    on_endpoint = alpha_s * added / beta_t**2
    endpoint_variance = data_variance * beta_t**2 / (data_variance * alpha_t**2 + beta_t**2)
    variance = added * beta_s**2 / beta_t**2 + on_endpoint**2 * endpoint_variance
    # endpoint = (beta v - beta' x) / (alpha' beta - alpha beta')
    alpha_rate, beta_rate = float(path.alpha_rate(at)), float(path.beta_rate(at))
    wronskian = alpha_rate * beta_t - alpha_t * beta_rate
    if not wronskian > 0:
        raise ValueError(f"at t={t} the velocity of {path} says nothing of the endpoint; begin at its start")
    return MemorylessStep(
        state=on_state - on_endpoint * beta_rate / wronskian,
        velocity=on_endpoint * beta_t / wronskian,
        noise=math.sqrt(variance) if s < 1 or beta_s > 0 else 0.0,
    )


def _columnwise_step(path: Columnwise, t: float, s: float, data_variance: float) -> MemorylessStep:
    """The step of each path, spread over its columns."""
    steps = [memoryless_step(part, t, s, data_variance) for part, _ in path.parts]
    state, velocity, noise = (
        path.spread([torch.tensor(getattr(step, name), dtype=torch.float64, device="cpu") for step in steps])
        for name in ("state", "velocity", "noise")
    )
    return MemorylessStep(state, velocity, noise)
