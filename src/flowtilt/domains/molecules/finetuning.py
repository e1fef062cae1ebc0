"""Stages of molecules: the offline batch of the pretrained model, and fine-tuning.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from flowtilt.checkpoints import save_weights
from flowtilt.control import adjoint_matching
from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.domains.molecules import build
from flowtilt.domains.molecules.energies import XTBReward
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.domains.molecules.sampling import CHUNK, Base, load_base
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import FirstVariation, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, Hinge, RewardVariation
from flowtilt.model import FlowModel
from flowtilt.parallel import processes
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import method_of
from flowtilt.pipeline.files import (
    StageError,
    read_schedule,
    read_threshold,
    write_arrays,
    write_history,
)
from flowtilt.pipeline.solvers import adjoint_matching_settings, build_solver
from flowtilt.pipeline.states import resumption_of
from flowtilt.resuming import Resumption
from flowtilt.sampling import sample_sde

log = logging.getLogger(__name__)


def _reward(experiment: MoleculeExperiment, base: Base, workers: int | None) -> XTBReward:
    separated = None
    if experiment.reward.type_gradient == "separated_atoms":
        separated = build.separated_atoms(base.types, workers)
    return XTBReward(base.decode, build.build_xtb(experiment.reward), workers, separated)


def offline(
    experiment: MoleculeExperiment, seed: int, model: Path, output: Path, workers: int | None = None
) -> None:
    """Draw the offline batch of the pretrained model by the memoryless process, with rewards.

    Written are all rewards, NaN where there is no energy.
    """
    base = load_base(experiment, model)
    generator = generator_of(experiment.base, "offline", seed)
    count, steps = experiment.offline.samples, experiment.solver.steps
    reward = _reward(experiment, base, workers)
    rewards = []
    context = base.flow.draw_context(count, generator)
    for index in torch.arange(count).split(CHUNK):
        part = base.flow.select_context(context, index)
        rewards.append(reward(sample_sde(base.flow, len(index), steps, generator, part)[-1], part))
    _say_failures(reward)
    write_arrays(output, reward=torch.cat(rewards).numpy(force=True))


def _say_failures(reward: XTBReward) -> None:
    if reward.failures:
        reasons = ", ".join(f"{failure} ({count})" for failure, count in reward.failures.most_common())
        log.info("%d of %d energies failed: %s", reward.failures.total(), reward.evaluated, reasons)


# ------------------------------------------------------------------------------- fine-tuning


def finetune(
    experiment: MoleculeExperiment,
    method: str,
    seed: int,
    pretrained: Path,
    output: Path,
    history: Path,
    threshold_file: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Fine-tune the pretrained model by one method.

    A long fine-tuning keeps its state beside the output while it runs, and goes on from it if it was stopped.

    Args:
        experiment: what to do.
        method: name of one of its methods, of kind am, fdc or tfft.
        seed: of the run.
        pretrained: weights of the pretrained model.
        output: where the fine-tuned weights go.
        history: where the history goes, a row an update, with the energies asked for in it
            (``evaluated``) and how many of these failed (``failed``).
        threshold_file: of the threshold stage, for tfft.
        workers: processes for the energies; by default one for each processor.
        progress: called with each update's row.
    """
    if not method_of(experiment, method).tuned:
        raise ConfigError(f"experiment {experiment.name}: method {method!r} is not fine-tuned")
    base = load_base(experiment, pretrained)
    reward = _reward(experiment, base, workers)
    counted = _Counted(reward, progress)
    inputs = [pretrained, threshold_file]
    resumption = resumption_of(experiment, "finetune", seed, output, inputs, method, counted.start_anew)
    if method_of(experiment, method).kind == "fdc":
        model, rows = _flow_density_control(experiment, method, seed, base.flow, reward, counted, resumption)
    else:
        tilt, kl_weight = _tilt(experiment, method, reward, threshold_file)
        solver, updates = experiment.solver_of(method), experiment.updates_of(method)
        random, slot = generator_of(experiment.name, method, seed), resumption.slot("solve")
        if isinstance(tilt, FirstVariation):
            solution = build_solver(solver, updates, counted)(base.flow, tilt, kl_weight, random, slot)
        else:
            settings = adjoint_matching_settings(solver, updates)
            solution = adjoint_matching.solve(base.flow, tilt, kl_weight, settings, random, counted, slot)
        model, rows = solution.model, solution.history
    _say_failures(reward)
    if processes().leads:
        write_history(rows, history)
        save_weights(model, output)
        resumption.remove()


class _Counted:
    """Adds to the row of each update how many energies were computed in it, and how many failed."""

    def __init__(self, reward: XTBReward, progress: Progress | None) -> None:
        self.reward, self.progress = reward, progress
        self.start_anew()

    def start_anew(self) -> None:
        """Count from here: what came before a state that was taken over is in its history."""
        self.evaluated, self.failed = self.reward.evaluated, self.reward.failures.total()

    def __call__(self, row: dict[str, float]) -> None:
        evaluated, failed = self.evaluated, self.failed
        self.start_anew()
        counts = torch.tensor([self.evaluated - evaluated, self.failed - failed])
        evaluated, failed = processes().total(counts).tolist()
        row |= {"evaluated": evaluated, "failed": failed}
        if self.progress is not None:
            self.progress(row)


def _tilt(
    experiment: MoleculeExperiment, method: str, reward: XTBReward, threshold_file: Path | None
) -> tuple[FirstVariation | Callable[[float], FirstVariation], float]:
    """What a method of a single solve tilts by, or its schedule, and the KL weight."""
    config = method_of(experiment, method)
    if config.kind == "am":
        return RewardVariation(reward), experiment.objective.alpha
    if threshold_file is None:
        raise StageError(f"method {method!r} needs --threshold, the file of the threshold stage")
    tail = experiment.tail_of(method)
    if config.rise is None:
        return Hinge(reward, read_threshold(threshold_file)["threshold"], tail.mass, "upper"), tail.alpha
    rungs = read_schedule(threshold_file)

    def rising(progress: float) -> FirstVariation:
        rung = rungs[min(len(rungs) - 1, int(progress * len(rungs)))]
        return Hinge(reward, rung["threshold"], rung["mass"], "upper")

    return rising, tail.alpha


def _flow_density_control(
    experiment: MoleculeExperiment,
    method: str,
    seed: int,
    base: FlowModel,
    reward: XTBReward,
    progress: Progress,
    resumption: Resumption,
) -> tuple[FlowModel, list[dict[str, float]]]:
    """FDC on the mean of the best share, less the KL divergence by scores."""
    config, solver = method_of(experiment, method), experiment.solver_of(method)
    tail, step = experiment.tail_of(method), config.step or 1.0
    # Scores are compared at the last time where the solver trains the velocity.
    kl = KL(base, score_time=base.time_grid(solver.steps)[-2])
    objective = Objective(SQ(reward, experiment.level_of(method)), kl, tail.alpha)
    result = ascend(
        base,
        objective,
        range(config.iterations or 1),
        MirrorAscent(tail.alpha / step, experiment.offline.samples, solver.steps),
        build_solver(solver, experiment.updates_of(method), progress),
        lambda k: generator_of(experiment.name, method, seed, k),
        resumption,
    )
    return result.model, result.history
