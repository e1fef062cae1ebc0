"""The stages that are the same in every domain: the offline batch, thresholds, fine-tuning.

A domain gives them a :class:`Workbench`: a pretrained flow, the reward, and what FDC raises. Randomness
follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtilt.checkpoints import notes_of, save_weights
from flowtilt.control import adjoint_matching
from flowtilt.control.annealed_fitting import AnnealedSolution, Measure, solve_tail
from flowtilt.control.base import Progress, Solution
from flowtilt.control.weighted_fitting import Samples
from flowtilt.devices import generator_of
from flowtilt.fdc import (
    Ascent,
    ExponentAscent,
    MirrorAscent,
    Solver,
    StepWeight,
    Trail,
    ascend,
    ascend_by_exponents,
)
from flowtilt.functionals.base import FirstVariation, Objective
from flowtilt.functionals.utilities import Hinge, RewardVariation
from flowtilt.model import Context, FlowModel
from flowtilt.parallel import processes
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Job, domain_of, imported
from flowtilt.pipeline.files import (
    StageError,
    read_arrays,
    read_schedule,
    read_threshold,
    reading,
    write_arrays,
    write_frontier,
    write_history,
)
from flowtilt.pipeline.health import training_metrics, warn
from flowtilt.pipeline.sections import SolverConfig
from flowtilt.pipeline.solvers import (
    Given,
    Sampler,
    adjoint_matching_settings,
    annealed_fitting_settings,
    build_solver,
)
from flowtilt.pipeline.states import resumption_of
from flowtilt.resuming import Resumption, Slot
from flowtilt.rewards import Reward
from flowtilt.sampling import OdeSettings, sample_ode, sample_sde
from flowtilt.tfft import TailProblem


@dataclass(frozen=True)
class Climb:
    """What an fdc method raises, and by which steps.

    Attributes:
        objective: the functional.
        settings: of the iteration: by scores, or by exponents.
        start: model before the first iteration that is to be done.
        done: iterations that came before.
        generator: source of randomness of each iteration, by its number.
        trail: of an earlier ascent by exponents that this one goes on from.
        first: samples of ``start``, for an ascent by exponents; else they are drawn.
        measure: of the samples of each step, for an ascent by exponents.
    """

    objective: Objective
    settings: MirrorAscent | ExponentAscent
    start: FlowModel
    generator: Callable[[int], torch.Generator]
    done: int = 0
    trail: Trail | None = None
    first: Samples | None = None
    measure: Measure | None = None

    def run(self, iterations: int, solver: Solver, resumption: Resumption) -> Ascent:
        """All iterations up to a number that are still to be done."""
        if isinstance(self.settings, MirrorAscent):
            todo = range(self.done, iterations)
            return ascend(self.start, self.objective, todo, self.settings, solver, self.generator, resumption)
        return ascend_by_exponents(
            self.start,
            self.objective.utility,
            self.objective.alpha,
            iterations,
            self.settings,
            solver,
            self.generator,
            resumption,
            self.trail,
            self.first,
            self.measure,
        )


TRAIL = "trail"
"""Note in a model's file with the :class:`flowtilt.fdc.Trail` that has led to it, as JSON."""


FRONTIER = "frontier.csv"
"""File beside a history with what the model of each stage is worth, a row each, by its divergence from the
pretrained model; of methods in stages, in domains that measure banks."""

NOTHING_DONE = {"active_share": 0.0, "network_passes": 0, "seconds": 0.0}
"""History of a training that goes on from an ascent which had come to its end."""


def trail_of(path: Path) -> Trail | None:
    """The trail that has led to a model, if its file has one.

    Raises:
        StageError: if it is none.
    """
    if (note := notes_of(path).get(TRAIL)) is None:
        return None
    with reading(path, "has no whole trail", "finetune"):
        return Trail(**json.loads(note))


