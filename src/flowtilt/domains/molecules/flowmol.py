"""FlowMol (Dunn and Koes 2024) as a base model; its package is imported only when it is chosen.

The flow is on coordinates x, atom types a, formal charges c and bond orders e, each on a path of its own,
and FlowMol's network predicts the endpoint of all. The models of its Gaussian kind are flows in the sense of
:class:`flowtilt.model.FlowModel`: categories are vectors with Gaussian noise, and the predicted endpoint is
their probabilities. Its other kinds move categories by jumps, or on a simplex, and are refused.

Time is that in which the coordinates are on the straight path. FlowMol's own rests at both ends; the
distribution of the state at a given alpha is the same in both.

Weights are those that :mod:`flowtilt.domains.molecules.flowmol_weights` has converted.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtilt.domains.molecules.adapters import AdaptedFlow
from flowtilt.domains.molecules.energies import Decoder, TypeShares
from flowtilt.domains.molecules.model import mask_of
from flowtilt.domains.molecules.states import ATOMIC_NUMBERS, ELEMENTS, centred
from flowtilt.files import one_line
from flowtilt.interpolants import Columnwise, Cosine, Interpolant, Linear, broadcast_time
from flowtilt.model import Context

GAUSSIAN_KINDS = "one of the Gaussian kind, as qm9_gaussian"


class FlowMolError(RuntimeError):
    """FlowMol cannot be used; the message names the key and the fix."""


def imported(module: str) -> Any:
    """A module of FlowMol's, or one that it needs. Raises FlowMolError if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # builds of dgl for another torch raise errors of the system and others
        raise FlowMolError(
            f"key model.kind is flowmol, whose package cannot be imported ({one_line(error)}); "
            "install FlowMol, with dgl and torch_scatter, from its repository Dunni3/FlowMol, or set the key "
            "to equivariant"
        ) from None


@dataclass(frozen=True)
class Description:
    """What a model of FlowMol's is.

    Attributes:
        parameterization: FlowMol's word for its kind: ``endpoint`` for the Gaussian and the simplex ones.
        elements: symbols of the atom types, in the order of their columns.
        bonds: number of bond orders, none included.
        priors: of each feature, the name and the arguments of FlowMol's function.
    """

    name: str
    parameterization: str
    elements: tuple[str, ...]
    charges: int
    bonds: int
    priors: Mapping[str, tuple[str, Mapping[str, Any]]]
    schedules: Mapping[str, tuple[str, float]]
    network: Mapping[str, Any]

    def encoded(self) -> Tensor:
        """As bytes, (length,), that a checkpoint of tensors can hold."""
        return torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8)

    @classmethod
    def decoded(cls, encoded: Tensor) -> Description:
        """The reverse of :meth:`encoded`."""
        fields = json.loads(bytes(encoded.tolist()))
        return cls(**fields | {"elements": tuple(fields["elements"])})

    def check(self) -> None:
        """See to it that the model is a flow with Gaussian noise, on elements that have an energy. Raises
        FlowMolError if it is not."""
        where = f"key model.name: {self.name!r}"
        if self.parameterization != "endpoint":
            raise FlowMolError(
                f"{where} is of FlowMol's kind {self.parameterization}, which has no Gaussian path that an "
                f"adjoint could be solved along; name {GAUSSIAN_KINDS}, or set key model.kind to equivariant"
            )
        absent = [feature for feature in "xace" if feature not in self.schedules]
        if absent:
            raise FlowMolError(f"{where} has no feature {', '.join(absent)}; name {GAUSSIAN_KINDS}")
        for feature, (kind, arguments) in self.priors.items():
            expected, std = ("centered-normal", 4.0) if feature == "x" else ("gaussian", 1.0)  # its defaults
            if kind != expected or arguments.get("std", std) != 1 or arguments.get("simplex_center", False):
                raise FlowMolError(
                    f"{where} starts its feature {feature} from {kind} with {dict(arguments)}, not from the "
                    f"standard normal noise that the solvers assume; name {GAUSSIAN_KINDS}"
                )
        for feature in self.schedules:
            self.path_of(feature)
        unknown = [symbol for symbol in self.elements if symbol not in ELEMENTS]
        if unknown:
            raise FlowMolError(
                f"{where} has the elements {', '.join(unknown)}, for which there is no reward, only for "
                f"{', '.join(ELEMENTS)}; name a model of QM9, as qm9_gaussian"
            )

    def path_of(self, feature: str) -> Interpolant:
        """The path of one feature, in the time in which the coordinates' is the straight one. Raises
        FlowMolError if its schedule is not supported."""
        (kind, nu), (of_coordinates, slowest) = self.schedules[feature], self.schedules["x"]
        if kind == of_coordinates == "linear" or (kind == of_coordinates == "cosine" and nu == slowest > 0):
            return Linear()
        if kind == of_coordinates == "cosine" and nu > slowest > 0:
            return Cosine(nu / slowest)
        raise FlowMolError(
            f"key model.name: {self.name!r} has the schedule {kind} (nu {nu}) for its feature {feature}, and "
            f"that of its coordinates is {of_coordinates} (nu {slowest}); supported are linear for all, or "
            f"cosine with nu of at least that of the coordinates; name {GAUSSIAN_KINDS}"
        )

    def own_time(self, t: Tensor) -> Tensor:
        """FlowMol's time, which its network was trained with, of the solvers' time."""
        kind, nu = self.schedules["x"]
        if kind == "linear":
            return t
        return (2 / math.pi * torch.asin(torch.sqrt(t))) ** (1 / nu)


