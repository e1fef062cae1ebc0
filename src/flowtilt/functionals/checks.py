"""Numerical checks of a functional: that its first variation, its curvature and its gradients agree.

Every registered functional is held to them by the tests, and :func:`check_entry` holds one of your own
to them in a few seconds. Each check returns what it measured, and raises :class:`CheckError` with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from flowtilt.functionals.base import Distribution, FiniteDistribution, Functional
from flowtilt.functionals.curvature import (
    Curvature,
    chords,
    example_distribution,
    example_problem,
    random_distributions,
)
from flowtilt.functionals.divergences import ReferenceDraw
from flowtilt.functionals.registry import Entry, Registry
from flowtilt.sampling import OdeSettings


class CheckError(AssertionError):
    """A functional whose parts do not agree; the message holds the measured error."""


def check_first_variation(
    functional: Functional, distribution: FiniteDistribution, tolerance: float = 1e-5
) -> float:
    """``d/dh F(p + h d) = <first variation, d>`` along 20 random directions that keep the total mass.

    Central differences err by h^2 times third derivatives and by 1e-16 F / h: both below 1e-7 here,
    where values are at most 1e3.

    Args:
        distribution: where; all its probabilities positive.
        tolerance: of the difference, in units of the functional.

    Returns:
        The largest difference.

    Raises:
        CheckError: if it is above the tolerance, or the first variation has another shape than (n,).
    """
    random, step = np.random.default_rng(0), 1e-5
    variation = functional.finite_variation(distribution)
    if variation.shape != distribution.p.shape:
        raise CheckError(
            f"{_name(functional)}.finite_variation has the shape {variation.shape}, "
            f"not {distribution.p.shape}"
        )
    errors = []
    for _ in range(20):
        direction = distribution.p * random.normal(size=len(distribution.p))
        direction -= distribution.p * direction.sum()
        up, down = (
            functional.finite_value(distribution.with_p(distribution.p + s * step * direction))
            for s in (1, -1)
        )
        errors.append(abs((up - down) / (2 * step) - direction @ variation))
    return _held(max(errors), tolerance, f"{_name(functional)}: first variation against finite differences")


def check_tangents(functional: Functional, distribution: FiniteDistribution) -> Curvature:
    """What random chords show to be concave lies below its linearisation at every other distribution, and so
    on.

    Args:
        distribution: where it is linearised; the others are 100 random ones on its points.

    Returns:
        The curvature along the chords: compare it with the tier that the functional claims.

    Raises:
        CheckError: with how far the functional is on the wrong side of its linearisation.
    """
    found = chords(functional, distribution)
    value, variation = functional.finite_value(distribution), functional.finite_variation(distribution)
    above = np.array(
        [
            functional.finite_value(other) - value - (other.p - distribution.p) @ variation
            for other in random_distributions(distribution, 100, seed=5)
        ]
    )
    if found.is_concave:
        _held(float(above.max()), found.rounding, f"{_name(functional)}, concave: above its linearisation")
    if found.is_convex:
        _held(float(-above.min()), found.rounding, f"{_name(functional)}, convex: below its linearisation")
    return found.curvature


def check_gradient(
    functional: Functional, distribution: Distribution, at: Distribution, tolerance: float = 1e-4
) -> float:
    """The gradient of the first variation is that of its value, by central differences.

    The likelihood's ODE starts from the standard normal distribution 1e-5 after the noise, where the path's
    distribution is of that order away from it: scores and its gradients agree to a few times 1e-5.

    Args:
        at: samples in double precision where the gradient is taken, other ones: a hinge has its kink
            at one of the distribution's own.
        tolerance: of the difference, over the largest slope.

    Returns:
        The largest difference over the largest slope.

    Raises:
        CheckError: if it is above the tolerance, or the gradient has another shape than the samples.
    """
    step = 1e-4
    variation = functional.linearise(distribution)
    gradient = variation.gradient(at.samples, at.context)
    if gradient.shape != at.samples.shape:
        raise CheckError(
            f"{_name(functional)}: the gradient has the shape {tuple(gradient.shape)}, "
            f"not the samples' {tuple(at.samples.shape)}"
        )
    random = torch.Generator().manual_seed(3)
    direction = torch.randn(at.samples.shape, generator=random, dtype=torch.float64)
    up, down = (variation.value(at.samples + s * step * direction, at.context) for s in (1, -1))
    slope = (gradient * direction).flatten(1).sum(1)
    error = float(((up - down) / (2 * step) - slope).abs().max())
    # Both may be 0, as a divergence's where it has its minimum.
    relative = error / max(float(slope.abs().max()), 1e-12)
    return _held(relative, tolerance, f"{_name(functional)}: gradient against the value's differences")


def check_tensors(functional: Functional, distribution: Distribution) -> None:
    """Gradients are finite, detached and of the samples' precision, and leave the samples alone.

    Networks run in single precision, and a solver feeds gradients back into them.

    Raises:
        CheckError: saying which does not hold.
    """
    before = distribution.samples.clone()
    gradient = functional.linearise(distribution).gradient(distribution.samples, distribution.context)
    wrong = {
        "the gradient is not finite": not bool(torch.isfinite(gradient).all()),
        "the gradient is not detached": gradient.requires_grad,
        f"the gradient is {gradient.dtype}, the samples {before.dtype}": gradient.dtype != before.dtype,
        "the samples were changed": not torch.equal(distribution.samples, before),
        "the value is not finite": not np.isfinite(functional.value(distribution)),
    }
    if said := [words for words, holds in wrong.items() if holds]:
        raise CheckError(f"{_name(functional)}: {'; '.join(said)}")


@dataclass(frozen=True)
class Checked:
    """What :func:`check_entry` measured of one example.

    Attributes:
        first_variation: largest error against finite differences, in units of the functional.
        gradient: largest error of the gradient, over the largest slope.
    """

    parameters: dict[str, object]
    first_variation: float
    curvature: Curvature
    gradient: float


def check_entry(entry: Entry) -> list[Checked]:
    """All checks of every example of an entry, on small problems in the plane whose distributions are known.

    Raises:
        CheckError: with the measured error of the first check that fails.
        ValueError: if an example's parameters are not those of the entry.
    """
    registry = Registry("functional", {"checked": entry})
    finite_distribution, finite = example_problem()
    # Scores are taken where the likelihood's ODE begins: both then speak of the same distribution.
    model = replace(
        finite,
        score_time=1 - 1e-5,
        ode=OdeSettings(steps=20, margin=1e-5),
        draw=ReferenceDraw(samples=300, steps=20),
    )
    single = replace(model, score_time=0.975)  # as far from the data as networks have it
    found = []
    for example in entry.examples:
        functional = registry.build("checked", example, finite)
        error = check_first_variation(functional, finite_distribution)
        curvature = check_tangents(functional, finite_distribution)
        on_model = registry.build("checked", example, model)
        gradient = check_gradient(on_model, example_distribution(), example_distribution(seed=1))
        distribution = example_distribution(8)
        check_tensors(
            registry.build("checked", example, single),
            replace(distribution, samples=distribution.samples.float()),
        )
        found.append(Checked(dict(example), error, curvature, gradient))
    return found


def _name(functional: Functional) -> str:
    return type(functional).__name__


def _held(error: float, tolerance: float, what: str) -> float:
    if not error <= tolerance:
        raise CheckError(f"{what}: off by {error:.3g}, more than {tolerance:.3g}")
    return float(error)
