"""Pretraining by a model's native flow-matching loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.control.base import Progress, TrainingDiverged
from flowtilt.model import Context, FlowModel
from flowtilt.optimiser import Adam

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
    """

    updates: int = 3000
    batch: int = 1024
    learning_rate: float = 1e-3
    margin: float = 1e-3


def fit_flow(
    model: FlowModel,
    data: DataSource,
    settings: PretrainingSettings,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place on fresh draws of ``data``; returns the history, a row an update.

    Raises:
        TrainingDiverged: if the loss stops being finite; the message names the update.
    """
    model.requires_grad_(True)
    optimiser = Adam(model.parameters())
    history = []
    started = time.perf_counter()
    for update in range(settings.updates):
        drawn = data(settings.batch, generator)
        x1, context = drawn if isinstance(drawn, tuple) else (drawn, None)
        x0 = model.noise_like(x1, generator, context)
        # Stratified times: one in each of `batch` equal slices of (margin, 1 - margin).
        u = (torch.arange(settings.batch) + torch.rand(settings.batch, generator=generator)) / settings.batch
        t = settings.margin + (1 - 2 * settings.margin) * u
        loss = model.matching_loss(x1, x0, t, context).mean()
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"the flow-matching loss is {float(loss.detach())} at update {update} of {settings.updates}; "
                "lower learning_rate"
            )
        optimiser.clear_gradients()
        loss.backward()
        cosine = 0.5 * (1 + math.cos(math.pi * update / settings.updates))
        optimiser.step(settings.learning_rate * cosine)
        row = {"update": update, "loss": float(loss.detach()), "seconds": time.perf_counter() - started}
        history.append(row)
        if progress is not None:
            progress(row)
    model.requires_grad_(False)
    return history