class Workbench(ABC):
    """A pretrained flow of a domain, with what its methods tilt it by."""

    chunk: int | None = None
    """Samples of the offline batch that are drawn together; None for all."""

    sampler: Sampler = "ode"
    """How banks are drawn: as runs are measured."""

    dear_rewards: bool = False
    """Whether a bank that is the offline batch takes the batch's rewards, and evaluates none."""

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

    @cached_property
    def offline(self) -> Samples | None:
        """Samples of the offline batch, if the job reads it."""
        if (batch := self.job.read_if_any("offline")) is None:
            return None
        x, rewards, labels = read_arrays(batch, "x", "reward", "context")
        context = self.flow.context_of(torch.as_tensor(labels))
        known = ((self.reward, rewards.astype(np.float64)),) if self.dear_rewards else ()
        return Samples(torch.as_tensor(x), context, known)

    @property
    def given(self) -> Given | None:
        """The pretrained flow with these samples, for solvers that need a bank of it."""
        return None if self.offline is None else Given(self.flow, self.offline)

    @property
    def measures(self) -> Measure | None:
        """The measure, if the domain has one."""
        return None if type(self).measure is Workbench.measure else self.measure

    def exponents(self, step_weight: StepWeight | None) -> ExponentAscent:
        """The settings of an ascent by exponents; without the KL weight of its steps each is searched."""
        experiment, solver = self.experiment, self.experiment.solver_of(self.job.method)
        # Those of the solve's bank, which then is the one that a step is searched on.
        samples = experiment.offline.samples if solver.kind == "adjoint_matching" else solver.bank
        budget = {"kl": solver.kl, "stage_kl": solver.stage_kl}
        return ExponentAscent(samples, solver.steps, solver.share, solver.minimum_ess, step_weight, **budget)

    def measure(self, samples: Tensor, context: Context, values: np.ndarray) -> dict[str, float]:
        """What a bank of a stage's model is worth, for the frontier of its method; nothing by default.

        Args:
            samples: of the bank, those without a value perhaps left out.
            context: of the samples.
            values: of the reward, NaN where it failed, (n,).
        """
        return {}

    def draw(self, flow: FlowModel, count: int, generator: torch.Generator, context: Context) -> Tensor:
        """Samples as a run is measured by, by the experiment's ``sample_passes`` each."""
        if self.sampler == "sde":
            return sample_sde(flow, count, self.experiment.solver.steps, generator, context)[-1]
        settings = OdeSettings(steps=self.experiment.evaluation.ode_steps)
        return sample_ode(flow, count, generator, context, settings)

    def contexts(self, generator: torch.Generator) -> tuple[int, Context]:
        """How many samples a run is measured by, and their contexts."""
        count = self.experiment.evaluation.samples
        return count, self.flow.draw_context(count, generator)

    def write(self, samples: Tensor, context: Context, output: Path) -> None:
        """Write samples that were kept, as the stage that evaluates runs reads them: the array ``x``."""
        write_arrays(output, x=samples.numpy(force=True))

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
    arrays = {"x": torch.cat(states), "reward": torch.cat(rewards)}
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
    frontier: list[dict[str, float]] = []
    read = [job.read(role) for role in sorted(job.inputs)]
    output = job.outputs["model"]
    resumption = resumption_of(experiment, "finetune", job.seed, output, read, method, bench.taken_up)
    notes: dict[str, str] = {}
    if experiment.methods[method].kind == "fdc":
        # The budget is that of all steps, each of which is a problem with a KL weight.
        of_step = config.model_copy(update={"kl": None, "stage_kl": None})
        solver = build_solver(of_step, updates, watched, bench.given, bench.sampler)
        result = bench.climb().run(experiment.methods[method].iterations, solver, resumption)
        model, rows, frontier = result.model, result.history, result.frontier
        if result.trail is not None:
            notes[TRAIL] = json.dumps(asdict(result.trail))
    else:
        solution = _solve_once(bench, config, updates, watched, resumption.slot("solve"))
        model, rows = solution.model, solution.history
        if isinstance(solution, AnnealedSolution):
            frontier = solution.frontier
    bench.close()
    if processes().leads:
        if rows:
            warn(method, training_metrics({name: np.array([row[name] for row in rows]) for name in rows[0]}))
        write_history(rows or [NOTHING_DONE], job.outputs["history"])
        write_frontier(frontier, job.outputs["history"].with_name(FRONTIER))
        save_weights(model, output, notes)
        resumption.remove()


def _solve_once(
    bench: Workbench, config: SolverConfig, updates: int, watched: Progress | None, slot: Slot
) -> Solution:
    """The single solve of a method of kind am or tfft."""
    experiment, method, flow = bench.experiment, bench.job.method, bench.flow
    random = generator_of(experiment.name, method, bench.job.seed)
    tilt, kl_weight = tilt_of(bench, bench.job.read_if_any("threshold"))
    if not isinstance(tilt, FirstVariation):
        settings = adjoint_matching_settings(config, updates)
        return adjoint_matching.solve(flow, tilt, kl_weight, settings, random, watched, slot)
    given = experiment.threshold_of(method)
    if config.kind == "annealed_fitting" and experiment.methods[method].kind == "tfft" and given is None:
        # Its threshold is found anew in each stage, from all banks of the chain.
        problem, stages = (
            TailProblem(*experiment.tail_of(method)),
            annealed_fitting_settings(config, updates, bench.sampler),
        )
        more = (random, watched, slot, bench.offline, bench.measures)
        return solve_tail(flow, bench.reward, problem, stages, *more)
    solver = build_solver(config, updates, watched, bench.given, bench.sampler, bench.measures)
    return solver(flow, tilt, kl_weight, random, slot)


Tilt = FirstVariation | Callable[[float], FirstVariation]


def tilt_of(bench: Workbench, threshold_file: Path | None) -> tuple[Tilt, float]:
    """What a method of a single solve tilts by, or its schedule, and the KL weight."""
    experiment, method = bench.experiment, bench.job.method
    if threshold_file is None or not experiment.masses_of(method):
        return fixed_tilt_of(bench, method, threshold_file)
    problem, rungs = experiment.tail_of(method), read_schedule(threshold_file)

    def narrowing(progress: float) -> FirstVariation:
        rung = rungs[min(len(rungs) - 1, int(progress * len(rungs)))]
        if rung["mass"] == 1:
            return RewardVariation(bench.reward)
        return Hinge(bench.reward, rung["threshold"], rung["mass"], problem.tail)

    return narrowing, problem.alpha


def fixed_tilt_of(
    bench: Workbench, method: str, threshold_file: Path | None
) -> tuple[RewardVariation | Hinge, float]:
    """The tilt of a method, and its KL weight: of a tfft the hinge at its threshold, else the reward."""
    experiment = bench.experiment
    if experiment.methods[method].kind != "tfft":
        return RewardVariation(bench.reward), experiment.reward_weight_of(method)
    if threshold_file is None:
        raise StageError(f"method {method!r} needs the file of the stage threshold; run that first")
    problem, at = experiment.tail_of(method), read_threshold(threshold_file)["threshold"]
    return Hinge(bench.reward, at, problem.mass, problem.tail), problem.alpha
