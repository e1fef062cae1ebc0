"""An E(3)-equivariant network on molecules: scalars and vectors on atoms, scalars on pairs of atoms.

Three kinds of features pass through every layer: scalars ``h`` (batch, atoms, width) and vectors ``v``
(batch, atoms, 3, vectors) of atoms, and scalars ``e`` (batch, atoms, atoms, pair width) of ordered pairs.
Pairs see the scalars of both atoms and the inner products of their vectors; atoms gather from pairs by
attention and by a sum. Vectors are made of differences of positions and of each other, with
coefficients that are invariant, so that the whole is equivariant under rotations and reflections
(as in Schütt et al. 2021, PaiNN, with the attention over vectors of Irwin et al. 2025, SemlaFlow).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtilt.domains.molecules.sections import MoleculeNetworkConfig

TIMES = 16
"""Features of a time."""

SOFTENING = 1e-6
"""Added to squared lengths, so that their roots have gradients at zero."""


def time_features(t: Tensor) -> Tensor:
    """Features of times of shape (batch, 1), (batch, TIMES): cosines, and the logarithm of the noise."""
    waves = torch.cos(math.pi * t * torch.arange(TIMES - 1).to(t))
    return torch.cat([waves, torch.log(1 - t + 1e-3) / 3], dim=1)


@dataclass(frozen=True)
class Geometry:
    """What stays the same through all layers.

    Attributes:
        positions: (batch, atoms, 3).
        pairs: 1 for pairs of two different atoms, else 0, (batch, atoms, atoms, 1).
        attended: 0 where the second of a pair is an atom, else minus infinity, (batch, 1, atoms, 1).
        shrink: ``1 / (1 + distance)`` of pairs of two different atoms, else 0, (batch, atoms, atoms, 1).
    """

    positions: Tensor
    pairs: Tensor
    attended: Tensor
    shrink: Tensor


class Layer(nn.Module):
    """One round of exchange between atoms."""

    def __init__(self, settings: MoleculeNetworkConfig, last: bool) -> None:
        super().__init__()
        width, vectors, pair = settings.width, settings.vectors, settings.pair_width
        self.heads, self.vectors, self.pair = settings.heads, vectors, pair
        self.norm = nn.LayerNorm(width)
        self.ends = nn.Linear(width, 2 * pair)
        self.probes = nn.Linear(vectors, 2 * settings.heads, bias=False)
        self.products = nn.Linear(settings.heads, pair, bias=False)
        # Of a pair's hidden features: its attention, its part in each vector, and its own update.
        self.carry = 0 if last else pair
        self.read = nn.Linear(pair, settings.heads + vectors + self.carry, bias=False)
        self.values = nn.Linear(width, width)
        self.vector_values = nn.Linear(vectors, vectors, bias=False)
        self.lengths = nn.Linear(vectors, vectors, bias=False)
        self.node = nn.Sequential(
            nn.Linear(2 * width + pair + vectors, 2 * width), nn.SiLU(), nn.Linear(2 * width, width + vectors)
        )
        self.mix = nn.Linear(vectors, vectors, bias=False)

    def forward(self, h: Tensor, v: Tensor, e: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
        """Scalars, vectors and pairs after the exchange, of the shapes they had."""
        s = self.norm(h)
        u = v * torch.rsqrt(3 * v.square().mean((2, 3), keepdim=True) + SOFTENING)
        hidden = self._pairs(s, u, e)
        logits, coefficients, carried = self.read(hidden).split([self.heads, self.vectors, self.carry], dim=3)
        scalars, vectors = self._attend(s, u, logits + geometry.attended)
        v = v + self.mix(vectors + _along_offsets(coefficients * geometry.shrink, geometry.positions))
        lengths = torch.sqrt(self.lengths(v).square().sum(2) + SOFTENING)
        # A quarter of the sum over a dozen atoms is of the size of the other features.
        pooled = (geometry.pairs.transpose(2, 3) @ hidden).squeeze(2) / 4
        update = self.node(torch.cat([s, scalars, pooled, lengths], dim=2))
        change, gate = update.split([h.shape[2], self.vectors], dim=2)
        return h + change, v * (1 + gate.tanh().unsqueeze(2)), e + carried if self.carry else e

    def _pairs(self, s: Tensor, u: Tensor, e: Tensor) -> Tensor:
        """Hidden features of pairs, of the shape of ``e``, from both atoms and what the pair has."""
        first, second = self.ends(s).split(self.pair, dim=2)
        left, right = self.probes(u).split(self.heads, dim=3)
        inner = (left.permute(0, 3, 1, 2) @ right.permute(0, 3, 2, 1)).permute(0, 2, 3, 1)
        return F.silu(e + first.unsqueeze(2) + second.unsqueeze(1) + self.products(inner))

    def _attend(self, s: Tensor, u: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's means of the other atoms' scalars and vectors, in the shapes of ``s`` and ``u``."""
        batch, atoms, width = s.shape
        # Over the last dimension but one, which leaves the heads to be treated together.
        attention = torch.softmax(logits, dim=2).permute(0, 3, 1, 2)
        values = self.values(s).view(batch, atoms, self.heads, -1)
        vector_values = self.vector_values(u).view(batch, atoms, 3, self.heads, -1)
        together = torch.cat([values, vector_values.permute(0, 1, 3, 2, 4).flatten(3)], dim=3)
        gathered = attention @ together.transpose(1, 2)
        scalars, vectors = gathered.split([width // self.heads, 3 * self.vectors // self.heads], dim=3)
        vectors = vectors.unflatten(3, (3, -1)).permute(0, 2, 3, 1, 4).flatten(3)
        return scalars.transpose(1, 2).flatten(2), vectors


def _along_offsets(coefficients: Tensor, positions: Tensor) -> Tensor:
    """``sum_j c_ij (r_i - r_j)`` without the differences themselves, (batch, atoms, 3, vectors).

    Args:
        coefficients: ``c``, (batch, atoms, atoms, vectors).
        positions: ``r``, (batch, atoms, 3).
    """
    towards = torch.einsum("bijk,bjc->bick", coefficients, positions)
    return positions.unsqueeze(3) * coefficients.sum(2).unsqueeze(2) - towards


class EquivariantNetwork(nn.Module):
    """From noisy molecules to a vector and scalars for each atom."""

    def __init__(self, settings: MoleculeNetworkConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reach, self.radial = settings.reach, settings.radial
        self.embed = nn.Linear(inputs + TIMES + 1, settings.width)
        self.embed_vectors = nn.Linear(1, settings.vectors, bias=False)
        self.embed_pairs = nn.Linear(settings.radial + 1, settings.pair_width)
        last = settings.layers - 1
        self.layers = nn.ModuleList(Layer(settings, last=k == last) for k in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        self.scalars = nn.Linear(settings.width, outputs)
        self.vectors = nn.Linear(settings.vectors, 1, bias=False)
        for layer in (self.scalars, self.vectors):
            nn.init.zeros_(layer.weight)

    def forward(self, positions: Tensor, scalars: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (batch, atoms, 3) and scalars (batch, atoms, outputs); any value in padding.

        Args:
            positions: relative to a centre that moves with the molecule, (batch, atoms, 3).
            scalars: (batch, atoms, inputs).
            t: times, (batch, 1).
            mask: which rows are atoms, (batch, atoms).
        """
        geometry, distances = self._geometry(positions, mask)
        e = self.embed_pairs(self._radial_basis(distances))
        size = mask.sum(1, keepdim=True).to(t) / 10  # of order one
        shared = torch.cat([time_features(t), size], dim=1).unsqueeze(1).expand(-1, scalars.shape[1], -1)
        h = self.embed(torch.cat([scalars, shared], dim=2))
        v = self.embed_vectors(positions.unsqueeze(3))
        for layer in self.layers:
            h, v, e = layer(h, v, e, geometry)
        return self.vectors(v).squeeze(3), self.scalars(self.norm(h))

    @staticmethod
    def _geometry(positions: Tensor, mask: Tensor) -> tuple[Geometry, Tensor]:
        """The geometry, and the distances of all pairs, (batch, atoms, atoms, 1)."""
        offsets = positions.unsqueeze(2) - positions.unsqueeze(1)
        distances = torch.sqrt(offsets.square().sum(3, keepdim=True) + SOFTENING)
        same = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        both = mask.unsqueeze(2) & mask.unsqueeze(1) & ~same
        pairs = both.unsqueeze(3).to(positions)
        attended = torch.zeros_like(positions[..., :1]).masked_fill(~mask.unsqueeze(2), -torch.inf)
        return Geometry(positions, pairs, attended.unsqueeze(1), pairs / (1 + distances)), distances

    def _radial_basis(self, distances: Tensor) -> Tensor:
        """Gaussians of the distances, and the distances themselves."""
        centres = torch.linspace(0, self.reach, self.radial).to(distances)
        # Further out than seven spreads the exponentials are nothing, and as denormal numbers slow.
        spread = self.reach / (self.radial - 1)
        bumps = torch.exp(-0.5 * ((distances - centres) / spread).clamp(-7, 7) ** 2)
        return torch.cat([bumps, distances / self.reach], dim=3)
