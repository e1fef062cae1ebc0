"""The velocity network of the planar experiments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtilt.interpolants import Interpolant, Prediction, broadcast_time, convert, rates
from flowtilt.model import Context, FlowModel, PullBack
from flowtilt.words import check_word

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "silu": F.silu}

# A covector at an activation's output, and its input, to the covector there.
PULL_BACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda a, h: torch.ops.aten.threshold_backward(a, h, 0),
    "silu": torch.ops.aten.silu_backward,
}


def _affine(linear: nn.Linear, h: Tensor) -> Tensor:
    """A layer on states with features first, (width, batch): a fifth faster for layers of this size."""
    return torch.addmm(linear.bias[:, None], linear.weight, h)


class PlanarFlow(FlowModel):
    """A multilayer perceptron on (x, y, t), whose output stands for a velocity or a score.

    Args:
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
        check_word(activation, FUNCTIONS, "the activation")
        check_word(prediction, Prediction, "a prediction")
        self.path = path
        self.prediction = prediction
        self.modes = modes
        self.activate = FUNCTIONS[activation]
        self.pull_back = PULL_BACKS[activation]
        sizes = [3 + modes, *widths]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return self.standard_normal(count, 2, generator=generator)

    def draw_context(self, count: int, generator: torch.Generator) -> Context:
        """Modes of new samples, all equally likely; None, without a draw, if the flow has none."""
        return torch.randint(self.modes, (count,), generator=generator) if self.modes else None

    def select_context(self, context: Context, index: Tensor) -> Context:
        return context[index] if self.modes else context

    def context_labels(self, context: Context) -> Tensor | None:
        """The modes."""
        return context if self.modes else None

    def context_of(self, labels: Tensor) -> Context:
        return labels if self.modes else None

    def predict(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """The network's own output at states (batch, 2), times () or (batch,) and modes long (batch,). Raises
        ValueError if the flow has modes, and the context is not one for each state."""
        first, *rest = self._linears()
        h = self._through(first, x, t, context)
        in_place = not torch.is_grad_enabled()  # nobody else holds h, unless a backward pass will need it
        for linear in rest:
            h = _affine(linear, self.activate(h, inplace=in_place))
        return h.T

    def _linears(self) -> list[nn.Linear]:
        """Used by functions and not by calls, which would take as long as these small layers do."""
        return [module for module in self.network if isinstance(module, nn.Linear)]

    def _through(self, first: nn.Linear, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """The first layer's output, features first, (width, batch)."""
        if t.ndim:
            inputs = torch.cat([x.T, t.reshape(1, -1)])
            h = torch.addmm(first.bias[:, None], first.weight[:, :3], inputs)
        else:  # one time for all goes into the bias
            h = torch.addmm((first.bias + t * first.weight[:, 2])[:, None], first.weight[:, :2], x.T)
        if self.modes:
            if not isinstance(context, Tensor) or context.shape != (len(x),):
                raise ValueError(
                    f"a planar flow of {self.modes} modes needs the mode of each of the {len(x)} samples as "
                    "their context; draw_context draws them"
                )
            h = h + first.weight[:, 3:][:, context]  # a product with one-hot columns
        return h

    def linearised(
        self, states: Tensor, times: Tensor, context: Context = None
    ) -> Callable[[int], tuple[Tensor, PullBack]]:
        """As for any model, with the chain rule through the layers by hand. A network this small spends most
        of a backward pass of autograd on bookkeeping."""
        if self.prediction not in ("velocity", "score"):
            return super().linearised(states, times, context)
        first, *rest = self._linears()

        @torch.no_grad()
        def at(k: int) -> tuple[Tensor, PullBack]:
            x, t = states[k], times[k]
            hidden = [self._through(first, x, t, context)]
            for linear in rest:
                hidden.append(_affine(linear, self.activate(hidden[-1])))
            output = hidden.pop().T
            scale = rates(self.path, t) if self.prediction == "score" else (0.0, 1.0)

            @torch.no_grad()
            def pull(a: Tensor) -> Tensor:
                pulled = a.T
                for linear, h in zip(reversed(rest), reversed(hidden), strict=True):
                    pulled = self.pull_back(linear.weight.T @ pulled, h)
                return scale[0] * a + scale[1] * (first.weight[:, :2].T @ pulled).T

            return scale[0] * x + scale[1] * output, pull

        return at

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
