"""Where the lean adjoint starts: estimates of the tilt's gradient at the ends of trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowtilt.functionals.base import FirstVariation
from flowtilt.interpolants import MemorylessStep
from flowtilt.model import Context, FlowModel, evaluated
from flowtilt.words import check_word

EndpointGradient = Literal["pathwise", "likelihood_ratio"]


@dataclass(frozen=True)
class Terminal:
    """Terminal values of the lean adjoint.

    Attributes:
        end: at the last states, (batch, ...).
        before: what is added at the states before the last, (batch, ...), if anything.
    """

    end: Tensor
    before: Tensor | None = None

    @property
    def moving(self) -> Tensor:
        """Samples on which it is not zero, bool (batch,)."""
        moving = self.end.flatten(1).any(1)
        return moving if self.before is None else moving | self.before.flatten(1).any(1)

    def select(self, index: Tensor) -> Terminal:
        """That of the samples at ``index``."""
        return Terminal(self.end[index], None if self.before is None else self.before[index])


@evaluated
@torch.no_grad()
def likelihood_ratio_gradient(
    model: FlowModel,
    tilt: FirstVariation,
    trajectories: Tensor,
    steps: list[MemorylessStep],
    context: Context = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the tilt at the last noisy states, from its values at the ends of mirrored pairs.

    The last noisy state is ``m + nu xi``, and the rest of the way is deterministic: the tilt's value
    there is a function ``f`` of it. A regression sees the adjoint only through its mean over ``xi``, and
    ``grad_m E f(m + nu xi) = E[(f(m + nu xi) - f(m - nu xi)) xi] / (2 nu)``: the likelihood-ratio
    estimator with antithetic pairs (Glasserman 2003, sections 4.2 and 7.3). Where ``f`` jumps by J
    over a width w below ``nu``, its noise is of the size ``J / nu`` and not ``J / w``. On a slope it is
    the noisier of the two.

    Args:
        trajectories: states, (steps + 1, batch, ...), with at least two steps.
        steps: coefficients of the process; the last without noise.

    Returns:
        The estimates, (batch, ...): they stand at the states before the last. Where the tilt has no value at
        an end, or at its reflection, the estimate is zero; which these are, bool (batch,).
    """
    times = model.time_grid(len(steps))
    before, state, end = trajectories[-3:]
    noisy, last = (step.like(end) for step in steps[-2:])
    v = model.velocity(before, before.new_tensor(times[-3]), context)
    mean = noisy.state * before + noisy.velocity * v
    shift = state - mean
    mirrored = mean - shift
    v = model.velocity(mirrored, mirrored.new_tensor(times[-2]), context)
    difference = tilt.value(end, context) - tilt.value(last.state * mirrored + last.velocity * v, context)
    failed = difference.isnan()
    difference = difference.masked_fill(failed, 0)
    return difference.view(-1, *(1,) * (end.ndim - 1)) * shift / (2 * noisy.noise**2), failed


@dataclass(frozen=True)
class Pathwise:
    """How the own gradient of a tilt is taken.

    The mean over ``n`` ends perturbed by Gaussian noise of deviation ``s`` is an unbiased estimate of the
    gradient of the tilt smoothed by that Gaussian: of a quadratic one, of its gradient at the end itself.

    Attributes:
        model: whose states they are.
        noise: a standard normal draw for each perturbation, each (batch, ...); empty for none.
        deviation: ``s``, in units of the state.
        percentile: bound on the entries of a sample's gradient, see :func:`cut`; None for none.
        part: most samples whose gradient is taken at once.
    """

    model: FlowModel
    noise: Sequence[Tensor]
    deviation: float
    percentile: float | None
    part: int

    def gradient(self, tilt: FirstVariation, x: Tensor, context: Context) -> Tensor:
        """Gradients at the ends ``x``, of the shape of it."""
        if len(x) <= self.part:
            return self._gradient(tilt, x, context, self.noise)
        found = []
        for index in torch.arange(len(x)).split(self.part):
            noise = [one[index] for one in self.noise]
            found.append(self._gradient(tilt, x[index], self.model.select_context(context, index), noise))
        return torch.cat(found)

    def _gradient(self, tilt: FirstVariation, x: Tensor, context: Context, noise: Sequence[Tensor]) -> Tensor:
        if noise:
            gradient = torch.zeros_like(x)
            for one in noise:
                gradient = gradient + tilt.gradient(x + self.deviation * one, context) / len(noise)
        else:
            gradient = tilt.gradient(x, context)
        return gradient if self.percentile is None else cut(gradient, self.percentile)


def cut(gradient: Tensor, percentile: float) -> Tensor:
    """Gradients whose entries are no larger than a percentile of the sizes of the entries of their sample.

    Between two entries the percentile is linear, as numpy's.

    Args:
        gradient: (batch, ...).
        percentile: in (0, 100].
    """
    if not len(gradient):
        return gradient
    bound = torch.quantile(gradient.flatten(1).abs(), percentile / 100, dim=1)
    bound = bound.view(-1, *(1,) * (gradient.ndim - 1))
    return torch.minimum(torch.maximum(gradient, -bound), bound)


@dataclass(frozen=True)
class Ends:
    """What is known of the tilt's gradient at the ends of a pool of trajectories.

    Attributes:
        active: which trajectories carry one, bool (pool,).
        ratio: estimates from values at the states before the last, (pool, ...), if there are any.
        rest: the part of the tilt whose own gradient is still to be taken, if there is one.
        failed: trajectories on which the tilt, or one of a pair, has no value, bool (pool,).
    """

    active: Tensor
    ratio: Tensor | None
    rest: FirstVariation | None
    failed: Tensor

    @classmethod
    def of(
        cls,
        model: FlowModel,
        tilt: FirstVariation,
        pool: Tensor,
        active: Tensor,
        steps: list[MemorylessStep],
        context: Context,
        estimator: EndpointGradient,
    ) -> Ends:
        """By an estimator; a part of the tilt whose values are dear keeps its own gradient.

        ``active``, bool (pool,), says on which of the last states the tilt itself has a gradient.
        """
        check_word(estimator, EndpointGradient, "endpoint_gradient")
        failed = tilt.failed(pool[-1], context)
        by_value, rest = (None, tilt) if estimator == "pathwise" else tilt.split()
        if by_value is None:
            return cls(active, None, rest, failed)
        ratio, lacking = likelihood_ratio_gradient(model, by_value, pool, steps, context)
        return cls(ratio.flatten(1).any(1), ratio, rest, failed | lacking)

    def terminal(
        self, end: Tensor, index: Tensor, context: Context, weight: float, pathwise: Pathwise | None = None
    ) -> Terminal:
        """Terminal values of those at ``index`` in the pool, ``weight`` times the gradients.

        Args:
            end: their last states, (batch, ...).
            index: their positions in the pool, (batch,).
            context: theirs.
            weight: minus the strength of the tilt over its KL weight.
            pathwise: how own gradients are taken; by default at the ends themselves.
        """
        if self.rest is None:
            gradient = torch.zeros_like(end)
        elif pathwise is None:
            gradient = self.rest.gradient(end, context)
        else:
            gradient = pathwise.gradient(self.rest, end, context)
        before = None if self.ratio is None else weight * self.ratio[index]
        return Terminal(weight * gradient, before)
