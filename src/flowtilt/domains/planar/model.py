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
        modes: how many modes the flow is conditional on, 0 for none. Its context is then the mode of
            each sample, long (batch,), which the network sees as further inputs, one for each mode.
    """

    data_variance = 1.0

    def __init__(
        self,
        path: Interpolant,
        widths: Sequence[int] = (512, 512, 256),
        activation: Literal["relu", "silu"] = "relu",
        prediction: Prediction = "score",
        modes: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.prediction = prediction
        self.modes = modes
        self.activate = FUNCTIONS[activation]
        sizes = [3 + modes, *widths]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return torch.randn(count, 2, generator=generator)

    def draw_context(self, count: int, generator: torch.Generator) -> Context:
        """Modes of new samples, all equally likely; None, without a draw, if the flow has none."""
        return torch.randint(self.modes, (count,), generator=generator) if self.modes else None

    def select_context(self, context: Context, index: Tensor) -> Context:
        return context[index] if self.modes else context

    def predict(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """The network's own output at states (batch, 2), times () or (batch,) and modes long (batch,).

        Raises:
            ValueError: if the flow has modes, and the context is not one for each state.
        """
        # By functions and not by calls of the modules, which take as long as these small layers do.
        first, *rest = (module for module in self.network if isinstance(module, nn.Linear))
        if t.ndim:
            h = F.linear(torch.cat([x, t.reshape(-1, 1)], dim=1), first.weight[:, :3], first.bias)
        else:  # one time for all goes into the bias
            h = F.linear(x, first.weight[:, :2], first.bias + t * first.weight[:, 2])
        if self.modes:
            if not isinstance(context, Tensor) or context.shape != (len(x),):
                raise ValueError(
                    f"a planar flow of {self.modes} modes needs the mode of each of the {len(x)} samples as "
                    "their context; draw_context draws them"
                )
            h = h + F.embedding(context, first.weight[:, 3:].T)  # a product with one-hot rows
        for linear in rest:
            h = F.linear(self.activate(h), linear.weight, linear.bias)
        return h

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        return convert(self.predict(x, t, context), x, t, self.path, self.prediction, "velocity")

    def matching_residual(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Flow matching in the units of the output: noise for a score network, else velocity.

        Velocity targets diverge at the data end of the variance-preserving path; the same
        regression weighted as a noise prediction (Ho et al. 2020) does not.
        """
        if self.prediction in ("velocity", "endpoint"):
            return super().matching_residual(x1, x0, t, context)
        at = broadcast_time(t, x1)
        x = self.path.alpha(at) * x1 + self.path.beta(at) * x0
        noise = convert(self.predict(x, t, context), x, t, self.path, self.prediction, "noise")
        return noise - x0
