"""Where the lean adjoint starts: estimates of the tilt's gradient at the ends of trajectories."""

from __future__ import annotations

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

    def terminal(self, end: Tensor, index: Tensor, context: Context, weight: float) -> Terminal:
        """Terminal values of those at ``index`` in the pool, ``weight`` times the gradients.

        Args:
            end: their last states, (batch, ...).
            index: their positions in the pool, (batch,).
            context: theirs.
            weight: minus the strength of the tilt over its KL weight.
        """
        gradient = torch.zeros_like(end) if self.rest is None else self.rest.gradient(end, context)
        before = None if self.ratio is None else weight * self.ratio[index]
        return Terminal(weight * gradient, before)
