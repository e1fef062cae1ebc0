"""The one interface that samplers and control solvers see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from flowtilt.interpolants import Interpolant, broadcast_time, convert, time_grid

Context = Any
"""What does not move along a trajectory (masks, prompts, guidance); opaque to solvers."""

Use = Literal["sampling", "adjoint", "control"]
"""What a solver uses a velocity for: trajectories, the lean adjoint, or the regression on it."""

PullBack = Callable[[Tensor], Tensor]
"""From a covector ``a`` at the velocity to ``(dv/dx)^T a``, both of the shape of the states."""


P = ParamSpec("P")
Result = TypeVar("Result")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block: without dropout, and the statistics of batches as they are.

    Each module of the models has its own mode back afterwards, also after an error.
    """
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def evaluated(
    function: Callable[Concatenate[FlowModel, P], Result],
) -> Callable[Concatenate[FlowModel, P], Result]:
    """A function that has the model, its first argument, in evaluation mode; see :func:`evaluating`."""

    @wraps(function)
    def wrapped(model: FlowModel, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with evaluating(model):
            return function(model, *args, **kwargs)

    return wrapped


class FlowModel(nn.Module, ABC):
    """A pretrained or fine-tuned flow: a prior, a velocity field and the path it was trained on.

    Attributes:
        path: the interpolant.
        data_variance: rough variance of the data, which sets the noise of the memoryless steps
            (see :func:`flowtilt.interpolants.memoryless_step`); 0 gives DDIM's.
        time_power: how much denser the steps of samplers and solvers are towards the data, see
            :func:`flowtilt.interpolants.time_grid`.
        quadratic_loss: whether :meth:`matching_loss` is the mean square of :meth:`matching_residual`.
        has_likelihood: whether :func:`flowtilt.sampling.log_likelihood` makes sense for it.
    """

    path: Interpolant
    data_variance: float = 0.0
    has_likelihood: bool = True
    quadratic_loss: bool = True
    time_power: float = 1.0

    @abstractmethod
    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        """Draw ``count`` states of the noise at time 0, shape (count, ...), in the type of the model."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Velocity of the probability flow at states ``x`` (batch, ...) and times ``t`` () or (batch,)."""

    def time_grid(self, steps: int) -> list[float]:
        """The ``steps + 1`` times at which samplers and solvers see the flow; see :func:`time_grid`.

        The first is the path's own start.
        """
        start, times = self.path.start, time_grid(steps, self.time_power)
        return times if start == 0 else [start + (1 - start) * t for t in times]

    def standard_normal(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers in the type of the model's weights, and on their device."""
        own = next(self.parameters(), torch.empty(0))  # the default's, without any
        return torch.randn(*shape, generator=generator, dtype=own.dtype, device=own.device)

    def noise_like(self, x: Tensor, generator: torch.Generator, context: Context = None) -> Tensor:
        """Standard normal noise in the space where the model's states live, shaped as ``x``."""
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    def score(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Score of the path's distribution at ``(x, t)``, 0 < t < 1, from the velocity."""
        return convert(self.velocity(x, t, context), x, t, self.path, "velocity", "score")

    def linearised(
        self, states: Tensor, times: Tensor, context: Context = None
    ) -> Callable[[int], tuple[Tensor, PullBack]]:
        """The velocity and the pull-back of its Jacobian at each step of some trajectories.

        Here by automatic differentiation, one step at a time when it is asked for. A model that knows its
        derivative may take all steps through its layers at once.

        Args:
            states: (steps, batch, ...).
            times: of the steps, (steps,).

        Returns:
            A function of the step's number, to its velocity (batch, ...), detached, and its pull-back.
        """

        def at(k: int) -> tuple[Tensor, PullBack]:
            x = states[k].detach().requires_grad_(True)
            with torch.enable_grad():
                v = self.velocity(x, times[k], context)

            def pull(a: Tensor) -> Tensor:
                if not v.requires_grad:  # a velocity that does not depend on x
                    return torch.zeros_like(a)
                # Of the product's sum: given a vector, autograd would import a symbolic algebra first.
                with torch.enable_grad():
                    product = (v * a).sum()
                return torch.autograd.grad(product, x, retain_graph=True)[0]

            return v.detach(), pull

        return at

    def draw_context(self, count: int, generator: torch.Generator) -> Context:
        """Draw the contexts of ``count`` new samples; models without one return ``None``."""
        return None

    def training_context(self, count: int, generator: torch.Generator) -> Context:
        """The contexts of ``count`` trajectories of a fine-tuning; by default as those of any samples."""
        return self.draw_context(count, generator)

    def select_context(self, context: Context, index: Tensor) -> Context:
        """The context of the samples at ``index`` (long, (n,)) of a batch."""
        return None

    def context_labels(self, context: Context) -> Tensor | None:
        """A whole number for the context of each sample, long (batch,), like contexts having like numbers.

        Samples of one number have the same distribution. The contexts' own distribution is given: tilts are
        normalised within each, see :mod:`flowtilt.tilts`. None if all samples have the same distribution.
        """
        return None

    def context_of(self, labels: Tensor) -> Context:
        """The context of samples by its numbers, long (batch,): the inverse of :meth:`context_labels`."""
        return None

    def context_for(self, use: Use, context: Context) -> Context:
        """The context of the same samples for what a solver uses the velocity for.

        A model under guidance may have another velocity in each; most have one, and this is ``context``.
        """
        return context

    def evaluations(self, use: Use) -> int:
        """Network passes of one velocity: two under guidance."""
        return 1

    def tunable(self) -> list[nn.Parameter]:
        """The parameters that a fine-tuning changes; by default all."""
        return list(self.parameters())

    def weights(self) -> dict[str, Tensor]:
        """What a fine-tuning changes, by name: the tensors themselves, which a checkpoint holds."""
        return self.state_dict()

    def header(self) -> dict[str, str]:
        """What a checkpoint must say beside its weights for them to mean what they do; mostly nothing."""
        return {}

    def check_header(self, header: Mapping[str, str]) -> None:
        """Refuse weights of a file whose header does not fit the model.

        Raises:
            ValueError: saying what does not fit.
        """

    def data_of(self, x: Tensor, context: Context = None) -> Tensor:
        """The data that endpoints of the flow stand for, of the shape of ``x``.

        They are data themselves, unless the flow is on a relaxation of something discrete.
        """
        return x

    def matching_loss(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """The model's native conditional flow-matching loss, one number a sample, (batch,).

        The mean square of :meth:`matching_residual`, which has the same arguments.
        """
        return self.matching_residual(x1, x0, t, context).flatten(1).square().mean(1)

    def matching_residual(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Prediction minus target of the native loss, of the shape of ``x1``.

        Args:
            x1: data, (batch, ...).
            t: times in (0, 1), (batch,).
        """
        at = broadcast_time(t, x1)
        x = self.path.alpha(at) * x1 + self.path.beta(at) * x0
        target = self.path.alpha_rate(at) * x1 + self.path.beta_rate(at) * x0
        return self.velocity(x, t, context) - target
