"""Pretraining: a flow by its native matching loss, or any module by a loss of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from flowtilt.control.base import Progress, TrainingDiverged, annealed_rate
from flowtilt.model import Context, FlowModel
from flowtilt.optimiser import Adam
from flowtilt.ranges import COUNT, FINITE, POSITIVE, SHARE, below, check
from flowtilt.resuming import Slot, TrainingState

DataSource = Callable[[int, torch.Generator], Tensor | tuple[Tensor, Context]]
"""Draws some data, (count, ...), or data with their context."""


@dataclass(frozen=True)
class PretrainingSettings:
    """How the flow is fitted.

    Attributes:
        updates: optimiser steps.
        batch: samples an update.
        learning_rate: of Adam, annealed to zero by a cosine.
        margin: distance kept from both ends of time, where a target may be singular.
        times: mean and standard deviation of the logit of the times, which then are drawn as by Esser et
            al. (2024, section 3.1) instead of uniformly: an update then sees more of the times in between,
            where a prediction is neither trivial nor impossible.
        warmup: share of the updates over which the learning rate rises; 0 for none.
        average: decay of the exponential moving average of the weights, which then is the result; 0 for
            none. The average forgets its beginning: update n decays it by ``min(average, n / (n + 10))``.
        gradient_clip: bound on the norm of the parameters' gradient, or None.
        bfloat16: whether the network's matrix products are computed in 16 bits, where that is faster.
        compiled: whether the loss is compiled by torch, which takes minutes and a C++ compiler.
    """

    updates: int = 3000
    batch: int = 1024
    learning_rate: float = 1e-3
    margin: float = 1e-3
    times: tuple[float, float] | None = None
    warmup: float = 0.0
    average: float = 0.0
    gradient_clip: float | None = None
    bfloat16: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        check(self, updates=COUNT, batch=COUNT, learning_rate=POSITIVE, gradient_clip=POSITIVE)
        check(self, margin=below(0.5), warmup=SHARE, average=below(1))
        if self.times is not None and not (self.times[0] in FINITE and self.times[1] in POSITIVE):
            raise ValueError(
                f"times must be a finite mean and a positive, finite standard deviation, got {self.times!r}"
            )


Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Watch(Generic[Module]):
    """Looks at the model as it would be if the training ended now, which does not change the training.

    Attributes:
        every: updates between two looks.
        look: called with the number of updates done and the model, with its averages for weights.
    """

    every: int
    look: Callable[[int, Module], None]

    def __post_init__(self) -> None:
        check(self, "a watch's ", every=COUNT)


def fit_flow(
    model: FlowModel,
    data: DataSource,
    settings: PretrainingSettings,
    generator: torch.Generator,
    progress: Progress | None = None,
    slot: Slot | None = None,
    watch: Watch[FlowModel] | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place on fresh draws of ``data``, see :func:`fit`."""
    loss_of = torch.compile(model.matching_loss, dynamic=False) if settings.compiled else model.matching_loss

    def loss() -> Tensor:
        x1, x0, t, context = _draw(model, data, settings, generator)
        with torch.autocast(x1.device.type, torch.bfloat16, enabled=settings.bfloat16):
            return loss_of(x1, x0, t, context).mean()

    return fit(model, loss, settings, generator, progress, slot, watch)


def fit(
    model: Module,
    loss_of_update: Callable[[], Tensor],
    settings: PretrainingSettings,
    generator: torch.Generator,
    progress: Progress | None = None,
    slot: Slot | None = None,
    watch: Watch[Module] | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place by a loss; returns the history, a row an update.

    With a slot whose file is there, the training goes on from it exactly as if it had not been stopped:
    weights, averages, moments and random state are those of the file, and the history is whole. A long
    training leaves its last state there, and returns at once when it is asked for again.

    Args:
        loss_of_update: draws the data of an update and gives its loss, ().
        generator: source of all randomness of ``loss_of_update``.
        slot: where the training keeps its state, and goes on from if it was stopped.

    Raises:
        TrainingDiverged: if the loss stops being finite; the message names the update.
        CheckpointError: if the file to resume from belongs to another training.
    """
    model.requires_grad_(True)
    state = TrainingState(model, Adam(model.parameters()), generator, settings, slot, settings.average)
    for update in range(len(state.history), settings.updates):
        loss = loss_of_update()
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"the training loss is {float(loss.detach())} at update {update} of {settings.updates}; "
                "lower learning_rate"
            )
        state.optimiser.clear_gradients()
        loss.backward()
        if settings.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        state.optimiser.step(_learning_rate(update, settings))
        state.average(update)
        row = {"update": update, "loss": float(loss.detach()), "seconds": state.seconds()}
        # Before the state is kept: a training that goes on from it does not come by again.
        if watch is not None and (update + 1) % watch.every == 0:
            with state.averaged():
                watch.look(update + 1, model)
        state.add(row, progress)
    state.finish()
    state.use_average()
    model.requires_grad_(False)
    return state.history


def _draw(
    model: FlowModel, data: DataSource, settings: PretrainingSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Context]:
    """Data, noise, times and context of one update."""
    drawn = data(settings.batch, generator)
    x1, context = drawn if isinstance(drawn, tuple) else (drawn, None)
    x0 = model.noise_like(x1, generator, context)
    # Stratified times: one in each of `batch` equal slices of (margin, 1 - margin).
    u = (torch.arange(settings.batch) + torch.rand(settings.batch, generator=generator)) / settings.batch
    if settings.times is not None:
        mean, deviation = settings.times
        u = torch.sigmoid(mean + deviation * torch.special.ndtri(u))
    return x1, x0, settings.margin + (1 - 2 * settings.margin) * u, context


def _learning_rate(update: int, settings: PretrainingSettings) -> float:
    if settings.warmup:
        return annealed_rate(update, settings.updates, settings.learning_rate, settings.warmup)
    return settings.learning_rate * (0.5 * (1 + math.cos(math.pi * update / settings.updates)))
