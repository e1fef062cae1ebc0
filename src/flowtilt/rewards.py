"""Rewards: one number a sample, and its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowtilt.model import Context


class RewardError(ValueError):
    """A reward returned something that is not one finite number a sample."""


class Reward(ABC):
    """A function of the endpoint to be raised, in units that the domain states.

    Subclasses implement :meth:`value`; the gradient is by automatic differentiation unless a
    subclass overrides :meth:`gradient` with an analytic one.

    Attributes:
        differentiable: whether :meth:`gradient` can be called.
        may_fail: whether an evaluation can fail, as that of an energy can. A failed sample has the value
            NaN and the gradient zero; who uses values leaves it out and counts it. Where this is false,
            a value that is not finite is an error. An infinite value always is.
    """

    differentiable: bool = True
    may_fail: bool = False

    @abstractmethod
    def value(self, x: Tensor, context: Context = None) -> Tensor:
        """Rewards of the samples ``x`` (batch, ...), shape (batch,)."""

    def gradient(self, x: Tensor, context: Context = None) -> Tensor:
        """Gradient of each sample's reward, of the shape of ``x``; zero for an evaluation that failed.

        Raises:
            RewardError: if the values have another shape, values or gradients are not all finite, or the
                values carry no gradient of ``x``. One that is zero is a gradient too.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            values = check_rewards(self.value(x, context), x, self)
            failed = values.isnan()
            if bool(failed.all()):  # then there need be no graph either
                return torch.zeros_like(x)
            gradient = input_gradient(values, x, f"reward {type(self).__name__}")
        if self.may_fail:
            gradient = gradient.masked_fill(failed.reshape(-1, *[1] * (x.ndim - 1)), 0.0)
        _check_finite(gradient.flatten(1).isfinite().all(1), x, self, "has a gradient that is not finite")
        return gradient

    def failed(self, x: Tensor, context: Context = None) -> Tensor:
        """Samples whose evaluation failed, bool (batch,); nothing is evaluated where none can."""
        if not self.may_fail:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self(x, context).isnan()

    def __call__(self, x: Tensor, context: Context = None) -> Tensor:
        """Checked rewards without a graph, real and of shape (batch,); NaN where an evaluation failed.

        Raises:
            RewardError: if the values have another shape or are not finite, but for those that may fail.
        """
        with torch.no_grad():
            values = check_rewards(self.value(x, context), x, self)
            return values if values.is_floating_point() else values.to(x.dtype)


def input_gradient(values: Tensor, x: Tensor, of: str) -> Tensor:
    """Gradient of each sample's value (batch,) at ``x``, by the graph that the values carry.

    Args:
        x: the samples, which require a gradient, (batch, ...).

    Raises:
        RewardError: if there is no graph from ``x`` to the values: nothing would be trained, silently.
    """
    gradient = None
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
    if gradient is None:
        raise RewardError(
            f"{of} returned values ({values.dtype}) without a gradient with respect to the samples: they "
            "were computed under torch.no_grad, detached, or made whole numbers; compute them from x by "
            "differentiable operations or give a gradient of your own, or take a solver that needs values "
            "alone: endpoint_gradient: likelihood_ratio, or kind: weighted_fitting"
        )
    return gradient


def check_rewards(values: Tensor, x: Tensor, reward: Reward) -> Tensor:
    """Return ``values`` if they are one finite number a sample, or NaN where ``reward`` may fail.

    Whole numbers and truth values are numbers too; what they lack is a gradient.

    Raises:
        RewardError: if they are not.
    """
    name, wanted = type(reward).__name__, f"it must return shape ({len(x)},): one number a sample"
    if not isinstance(values, Tensor):
        raise RewardError(f"reward {name} returned a {type(values).__name__}, no tensor; {wanted}")
    if values.is_complex():
        raise RewardError(f"reward {name} returned the type {values.dtype}, no real number; {wanted}")
    if values.shape != x.shape[:1]:
        raise RewardError(
            f"reward {name} returned shape {tuple(values.shape)} for a batch of {len(x)}; {wanted}"
        )
    failed = values.isnan() if reward.may_fail else torch.zeros_like(values, dtype=torch.bool)
    _check_finite(torch.isfinite(values) | failed, x, reward, "is not finite")
    return values


def _check_finite(finite: Tensor, x: Tensor, reward: Reward, what: str) -> None:
    if bool(finite.all()):
        return
    first = x[~finite][0].flatten()[:4].tolist()
    raise RewardError(
        f"reward {type(reward).__name__} {what} on {int((~finite).sum())} of {len(x)} samples, "
        f"the first at {first}; make it finite wherever the model can sample"
    )