@dataclass(frozen=True)
class Layout:
    """Where the features of a molecule stand in its state, one flat vector: all x, all a, all c, all e.

    Attributes:
        atoms: the largest number; rows of those that a molecule has not are zero.
        widths: columns of an atom's x, a and c, and of a pair's e.
    """

    atoms: int
    widths: tuple[int, int, int, int]

    @cached_property
    def pairs(self) -> Tensor:
        """First and second atom of each pair, the first being the smaller, long, (2, pairs)."""
        return torch.triu_indices(self.atoms, self.atoms, offset=1)

    @cached_property
    def sizes(self) -> list[int]:
        """Columns of the state that each feature takes."""
        rows = [self.atoms] * 3 + [self.pairs.shape[1]]
        return [row * width for row, width in zip(rows, self.widths, strict=True)]

    def split(self, x: Tensor) -> list[Tensor]:
        """The features of states (batch, columns): x, a, c (batch, atoms, width), e (batch, pairs, width)."""
        parts = x.split(self.sizes, dim=1)
        return [part.unflatten(1, (-1, width)) for part, width in zip(parts, self.widths, strict=True)]

    def join(self, features: list[Tensor]) -> Tensor:
        """States of features, the reverse of :meth:`split`."""
        return torch.cat([feature.flatten(1) for feature in features], dim=1)

    def masks(self, mask: Tensor) -> list[Tensor]:
        """Which rows of each feature there are, from which atoms there are, (batch, rows)."""
        first, second = self.pairs.to(mask.device)
        return [mask, mask, mask, mask[:, first] & mask[:, second]]


