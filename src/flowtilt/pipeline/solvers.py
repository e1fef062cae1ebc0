"""The control solver that a configuration names: one key chooses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from flowtilt.control import adjoint_matching, annealed_fitting, weighted_fitting
from flowtilt.control.annealed_fitting import Measure
from flowtilt.control.base import Progress, Solution
from flowtilt.control.weighted_fitting import Samples
from flowtilt.fdc import Solver
from flowtilt.functionals.base import FirstVariation
from flowtilt.model import FlowModel
from flowtilt.pipeline.sections import SolverConfig
from flowtilt.resuming import Slot

Sampler = Literal["ode", "sde"]
"""How banks are drawn."""


class Given(NamedTuple):
    """Samples that were drawn of a model, which are the bank of what starts from it."""

    model: FlowModel
    samples: Samples


def build_solver(
    config: SolverConfig,
    updates: int,
    progress: Progress | None = None,
    drawn: Given | None = None,
    sampler: Sampler = "ode",
    measure: Measure | None = None,
) -> Solver:
    """A solver with its settings.

    Args:
        config: of the solver.
        updates: of each solve.
        progress: called with each update's row.
        drawn: a model, and samples of it that are the bank of a solve from there.
        sampler: of other banks, see :func:`fitting_settings`.
        measure: of the banks of annealed fitting.
    """
    solver: Callable[..., Solution]
    if config.kind == "weighted_fitting":
        solver = partial(_weighted_fitting, settings=fitting_settings(config, updates, sampler))
    elif config.kind == "annealed_fitting":
        settings = annealed_fitting_settings(config, updates, sampler)
        solver = partial(annealed_fitting.solve, settings=settings, measure=measure)
    else:
        solver = partial(adjoint_matching.solve, settings=adjoint_matching_settings(config, updates))

    def solve(
        base: FlowModel,
        tilt: FirstVariation,
        kl_weight: float,
        random: torch.Generator,
        slot: Slot | None = None,
        given: Samples | None = None,
    ) -> Solution:
        bank = drawn.samples if given is None and drawn is not None and base is drawn.model else given
        more: dict[str, Any] = {} if config.kind == "adjoint_matching" else {"given": bank}
        return solver(base, tilt, kl_weight, generator=random, progress=progress, slot=slot, **more)

    return solve


def adjoint_matching_settings(config: SolverConfig, updates: int) -> adjoint_matching.AdjointMatchingSettings:
    """The settings of Adjoint Matching that a configuration has, with a number of updates."""
    own = {field.name for field in fields(adjoint_matching.AdjointMatchingSettings)} - {"updates"}
    return adjoint_matching.AdjointMatchingSettings(updates=updates, **config.model_dump(include=own))


def annealed_fitting_settings(
    config: SolverConfig, updates: int, sampler: Sampler = "ode"
) -> annealed_fitting.AnnealedFittingSettings:
    """The settings of annealed fitting that a configuration has, with a number of updates a stage."""
    fitting = fitting_settings(config, updates, sampler)
    return annealed_fitting.AnnealedFittingSettings(
        fitting, config.share, config.stages, kl=config.kl, stage_kl=config.stage_kl
    )


def fitting_settings(
    config: SolverConfig, updates: int, sampler: Sampler = "ode"
) -> weighted_fitting.WeightedFittingSettings:
    """The settings of a bank and its fit that a configuration has, with a number of updates.

    Args:
        sampler: of banks that are drawn: the ``ode`` in ``bank_steps``, or the memoryless process, the
            ``sde``, in ``steps``, where that is what runs are measured by.
    """
    return weighted_fitting.WeightedFittingSettings(
        bank=config.bank,
        sampler=sampler,
        steps=config.bank_steps if sampler == "ode" else config.steps,
        penalty=config.penalty,
        minimum_ess=config.minimum_ess,
        updates=updates,
        batch=config.batch,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        annealing=config.annealing,
        moments=config.moments,
        weight_decay=config.weight_decay,
        gradient_clip=config.gradient_clip,
    )


def _weighted_fitting(*problem: Any, **more: Any) -> Solution:
    """Weighted fitting, with what its bank was worth in every row: each solve of a run has its own."""
    solution = weighted_fitting.solve(*problem, **more)
    kept = {key: solution.diagnostics[key] for key in ("effective_sample_size", "kl", "relative_gap")}
    solution.history = [{**row, **kept} for row in solution.history]
    return solution
