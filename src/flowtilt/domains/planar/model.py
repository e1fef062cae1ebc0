"""The velocity network of the planar experiments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtilt.interpolants import Interpolant, Prediction, broadcast_time, convert
from flowtilt.model import Context, FlowModel

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}


class PlanarFlow(FlowModel):
    """A multilayer perceptron on (x, y, t), whose output stands for a velocity or a score.

    Args:
        path: the interpolant.
        widths: sizes of the hidden layers; FDC's official code has 512, 512, 256.
        activation: ``relu`` or ``silu``.
        prediction: what the network puts out. A score is smooth up to the data on the
            variance-preserving path; a velocity is finite everywhere on the linear one.
    """

    data_variance = 1.0

    def __init__(
        self,
        path: Interpolant,
        widths: Sequence[int] = (512, 512, 256),
        activation: Literal["relu", "silu"] = "relu",
        prediction: Prediction = "score",
    ) -> None:
        super().__init__()
        self.path = path
        self.prediction = prediction
        self.activate = FUNCTIONS[activation]
        sizes = [3, *widths]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return torch.randn(count, 2, generator=generator)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's own output at states (batch, 2) and times () or (batch,)."""
        # By functions and not by calls of the modules, which take as long as these small layers do.
        first, *rest = (module for module in self.network if isinstance(module, nn.Linear))
        if t.ndim:
            h = F.linear(torch.cat([x, t.reshape(-1, 1)], dim=1), first.weight, first.bias)
        else:  # one time for all goes into the bias
            h = F.linear(x, first.weight[:, :2], first.bias + t * first.weight[:, 2])
        for linear in rest:
            h = F.linear(self.activate(h), linear.weight, linear.bias)
        return h

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        return convert(self.predict(x, t), x, t, self.path, self.prediction, "velocity")

    def matching_residual(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Flow matching in the units of the output: noise for a score network, else velocity.

        Velocity targets diverge at the data end of the variance-preserving path; the same
        regression weighted as a noise prediction (Ho et al. 2020) does not.
        """
        if self.prediction in ("velocity", "endpoint"):
            return super().matching_residual(x1, x0, t, context)
        at = broadcast_time(t, x1)
        x = self.path.alpha(at) * x1 + self.path.beta(at) * x0
        noise = convert(self.predict(x, t), x, t, self.path, self.prediction, "noise")
        return noise - x0