class FlowMolFlow(AdaptedFlow):
    """A model of FlowMol's Gaussian kind, in the states of :class:`Layout`, coordinates in ångström.

    On each path ``alpha + beta = 1``, so that a predicted endpoint y is the velocity
    ``alpha' / beta (y - x)``. The context is the mask of atoms, bools, (batch, atoms), of any number of
    columns up to the largest.

    Args:
        size_weights: how often each number of atoms occurs, from 0 to the largest, (largest + 1,).
        time_power: see :class:`flowtilt.model.FlowModel`.
    """

    data_variance = 0.0
    has_likelihood = False
    quadratic_loss = False

    size_weights: Tensor

    # Description and sizes are in the checkpoint, so that one file, fine-tuned or not, is all that is needed.
    def __init__(
        self, description: Description, network: nn.Module, size_weights: Tensor, time_power: float = 1.0
    ) -> None:
        super().__init__()
        widths = (3, len(description.elements), description.charges, description.bonds)
        self.layout = Layout(len(size_weights) - 1, widths)
        self.path = Columnwise(tuple(zip(map(description.path_of, "xace"), self.layout.sizes, strict=True)))
        self.time_power = time_power
        self.own_time = description.own_time
        self.vector_field = network.eval()
        self.register_buffer("size_weights", size_weights.double())
        self.register_buffer("description", description.encoded())

    def draw_context(self, count: int, generator: torch.Generator) -> Tensor:
        """Masks of ``count`` molecules, their sizes drawn as FlowMol draws them, (count, largest)."""
        return self.context_of(torch.multinomial(self.size_weights, count, True, generator=generator))

    def context_of(self, labels: Tensor) -> Tensor:
        """Masks of molecules of given numbers of atoms, long, (count,)."""
        return torch.arange(self.layout.atoms, device=labels.device) < labels[:, None]

    def select_context(self, context: Context, index: Tensor) -> Tensor:
        return mask_of(context)[index]

    def context_labels(self, context: Context) -> Tensor:
        """Numbers of atoms."""
        return mask_of(context).sum(1)

    def _masks(self, context: Context) -> list[Tensor]:
        mask = mask_of(context)
        return self.layout.masks(F.pad(mask, (0, self.layout.atoms - mask.shape[1])))

    def _in_subspace(self, x: Tensor, masks: list[Tensor]) -> Tensor:
        """States with their centres of mass and their padding at zero."""
        coordinates, *others = self.layout.split(x)
        rest = [part * mask.unsqueeze(2) for part, mask in zip(others, masks[1:], strict=True)]
        return self.layout.join([centred(coordinates, masks[0]), *rest])

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        noise = self.standard_normal(count, sum(self.layout.sizes), generator=generator)
        return self._in_subspace(noise, self._masks(context))

    def noise_like(self, x: Tensor, generator: torch.Generator, context: Context = None) -> Tensor:
        return self._in_subspace(super().noise_like(x, generator), self._masks(context))

    def predict(self, x: Tensor, t: Tensor, masks: list[Tensor], probabilities: bool) -> list[Tensor]:
        """Endpoint of the coordinates, and probabilities or logits of the categories, of the rows there are.

        Args:
            x: states, (batch, columns).
            t: times, () or (batch,).
            probabilities: whether categories are given by them.
        """
        features = [part[mask] for part, mask in zip(self.layout.split(x), masks, strict=True)]
        atoms, pairs = masks[0], masks[3]
        number = atoms.flatten().cumsum(0).view_as(atoms) - 1  # of each atom in the graph of the whole batch
        first, second = (number[:, side][pairs] for side in self.layout.pairs.to(x.device))
        graph = imported("dgl").graph(
            (torch.cat([first, second]), torch.cat([second, first])), num_nodes=int(atoms.sum())
        )
        for name, feature in zip("xac", features[:3], strict=True):
            graph.ndata[f"{name}_t"] = feature
        graph.edata["e_t"] = torch.cat([features[3], features[3]])
        found = self.vector_field(
            graph,
            self.own_time(t).expand(len(x)),
            node_batch_idx=atoms.nonzero()[:, 0],
            upper_edge_mask=torch.arange(2 * len(first), device=x.device) < len(first),
            apply_softmax=probabilities,
            remove_com=False,
        )
        return [found[name] for name in "xace"]

    def endpoint(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """The predicted mean of the endpoint, of the shape of ``x``, at times () or (batch,)."""
        masks = self._masks(context)
        filled = []
        for rows, mask in zip(self.predict(x, t, masks, True), masks, strict=True):
            filled.append(rows.new_zeros(*mask.shape, rows.shape[1]).masked_scatter(mask.unsqueeze(2), rows))
        return self._in_subspace(self.layout.join(filled), masks)

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        at = broadcast_time(t, x)
        rate = self.path.alpha_rate(at) / self.path.beta(at)
        # Near the data the rate magnifies what rounding leaves of the centre of mass.
        return self._in_subspace(rate * (self.endpoint(x, t, context) - x), self._masks(context))

    def data_of(self, x: Tensor, context: Context = None) -> Tensor:
        """The molecules of ``x``: types, charges and bonds that their largest columns say."""
        coordinates, *categories = self.layout.split(x)
        discrete = [F.one_hot(part.argmax(2), part.shape[2]).to(x) for part in categories]
        return self._in_subspace(self.layout.join([coordinates, *discrete]), self._masks(context))

    def matching_loss(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Mean square of the coordinates' endpoint and cross entropies of the categories, (batch,).

        Each is a mean over the rows of its feature, times ``alpha / beta`` between 0.05 and 1.5, the weight
        of time that FlowMol was trained with.
        """
        at, masks = broadcast_time(t, x1), self._masks(context)
        alpha, beta = self.path.alpha(at), self.path.beta(at)
        weights = (alpha / beta).clamp(0.05, 1.5)
        predicted = self.predict(alpha * x1 + beta * x0, t, masks, False)
        total = torch.zeros_like(x1[:, 0])
        parts = zip(predicted, self.layout.split(x1), self.layout.split(weights), masks, strict=True)
        for k, (found, target, weight, mask) in enumerate(parts):
            if k == 0:
                losses = (found - target[mask]).square().mean(1)
            else:
                losses = F.cross_entropy(found, target[mask], reduction="none")
            rows = torch.zeros_like(weight[..., 0]).masked_scatter(mask, losses)
            total = total + (weight[..., 0] * rows).sum(1) / mask.sum(1).clamp(min=1)
        return total


def decoder(description: Description, layout: Layout) -> Decoder:
    """From states of a layout, with their mask as context, to coordinates and atomic numbers.

    The type of an atom is its largest type column. Charges and bonds are not asked for: the energy is a
    function of nuclei and of the whole molecule's charge, which is the reward's setting.
    """
    numbers = torch.tensor([ATOMIC_NUMBERS[ELEMENTS.index(symbol)] for symbol in description.elements])

    def decode(x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        mask = mask_of(context)
        coordinates, types = (part[:, : mask.shape[1]] for part in layout.split(x)[:2])
        return coordinates * mask.unsqueeze(2), numbers.to(x.device)[types.argmax(2)] * mask

    return decode


def type_shares(description: Description, layout: Layout) -> TypeShares:
    """Of states of a layout, with their mask as context: the columns of their atom types."""
    columns = torch.tensor([ELEMENTS.index(symbol) for symbol in description.elements])

    def shares(x: Tensor, context: Context) -> Tensor:
        mask = mask_of(context)
        types = layout.split(x)[1][:, : mask.shape[1]] * mask.unsqueeze(2)
        found = types.new_zeros(*types.shape[:2], len(ELEMENTS))
        return found.index_add(2, columns.to(x.device), types)

    return shares
