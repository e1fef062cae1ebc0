"""The control solver that a configuration names: one key chooses it."""

from __future__ import annotations

import torch

from flowtilt.control import adjoint_matching, weighted_fitting
from flowtilt.control.base import Progress, Solution
from flowtilt.fdc import Solver
from flowtilt.functionals.base import FirstVariation
from flowtilt.model import FlowModel
from flowtilt.sections import SolverConfig


def build_solver(config: SolverConfig, updates: int, progress: Progress | None = None) -> Solver:
    """A solver with its settings.

    Args:
        config: of the solver.
        updates: optimiser steps of each solve.
        progress: called with each update's row.
    """
    if config.kind == "weighted_fitting":
        return _weighted_fitting(config, updates, progress)
    return _adjoint_matching(config, updates, progress)


def adjoint_matching_settings(config: SolverConfig, updates: int) -> adjoint_matching.AdjointMatchingSettings:
    """The settings of Adjoint Matching that a configuration has, with a number of updates."""
    return adjoint_matching.AdjointMatchingSettings(
        updates=updates,
        batch=config.batch,
        pool=config.pool,
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        ramp=config.ramp,
        gradient_clip=config.gradient_clip,
        control_clip=config.control_clip,
        endpoint_gradient=config.endpoint_gradient,
        last_share=config.last_share,
        rest_share=config.rest_share,
    )


def _adjoint_matching(config: SolverConfig, updates: int, progress: Progress | None) -> Solver:
    settings = adjoint_matching_settings(config, updates)

    def solve(base: FlowModel, tilt: FirstVariation, kl_weight: float, random: torch.Generator) -> Solution:
        return adjoint_matching.solve(base, tilt, kl_weight, settings, random, progress)

    return solve


def _weighted_fitting(config: SolverConfig, updates: int, progress: Progress | None) -> Solver:
    settings = weighted_fitting.WeightedFittingSettings(
        bank=config.bank,
        steps=config.bank_steps,
        penalty=config.penalty,
        updates=updates,
        batch=config.batch,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        gradient_clip=config.gradient_clip,
    )

    def solve(base: FlowModel, tilt: FirstVariation, kl_weight: float, random: torch.Generator) -> Solution:
        solution = weighted_fitting.solve(base, tilt, kl_weight, settings, random, progress)
        # Each solve of a run has its own bank: what it was worth goes beside the solve's updates.
        kept = {key: solution.diagnostics[key] for key in ("effective_sample_size", "relative_gap")}
        solution.history = [{**row, **kept} for row in solution.history]
        return solution

    return solve
