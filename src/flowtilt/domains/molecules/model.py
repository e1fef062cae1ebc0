"""The flow on molecules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowtilt.domains.molecules.adapters import AdaptedFlow
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.domains.molecules.network import EquivariantNetwork
from flowtilt.domains.molecules.sections import MoleculeNetworkConfig, UnitsConfig
from flowtilt.domains.molecules.states import ELEMENTS, WIDTH, centred, pack, unpack
from flowtilt.interpolants import Interpolant, Linear, broadcast_time, convert, time_grid
from flowtilt.model import Context


class MoleculeFlow(AdaptedFlow):
    """An equivariant flow on coordinates and atom types, in the states of :mod:`.states`.

    The network predicts the endpoint: the mean of the coordinates given the noisy state, and the
    probabilities of the types. Coordinates are preconditioned as by Karras et al. (2022, table 1), for data
    of unit variance on the linear path: with ``s = sqrt(t^2 + (1 - t)^2)`` the network sees ``x / s`` and
    gives ``F`` of ``y = (t / s^2) x + ((1 - t) / s) F``, whose target has unit variance at every time.

    The context is the mask of atoms, bools, (batch, atoms).

    Args:
        size_weights: how often each number of atoms occurs, from 0 to the largest, (largest + 1,).
        type_weight: of the types' cross entropy in the loss, beside the coordinates' mean square.
        time_power: see :class:`flowtilt.model.FlowModel`.
    """

    data_variance = 0.0
    has_likelihood = False
    quadratic_loss = False

    size_weights: Tensor

    def __init__(
        self,
        settings: MoleculeNetworkConfig,
        units: UnitsConfig,
        size_weights: Tensor,
        type_weight: float = 1.0,
        time_power: float = 1.0,
    ) -> None:
        super().__init__()
        self.path = Linear()
        self.units = units
        self.type_weight = type_weight
        self.time_power = time_power
        self.network = EquivariantNetwork(settings, len(ELEMENTS), len(ELEMENTS))
        # In the checkpoint, so that sampling needs no data.
        self.register_buffer("size_weights", size_weights.double())

    @property
    def atoms(self) -> int:
        """The largest number of atoms."""
        return len(self.size_weights) - 1

    def draw_context(self, count: int, generator: torch.Generator) -> Tensor:
        """Masks of ``count`` molecules, their sizes drawn as they occur in the data, (count, atoms)."""
        return self.context_of(torch.multinomial(self.size_weights, count, True, generator=generator))

    def context_of(self, labels: Tensor) -> Tensor:
        """Masks of molecules of given numbers of atoms, long, (count,). Raises ValueError if the data have no
        molecule of one of the sizes."""
        known = self.size_weights.nonzero().flatten()
        unknown = sorted(set(labels.tolist()) - set(known.tolist()))
        if unknown:
            raise ValueError(
                f"no training example has {', '.join(map(str, unknown))} atoms; "
                f"ask for sizes among {', '.join(map(str, known.tolist()))}"
            )
        return torch.arange(self.atoms, device=labels.device) < labels[:, None]

    def select_context(self, context: Context, index: Tensor) -> Tensor:
        return mask_of(context)[index]

    def context_labels(self, context: Context) -> Tensor:
        """Numbers of atoms."""
        return mask_of(context).sum(1)

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        mask = mask_of(context)
        return _in_subspace(self.standard_normal(count, mask.shape[1], WIDTH, generator=generator), mask)

    def noise_like(self, x: Tensor, generator: torch.Generator, context: Context = None) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return _in_subspace(noise, mask_of(context))

    def predict(self, x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network says of states (batch, atoms, 3 + types) at times () or (batch,).

        Returns:
            Coordinates of the endpoint (batch, atoms, 3), logits of the types (batch, atoms, types), and the
            scale of the coordinates' error, ``(1 - t) / s``, (batch, 1, 1).
        """
        t = t.expand(len(x)) if t.ndim == 0 else t
        at = broadcast_time(t, x)
        scale = torch.sqrt(at**2 + (1 - at) ** 2)
        positions = centred(x[..., :3], mask)
        vectors, logits = self.network(positions / scale, x[..., 3:] / scale, t[:, None], mask)
        error = (1 - at) / scale
        coordinates = at / scale**2 * positions + error * centred(vectors, mask)
        # What an atom's own noisy type says of it is a Gaussian likelihood ratio, bounded near the data.
        own = at * self.units.type_scale / ((1 - at) ** 2 + 1e-3) * x[..., 3:]
        return coordinates, logits + own, error

    def endpoint(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """The predicted mean of the endpoint, of the shape of ``x``, at times () or (batch,)."""
        mask = mask_of(context)
        coordinates, logits, _ = self.predict(x, t, mask)
        types = self.units.type_scale * torch.softmax(logits, dim=2) * mask.unsqueeze(2)
        return torch.cat([coordinates, types], dim=2)

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        velocity = convert(self.endpoint(x, t, context), x, t, self.path, "endpoint", "velocity")
        # Near the data the conversion magnifies what rounding leaves of the centre of mass.
        return _in_subspace(velocity, context)

    def data_of(self, x: Tensor, context: Context = None) -> Tensor:
        """The molecules of ``x``: each atom of the type that its largest column says."""
        mask = mask_of(context)
        return pack(*unpack(x, mask, self.units), mask, self.units)

    def matching_loss(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Mean square of the coordinates' preconditioned error and cross entropy of the types, (batch,).

        Both are means over a molecule's atoms, and have their minimum at the mean of the endpoint, as has
        the mean square of :meth:`matching_residual`, which is that of velocities.
        """
        at, mask = broadcast_time(t, x1), mask_of(context)
        coordinates, logits, error = self.predict(at * x1 + (1 - at) * x0, t, mask)
        squares = ((coordinates - x1[..., :3]) / error).square().sum(2) / 3
        cross = -(x1[..., 3:] / self.units.type_scale * F.log_softmax(logits, dim=2)).sum(2)
        return ((squares + self.type_weight * cross) * mask).sum(1) / mask.sum(1)


def mask_of(context: Context) -> Tensor:
    """The mask of atoms, which a flow on molecules does nothing without."""
    if not isinstance(context, Tensor):
        raise TypeError(
            f"a flow on molecules needs the mask of atoms as its context, not {type(context).__name__}; "
            "draw one with draw_context"
        )
    return context


def _in_subspace(x: Tensor, mask: Tensor) -> Tensor:
    """States with their centres of mass and their padding at zero."""
    return torch.cat([centred(x[..., :3], mask), x[..., 3:] * mask.unsqueeze(2)], dim=2)


def process(experiment: MoleculeExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...], float]:
    """What solvers follow: the path of the coordinates, the times, and the data variance of the steps."""
    return Linear(), tuple(time_grid(steps, experiment.time_power)), MoleculeFlow.data_variance
