"""The pretrained flow on molecules with what its methods tilt it by: minus the energy."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.domains.molecules import build
from flowtilt.domains.molecules.energies import Invalidity, XTBReward
from flowtilt.domains.molecules.experiment import UNIT, tail_metric
from flowtilt.domains.molecules.sampling import CHUNK, Base, load_base, write_molecules
from flowtilt.domains.molecules.xtb import XTBSettings
from flowtilt.fdc import ExponentAscent, MirrorAscent, StepWeight
from flowtilt.functionals.base import Functional, Objective, WeightedSum
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, Barrier
from flowtilt.metrics.tails import upper_tail_mean
from flowtilt.model import Context, FlowModel
from flowtilt.parallel import processes
from flowtilt.pipeline.stages import Climb, Workbench

FRONTIER = (0.1, 0.01, 0.002)
"""Masses of the tails that a bank's worth is told by."""

log = logging.getLogger(__name__)


class MoleculesBench(Workbench):
    """See :class:`flowtilt.pipeline.stages.Workbench`; its history counts energies, and those that failed."""

    chunk = CHUNK
    dear_rewards = True

    @cached_property
    def base(self) -> Base:
        """The pretrained model."""
        return load_base(self.experiment, self.job.read("pretrained"), self.job.method)

    @cached_property
    def flow(self) -> FlowModel:
        return self.base.flow

    @cached_property
    def reward(self) -> XTBReward:
        separated, workers = None, self.job.workers
        if self.experiment.reward.type_gradient == "separated_atoms":
            separated = build.separated_atoms(self.base.types, workers)
        return XTBReward(
            self.base.decode,
            XTBSettings(**self.experiment.reward.calculation),
            workers,
            separated,
            self.experiment.reward.failed,
        )

    def contexts(self, generator: torch.Generator) -> tuple[int, Context]:
        """Molecules of the sizes that all models of a seed are measured by."""
        count = self.experiment.evaluation.samples
        own = generator_of(self.experiment.starts_from, "sample", self.job.seed)
        return count, self.flow.draw_context(count, own)

    def write(self, samples: Tensor, context: Context, output: Path) -> None:
        """Write the molecules that states stand for."""
        parts = torch.arange(len(samples)).split(CHUNK)
        chosen = [self.flow.select_context(context, part) for part in parts]
        decoded = [self.base.decode(samples[p], own) for p, own in zip(parts, chosen, strict=True)]
        coordinates, numbers = (torch.cat(each) for each in zip(*decoded, strict=True))
        write_molecules(coordinates, numbers, output)

    def climb(self) -> Climb:
        """FDC on the mean of the best share, less the KL divergence."""
        experiment, method = self.experiment, self.job.method
        config, solver = experiment.methods[method], experiment.solver_of(method)
        problem = experiment.tail_of(method)
        # Scores are compared at the last time where the solver trains the velocity.
        kl = KL(self.flow, score_time=config.score_time or self.flow.time_grid(solver.steps)[-2])
        weight: StepWeight | None = problem.alpha / config.step if config.step else None
        if config.step_weight is not None:
            weight = tuple(config.step_weight)
        settings: MirrorAscent | ExponentAscent
        if config.by == "exponents":
            settings = self.exponents(weight)
        else:
            assert weight is not None  # or the configuration would have been refused
            settings = MirrorAscent(weight, experiment.offline.samples, solver.steps)
        utility: Functional = SQ(self.reward, problem.mass)
        if (barrier := config.barrier) is not None:
            kept = Barrier(self.invalidity, barrier.bound)
            utility = WeightedSum(((1.0, utility), (barrier.strength, kept)))
        return Climb(
            Objective(utility, kl, problem.alpha),
            settings,
            self.flow,
            lambda k: generator_of(experiment.name, method, self.job.seed, k),
            first=self.offline,
            measure=self.measure,
        )

    @cached_property
    def invalidity(self) -> Invalidity:
        """Whether a state is no valid molecule."""
        return Invalidity(self.base.decode, self.job.workers)

    def measure(self, samples: Tensor, context: Context, values: np.ndarray) -> dict[str, float]:
        """Mean and best shares of minus the energy, in hartree, and the valid molecules in per cent."""
        kept = values[~np.isnan(values)]
        tails = {tail_metric(mass): upper_tail_mean(kept, mass) for mass in FRONTIER}
        valid = 100 * (1 - float(self.invalidity(samples, context).double().mean()))
        return {f"mean_{UNIT}": float(kept.mean()), **tails, "validity_pct": valid}

    def watched(self, progress: Progress | None) -> Progress:
        self.taken_up()

        def counted(row: dict[str, float]) -> None:
            evaluated, failed = self.counts
            self.taken_up()
            counts = torch.tensor([self.counts[0] - evaluated, self.counts[1] - failed])
            evaluated, failed = processes().total(counts).tolist()
            row |= {"evaluated": evaluated, "failed": failed}
            if progress is not None:
                progress(row)

        return counted

    def taken_up(self) -> None:
        """Count energies, and those that failed, from here: what came before is in the history."""
        self.counts = self.reward.evaluated, self.reward.failures.total()

    def close(self) -> None:
        reward = self.reward
        if reward.failures:
            reasons = ", ".join(f"{failure} ({count})" for failure, count in reward.failures.most_common())
            log.info("%d of %d energies failed: %s", reward.failures.total(), reward.evaluated, reasons)
