"""The stages that are the same in every domain: the offline batch, thresholds, fine-tuning.

A domain gives them a :class:`Workbench`: a pretrained flow, the reward, and what FDC raises. Randomness
follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtilt.checkpoints import save_weights
from flowtilt.control import adjoint_matching
from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import FirstVariation, Functional
from flowtilt.functionals.utilities import Hinge, RewardVariation
from flowtilt.model import FlowModel
from flowtilt.parallel import processes
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Job, domain_of, imported
from flowtilt.pipeline.files import StageError, read_schedule, read_threshold, write_arrays, write_history
from flowtilt.pipeline.solvers import adjoint_matching_settings, build_solver
from flowtilt.pipeline.states import resumption_of
from flowtilt.rewards import Reward
from flowtilt.sampling import sample_sde


@dataclass(frozen=True)
class Climb:
    """What an fdc method raises, and by which steps.

    Attributes:
        objective: the functional.
        settings: of the iteration.
        start: model before the first iteration that is to be done.
        done: iterations that came before.
        generator: source of randomness of each iteration, by its number.
    """

    objective: Functional
    settings: MirrorAscent
    start: FlowModel
    generator: Callable[[int], torch.Generator]
    done: int = 0


class Workbench(ABC):
    """A pretrained flow of a domain, with what its methods tilt it by."""

    chunk: int | None = None
    """Samples of the offline batch that are drawn together; None for all."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def experiment(self) -> Any:
        return self.job.experiment

    @cached_property
    @abstractmethod
    def flow(self) -> FlowModel:
        """The pretrained flow."""

    @cached_property
    @abstractmethod
    def reward(self) -> Reward:
        """What am and tfft raise."""

    @abstractmethod
    def climb(self) -> Climb:
        """What the job's method raises, if it is of kind fdc."""

    def offline_arrays(self, x: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """What is kept of the offline batch."""
        return {"reward": rewards}

    def watched(self, progress: Progress | None) -> Progress | None:
        """What is called with each update's row, and may add to it."""
        return progress

    def taken_up(self) -> None:  # noqa: B027
        """Called when a training has gone on from a kept state."""

    def close(self) -> None:  # noqa: B027
        """Called when the job's work is done; says in the log what there is to say."""


def workbench_of(job: Job) -> Workbench:
    """The workbench of a job's domain."""
    found: Workbench = imported(domain_of(job.experiment).workbench)(job)
    return found


def offline(job: Job) -> None:
    """Draw the offline batch of the pretrained model by the memoryless process, with rewards and contexts.

    A reward that failed is NaN. Contexts are their numbers, all 0 in a model whose samples have none.

    Raises:
        ConfigError: if the experiment has no size of a batch.
    """
    experiment = job.experiment
    if experiment.offline is None:
        raise ConfigError(f"experiment {experiment.name}: has no key offline, the size of the batch")
    bench = workbench_of(job)
    flow, count = bench.flow, experiment.offline.samples
    generator = generator_of(experiment.name, "offline", job.seed)
    context = flow.draw_context(count, generator)
    states, rewards = [], []
    for index in torch.arange(count).split(bench.chunk or count):
        part = flow.select_context(context, index)
        states.append(sample_sde(flow, len(index), experiment.solver.steps, generator, part)[-1])
        rewards.append(bench.reward(states[-1], part))
    arrays = bench.offline_arrays(torch.cat(states), torch.cat(rewards))
    labels = flow.context_labels(context)
    arrays["context"] = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    bench.close()
    write_arrays(job.outputs["offline"], **{name: array.numpy(force=True) for name, array in arrays.items()})


def finetune(job: Job) -> None:
    """Fine-tune the pretrained model by one method, with its control solver. A long fine-tuning keeps its
    state beside the output while it runs, and goes on from it if it was stopped."""
    experiment, method = job.experiment, job.method
    bench = workbench_of(job)
    watched = bench.watched(job.bar(experiment.own_updates_of(method), f"{experiment.name} {method}"))
    config, updates = experiment.solver_of(method), experiment.updates_of(method)
    read = [job.read(role) for role in sorted(job.inputs)]
    output = job.outputs["model"]
    resumption = resumption_of(experiment, "finetune", job.seed, output, read, method, bench.taken_up)
    if experiment.methods[method].kind == "fdc":
        climb = bench.climb()
        iterations = range(climb.done, experiment.methods[method].iterations)
        solver = build_solver(config, updates, watched)
        result = ascend(
            climb.start, climb.objective, iterations, climb.settings, solver, climb.generator, resumption
        )
        model, rows = result.model, result.history
    else:
        tilt, kl_weight = tilt_of(bench, job.read_if_any("threshold"))
        random, slot = generator_of(experiment.name, method, job.seed), resumption.slot("solve")
        if isinstance(tilt, FirstVariation):
            solution = build_solver(config, updates, watched)(bench.flow, tilt, kl_weight, random, slot)
        else:
            settings = adjoint_matching_settings(config, updates)
            solution = adjoint_matching.solve(bench.flow, tilt, kl_weight, settings, random, watched, slot)
        model, rows = solution.model, solution.history
    bench.close()
    if processes().leads:
        write_history(rows, job.outputs["history"])
        save_weights(model, output)
        resumption.remove()


Tilt = FirstVariation | Callable[[float], FirstVariation]


def tilt_of(bench: Workbench, threshold_file: Path | None) -> tuple[Tilt, float]:
    """What a method of a single solve tilts by, or its schedule, and the KL weight."""
    experiment, method = bench.experiment, bench.job.method
    if experiment.methods[method].kind == "am":
        return RewardVariation(bench.reward), experiment.reward_weight_of(method)
    if threshold_file is None:
        raise StageError(f"method {method!r} needs the file of the stage threshold; run that first")
    problem = experiment.tail_of(method)
    if not experiment.masses_of(method):
        at = read_threshold(threshold_file)["threshold"]
        return Hinge(bench.reward, at, problem.mass, problem.tail), problem.alpha
    rungs = read_schedule(threshold_file)

    def narrowing(progress: float) -> FirstVariation:
        rung = rungs[min(len(rungs) - 1, int(progress * len(rungs)))]
        return Hinge(bench.reward, rung["threshold"], rung["mass"], problem.tail)

    return narrowing, problem.alpha
