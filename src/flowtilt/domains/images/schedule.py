"""The path of a diffusion model that was trained at discrete times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.interpolants import Interpolant

Spacing = Literal["leading", "trailing"]


@dataclass(frozen=True)
class DiscreteSchedule(Interpolant):
    """A variance-preserving path through the signal levels of a discrete diffusion.

    Timestep ``tau`` of ``T`` stands at the time ``t = 1 - (tau + 1) / T``: the noisiest one at 0, and the
    data at 1, where the level is ``end``. Between two timesteps ``alpha`` is linear, so that its rate is
    finite even where the noisiest timestep has no signal left. At every timestep ``alpha`` and ``beta`` are
    exactly those of the diffusion, so that its DDIM step with eta = 1 (Song et al. 2021, section 4.1) is the
    memoryless step of this path.

    Attributes:
        levels: ``alpha^2`` of the timesteps, from 0 to T - 1, falling.
        end: ``alpha^2`` that the last step leads to, at least that of timestep 0; 1 for data without noise.

    Raises:
        ValueError: if the levels do not fall, or are not in [0, 1].
    """

    levels: tuple[float, ...]
    end: float = 1.0

    def __post_init__(self) -> None:
        # Only the last step may lead nowhere: between equal levels a velocity would say nothing of the data.
        falling = all(later < earlier for earlier, later in itertools.pairwise(self.levels))
        if not (falling and self.levels[0] <= self.end):
            raise ValueError("the signal levels of a schedule must fall with the timestep")
        if not (self.levels[-1] >= 0 and self.end <= 1):
            raise ValueError(f"signal levels must be in [0, 1], got {self.levels[-1]} to {self.end}")

    def __hash__(self) -> int:  # of a thousand numbers, at every look-up of a step
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.levels, self.end))

    @cached_property
    def _nodes(self) -> Tensor:
        """``alpha`` by ``tau + 1``, from the data on, float64 (T + 1,)."""
        return torch.tensor((self.end, *self.levels), dtype=torch.float64, device="cpu").sqrt()

    @property
    def timesteps(self) -> int:
        return len(self.levels)

    def time_of(self, timestep: float) -> float:
        """The time at which a timestep stands; -1 is the data."""
        return 1 - (timestep + 1) / self.timesteps

    def timestep_of(self, t: Tensor) -> Tensor:
        """Timesteps of times, of the same shape, float; whole where the rounding of ``t`` alone misses it."""
        tau = (1 - t.double()) * self.timesteps - 1
        whole = tau.round()
        return torch.where((tau - whole).abs() < 1e-3, whole, tau)

    def grid(self, steps: int, spacing: Spacing, offset: int = 0) -> list[float]:
        """The ``steps + 1`` times of a sampler, the last being 1.

        Args:
            steps: of the sampler, at most T.
            spacing: ``trailing`` begins at the noisiest timestep, ``leading`` ends at the cleanest (Lin et
                al. 2024, table 2).
            offset: added to the timesteps of ``leading``.

        Raises:
            ValueError: if there are fewer timesteps than steps, the spacing is another, the offset leads out
                of the timesteps, or the last step leads nowhere.
        """
        total = self.timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"a schedule of {total} timesteps has no {steps} steps")
        if spacing == "trailing":
            chosen = [round(total - k * total / steps) - 1 for k in range(steps)]
        elif spacing == "leading":
            stride = total // steps
            chosen = [(steps - 1 - k) * stride + offset for k in range(steps)]
        else:
            raise ValueError(f"the spacing of timesteps must be leading or trailing, got {spacing!r}")
        if not (chosen[-1] >= 0 and chosen[0] < total):
            raise ValueError(f"an offset of {offset} leads out of the timesteps 0 to {total - 1}")
        if chosen[-1] == 0 and self.end == self.levels[0]:
            raise ValueError(
                "the last step would lead from timestep 0 to its own signal level; use trailing spacing, an "
                "offset of 1, or a scheduler with set_alpha_to_one"
            )
        return [*(self.time_of(tau) for tau in chosen), 1.0]

    def _signal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and its rate, float64, on the device of ``t``."""
        nodes = self._nodes.to(t.device)
        position = self.timestep_of(t) + 1
        below = position.floor().clamp(0, self.timesteps - 1).long()
        # At a timestep the rate is that of the interval towards the noise, but for the noisiest one.
        difference = nodes[below + 1] - nodes[below]
        return nodes[below] + (position - below) * difference, -difference * self.timesteps

    def alpha(self, t: Tensor) -> Tensor:
        return self._signal(t)[0].to(t.dtype)

    def beta(self, t: Tensor) -> Tensor:
        return (1 - self._signal(t)[0].square()).sqrt().to(t.dtype)

    def kappa(self, t: Tensor) -> Tensor:
        alpha, rate = self._signal(t)
        return (rate / alpha).to(t.dtype)

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self._signal(t)[1].to(t.dtype)

    def beta_rate(self, t: Tensor) -> Tensor:
        alpha, rate = self._signal(t)
        return (-alpha * rate / (1 - alpha.square()).sqrt()).to(t.dtype)

    def eta(self, t: Tensor) -> Tensor:
        return self.kappa(t)


def levels_of(betas: Sequence[float]) -> tuple[float, ...]:
    """Signal levels ``alpha^2`` from the noise variances of the steps."""
    return tuple(torch.tensor(betas, dtype=torch.float64, device="cpu").neg().add(1).cumprod(0).tolist())


BETAS = (0.00085, 0.012)
"""First and last noise variance of Stable Diffusion's thousand steps, whose roots are equally spaced."""


def end_level(cleanest: float, share: float) -> float:
    """The signal level that the last step leads to, moved by a share of the way from that of the cleanest
    timestep to 1."""
    return cleanest + share * (1 - cleanest)


def stable_diffusion(
    betas: tuple[float, float] | None = None, zero_terminal_snr: bool = False, end: float | None = None
) -> DiscreteSchedule:
    """Stable Diffusion's path, whose last step leads to data without noise unless ``end`` says otherwise.

    Args:
        betas: first and last noise variance instead of its own.
        zero_terminal_snr: whether it ends in pure noise: the roots of the levels are moved and scaled so that
            the last is zero and the first stays (Lin et al. 2024, algorithm 1).
        end: see :func:`end_level`.
    """
    first, last = betas or BETAS
    levels = levels_of(torch.linspace(first**0.5, last**0.5, 1000, dtype=torch.float64).square().tolist())
    if zero_terminal_snr:
        roots = torch.tensor(levels, dtype=torch.float64).sqrt()
        levels = tuple(((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square().tolist())
    return DiscreteSchedule(levels, 1.0 if end is None else end_level(levels[0], end))


def process(experiment: ImageExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...], float]:
    """What solvers follow: Stable Diffusion's schedule, which embedded models have too, with its changes."""
    asked = experiment.schedule
    path = stable_diffusion(asked.betas, asked.zero_terminal_snr, asked.end)
    return path, tuple(path.grid(steps, asked.spacing, offset=1)), 0.0
