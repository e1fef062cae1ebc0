"""Stages that run networks: pretraining, the offline batch, fine-tuning, sampling.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowtilt.checkpoints import load_weights, save_weights
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.control.base import Progress
from flowtilt.domains.planar.build import build_data, build_model, build_reward
from flowtilt.experiment import ConfigError, Experiment, method_of
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import Functional, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, CVaR, RewardVariation
from flowtilt.model import FlowModel
from flowtilt.pretraining import PretrainingSettings, fit_flow
from flowtilt.sampling import OdeSettings, sample_ode, sample_sde, sample_with_log_density
from flowtilt.seeding import seed_of
from flowtilt.stages.files import (
    StageError,
    read_threshold,
    write_arrays,
    write_history,
)
from flowtilt.tfft import TailProblem


def _generator(*parts: str | float) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def pretrain(
    experiment: Experiment, seed: int, output: Path, history: Path, progress: Progress | None = None
) -> None:
    """Pretrain the experiment's network on its data."""
    model = build_model(experiment, seed)
    config = experiment.pretrain
    settings = PretrainingSettings(config.updates, config.batch, config.learning_rate)
    generator = _generator(experiment.base, "pretrain", seed)
    rows = fit_flow(model, build_data(experiment).sample, settings, generator, progress)
    write_history(rows, history)
    save_weights(model, output)


def offline(experiment: Experiment, seed: int, model: Path, output: Path) -> None:
    """Draw the offline batch of a pretrained model, with rewards."""
    flow = load_weights(build_model(experiment), model)
    generator = _generator(experiment.name, "offline", seed)
    x = sample_sde(flow, experiment.offline.samples, experiment.solver.steps, generator)[-1]
    write_arrays(output, x=x.numpy(), reward=build_reward(experiment)(x).numpy())


def _tail_problem(experiment: Experiment) -> TailProblem:
    objective = experiment.objective
    return TailProblem(objective.tail, objective.mass, objective.tail_alpha)


def finetune(
    experiment: Experiment,
    method: str,
    seed: int,
    pretrained: Path,
    output: Path,
    history: Path,
    start: Path | None = None,
    threshold_file: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Fine-tune a pretrained model by one method, with Adjoint Matching as the solver.

    Args:
        experiment: what to do.
        method: name of one of its methods, not of kind ``pretrained``.
        seed: of the run.
        pretrained: weights of the pretrained model.
        output: where the fine-tuned weights go.
        history: where the history goes, a row an update.
        start: weights of the run that ``continue_from`` names.
        threshold_file: of the threshold stage, for tfft.
        progress: called with each update's row.
    """
    base: FlowModel = load_weights(build_model(experiment), pretrained)
    kind = method_of(experiment, method).kind
    solver_settings = experiment.solver.model_dump() | {"updates": experiment.updates_of(method)}
    settings = AdjointMatchingSettings(**solver_settings)
    solver = partial(solve, settings=settings, progress=progress)
    if kind == "am":
        tilt = RewardVariation(build_reward(experiment))
        generator = _generator(experiment.name, method, seed)
        solution = solver(base, tilt, experiment.objective.alpha, generator=generator)
        model, rows = solution.model, solution.history
    elif kind == "tfft":
        if threshold_file is None:
            raise StageError(f"method {method!r} needs --threshold, the file of the threshold stage")
        problem = _tail_problem(experiment)
        hinge = problem.pseudo_reward(build_reward(experiment), read_threshold(threshold_file)["threshold"])
        generator = _generator(experiment.name, method, seed)
        solution = solver(base, hinge, problem.alpha, generator=generator)
        model, rows = solution.model, solution.history
    elif kind == "fdc":
        model, rows = _flow_density_control(experiment, method, seed, base, start, solver)
    else:
        raise ConfigError(f"experiment {experiment.name}: method {method!r} is not fine-tuned")
    write_history(rows, history)
    save_weights(model, output)


def _flow_density_control(
    experiment: Experiment,
    method: str,
    seed: int,
    base: FlowModel,
    start: Path | None,
    solver: Callable[..., Any],
) -> tuple[FlowModel, list[dict[str, float]]]:
    """FDC's iterations, from the pretrained model or from an earlier run."""
    config = method_of(experiment, method)
    # The configuration admits no fdc method without these two.
    iterations, step = config.iterations or 1, config.step or 1.0
    done, model = 0, base
    if config.continue_from is not None:
        if start is None:
            raise StageError(
                f"method {method!r} continues {config.continue_from!r}: it needs --start, its weights"
            )
        done = method_of(experiment, config.continue_from).iterations or 0
        model = load_weights(build_model(experiment), start)
    problem = experiment.objective
    reward = build_reward(experiment)
    utility: Functional = (
        CVaR(reward, problem.level) if problem.tail == "lower" else SQ(reward, problem.level)
    )
    steps = experiment.solver.steps
    # Scores are compared at the last time where the solver trains the velocity.
    objective = Objective(utility, KL(base, score_time=1 - 1 / steps), problem.tail_alpha)
    settings = MirrorAscent(problem.tail_alpha / step, experiment.offline.samples, steps)
    result = ascend(
        model,
        objective,
        range(done, iterations),
        settings,
        lambda flow, tilt, weight, random: solver(flow, tilt, weight, generator=random),
        lambda k: _generator(experiment.name, "fdc", step, seed, k),
    )
    return result.model, result.history


def sample(experiment: Experiment, method: str, seed: int, model: Path, output: Path) -> None:
    """Sample a run's model by the probability-flow ODE, with rewards and some log-densities."""
    flow = load_weights(build_model(experiment), model)
    generator = _generator(experiment.name, method, "sample", seed)
    config = experiment.evaluation
    settings = OdeSettings(steps=config.ode_steps)
    with_density = min(config.density_samples, config.samples)
    x, log_density = sample_with_log_density(flow, with_density, generator, settings=settings)
    if config.samples > with_density:
        rest = sample_ode(flow, config.samples - with_density, generator, settings=settings)
        x = torch.cat([x, rest])
    landscape = build_reward(experiment)
    write_arrays(
        output,
        x=x.numpy(),
        reward=landscape(x).numpy(),
        bumps=landscape.bumps(x).numpy(),
        log_density=log_density.numpy(),
    )
