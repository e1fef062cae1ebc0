"""Reward landscapes of the planar experiments: zones with bumps, a slope that levels off, rings, and a cone.

The risk-averse and the novelty-seeking experiment have zones. Neither paper prints its landscapes;
both describe three zones along x: a plateau under the pretrained density, a zone of moderate reward
to its left, and a zone to its right whose reward
is good (or poor) but for thin features of catastrophic (or extreme) height. ``config/experiments``
says which heights were read off the papers' rows, and :mod:`flowtilt.domains.planar.calibration`
finds the one free constant, where the right zone begins.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.model import Context
from flowtilt.rewards import Reward


def _rise(x: Tensor, at: float, softness: float) -> Tensor:
    """A smooth step from 0 to 1 at ``at``, most of it within ``softness`` on either side."""
    return torch.sigmoid(4 * (x - at) / softness)


def _bump(distance_squared: Tensor, width: float) -> Tensor:
    """A bump of height 1 with a flat crest and the half-width ``width``: ``exp(-(d / width)^4)``."""
    return torch.exp(-((distance_squared / width**2) ** 2))


@dataclass(frozen=True)
class Zones(Reward):
    """Three zones along x, and bumps in the right one; the axes are dimensionless.

    Attributes:
        left, plateau, right: heights of the zones.
        bump: height of the bumps' crests.
        left_edge: where the left zone gives way to the plateau.
        right_edge: where the plateau gives way to the right zone.
        softness: half-width of both transitions.
        width: half-width of a bump.
        spacing: distance between neighbouring bumps.
        inset: distance of the first column of bumps from the right edge.
        row: where along y a row of bumps stands (spikes; stripes run all along y).
        sign: +1 if heights are rewards, -1 if they are costs (the reward is minus the height).
    """

    left: float
    plateau: float
    right: float
    bump: float
    left_edge: float
    right_edge: float
    softness: float
    width: float
    spacing: float
    inset: float
    row: float = 0.0
    sign: int = 1

    @abstractmethod
    def bumps(self, x: Tensor) -> Tensor:
        """The bumps' profile in [0, 1] at points (batch, 2), shape (batch,)."""

    def height(self, x: Tensor) -> Tensor:
        """The landscape at points (batch, 2), shape (batch,)."""
        first = x[:, 0]
        ground = self.left + (self.plateau - self.left) * _rise(first, self.left_edge, self.softness)
        ground = ground + (self.right - self.plateau) * _rise(first, self.right_edge, self.softness)
        return ground + (self.bump - ground) * self.bumps(x)

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return self.sign * self.height(x)

    def _offset(self, coordinate: Tensor, origin: float) -> Tensor:
        """Signed distance to the nearest of the points ``origin + k spacing``."""
        shifted = coordinate - origin
        return shifted - self.spacing * torch.round(shifted / self.spacing)

    @property
    def first_column(self) -> float:
        """Where along x the first bumps stand."""
        return self.right_edge + self.inset


@dataclass(frozen=True)
class Stripes(Zones):
    """Bumps that run all along y: narrow stripes."""

    def bumps(self, x: Tensor) -> Tensor:
        first = x[:, 0]
        inside = first > self.first_column - 0.5 * self.spacing
        return torch.where(inside, _bump(self._offset(first, self.first_column) ** 2, self.width), 0.0)


@dataclass(frozen=True)
class Spikes(Zones):
    """Bumps on a square lattice: sparse, thin spikes."""

    def bumps(self, x: Tensor) -> Tensor:
        inside = x[:, 0] > self.first_column - 0.5 * self.spacing
        squared = self._offset(x[:, 0], self.first_column) ** 2 + self._offset(x[:, 1], self.row) ** 2
        return torch.where(inside, _bump(squared, self.width), 0.0)


LANDSCAPES: dict[str, type[Zones]] = {"stripes": Stripes, "spikes": Spikes}


@dataclass(frozen=True)
class Slope(Reward):
    """A reward that grows along the diagonal ``s = (x + y) / sqrt(2)`` and levels off.

    ``height`` times a smooth step from 0 to 1. Moves along x and along y are worth the same, so that
    only a ground metric can favour one of them. Since it levels off, a mean reward less any multiple
    of a transport distance has a maximum, which a reward of constant slope does not have: the distribution
    would either stay or move without bound.

    Attributes:
        height: of the upper level; the lower one is 0.
        middle: where along s half of it is reached.
        softness: half-width of the step.
    """

    height: float
    middle: float
    softness: float

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return self.height * _rise(x.sum(1) / math.sqrt(2), self.middle, self.softness)


@dataclass(frozen=True)
class Rings(Reward):
    """``1 - d^2`` with d the distance to the nearest of some rings, as in FTFC's figure 1.

    Attributes:
        centres: of the rings.
        radius: of each.
    """

    centres: tuple[tuple[float, float], ...]
    radius: float

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        offsets = x[:, None] - x.new_tensor(self.centres)
        return 1 - (offsets.norm(dim=-1) - self.radius).square().amin(dim=1)


@dataclass(frozen=True)
class Cone(Reward):
    """``height`` times the distance to a centre: it grows in all directions and without end.

    Less a multiple of a transport distance it has no maximum in the plane, unless no move pays at all; steps
    of a KL weight from a given distribution are finite all the same.

    Attributes:
        height: at the distance 1 from the centre, which is its slope.
        centre: where the reward is 0.
    """

    height: float
    centre: tuple[float, float]

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return self.height * (x - x.new_tensor(self.centre)).norm(dim=1)


SLOPES: dict[str, type[Reward]] = {"slope": Slope, "rings": Rings, "cone": Cone}


@dataclass(frozen=True)
class Bowl(Reward):
    """Squared distance from a centre in units of a radius: the cost of a log barrier.

    Attributes:
        centre: of the bowl.
        radius: where its height is 1.
    """

    centre: tuple[float, float]
    radius: float

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return ((x - x.new_tensor(self.centre)) / self.radius).square().sum(1)
