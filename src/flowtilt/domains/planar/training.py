"""Stages that run networks: pretraining, the offline batch, fine-tuning, sampling.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flowtilt.checkpoints import load_weights, save_weights
from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.domains.planar.build import build_data, build_model, build_reward, build_slope, reward_of
from flowtilt.domains.planar.problems import build_objective
from flowtilt.fdc import MirrorAscent, Solver, ascend
from flowtilt.functionals.base import FirstVariation, Functional, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, CVaR, RewardVariation
from flowtilt.model import FlowModel
from flowtilt.parallel import processes
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import Experiment, FunctionalExperiment, method_of, tail_experiment
from flowtilt.pipeline.files import StageError, read_threshold, write_arrays, write_history
from flowtilt.pipeline.solvers import build_solver
from flowtilt.pipeline.states import resumption_of
from flowtilt.pretraining import PretrainingSettings, fit_flow
from flowtilt.resuming import Resumption
from flowtilt.sampling import OdeSettings, sample_ode, sample_sde, sample_with_log_density
from flowtilt.tfft import TailProblem


def pretrain(
    experiment: Experiment, seed: int, output: Path, history: Path, progress: Progress | None = None
) -> None:
    """Pretrain the experiment's network on its data."""
    model = build_model(experiment, seed)
    config = experiment.pretrain
    settings = PretrainingSettings(config.updates, config.batch, config.learning_rate)
    generator = generator_of(experiment.base, "pretrain", seed)
    resumption = resumption_of(experiment, "pretrain", seed, output, [])
    slot = resumption.slot("pretraining")
    rows = fit_flow(model, build_data(experiment).sample, settings, generator, progress, slot)
    write_history(rows, history)
    save_weights(model, output)
    resumption.remove()


def offline(experiment: Experiment, seed: int, model: Path, output: Path) -> None:
    """Draw the offline batch of a pretrained model, with rewards."""
    flow = load_weights(build_model(experiment), model)
    generator = generator_of(experiment.name, "offline", seed)
    count = experiment.offline.samples
    context = flow.draw_context(count, generator)
    x = sample_sde(flow, count, experiment.solver.steps, generator, context)[-1]
    write_arrays(output, x=x.numpy(force=True), reward=reward_of(experiment)(x).numpy(force=True))


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
    """Fine-tune a pretrained model by one method, with its control solver.

    A long fine-tuning keeps its state beside the output while it runs, and goes on from it if it was stopped.

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
    if kind == "pretrained":
        raise ConfigError(f"experiment {experiment.name}: method {method!r} is not fine-tuned")
    solver = build_solver(experiment.solver_of(method), experiment.updates_of(method), progress)
    inputs = [pretrained, start, threshold_file]
    resumption = resumption_of(experiment, "finetune", seed, output, inputs, method)
    if kind == "fdc":
        model, rows = _flow_density_control(experiment, method, seed, base, start, solver, resumption)
    else:
        tilt, kl_weight = _single_tilt(experiment, method, threshold_file)
        random = generator_of(experiment.name, method, seed)
        solution = solver(base, tilt, kl_weight, random, resumption.slot("solve"))
        model, rows = solution.model, solution.history
    if processes().leads:
        write_history(rows, history)
        save_weights(model, output)
        resumption.remove()


def _single_tilt(
    experiment: Experiment, method: str, threshold_file: Path | None
) -> tuple[FirstVariation, float]:
    """What a method of a single solve tilts by, and its KL weight."""
    reward = reward_of(experiment)
    if method_of(experiment, method).kind == "am":
        if isinstance(experiment, FunctionalExperiment):
            return RewardVariation(reward), experiment.problem_of(method).alpha
        return RewardVariation(reward), tail_experiment(experiment).objective.alpha
    if threshold_file is None:
        raise StageError(f"method {method!r} needs --threshold, the file of the threshold stage")
    tail = TailProblem(*experiment.tail_of(method))
    return tail.pseudo_reward(reward, read_threshold(threshold_file)["threshold"]), tail.alpha


def _flow_density_control(
    experiment: Experiment,
    method: str,
    seed: int,
    base: FlowModel,
    start: Path | None,
    solver: Solver,
    resumption: Resumption,
) -> tuple[FlowModel, list[dict[str, float]]]:
    """FDC's iterations, from the pretrained model or from an earlier run."""
    config = method_of(experiment, method)
    iterations = config.iterations or 1  # the configuration admits no fdc method without
    done, model = 0, base
    if config.continue_from is not None:
        if start is None:
            raise StageError(
                f"method {method!r} continues {config.continue_from!r}: it needs --start, its weights"
            )
        done = method_of(experiment, config.continue_from).iterations or 0
        model = load_weights(build_model(experiment), start)
    objective, step_weight, step = _ascent(experiment, method, base)
    settings = MirrorAscent(step_weight, experiment.offline.samples, experiment.solver_of(method).steps)
    result = ascend(
        model,
        objective,
        range(done, iterations),
        settings,
        solver,
        # By the step and not by the method: methods that differ in nothing else share their noise.
        lambda k: generator_of(experiment.name, "fdc", step, seed, k),
        resumption,
    )
    return result.model, result.history


def _ascent(experiment: Experiment, method: str, base: FlowModel) -> tuple[Functional, float, float]:
    """What an fdc method raises, the KL weight of its steps, and the step as configured."""
    if isinstance(experiment, FunctionalExperiment):
        step_weight = experiment.methods[method].step_weight or 1.0
        return build_objective(experiment, method, base), step_weight, step_weight
    tails = tail_experiment(experiment)
    problem, reward = tails.objective, build_reward(tails)
    utility = CVaR(reward, problem.level) if problem.tail == "lower" else SQ(reward, problem.level)
    # Scores are compared at the last time where the solver trains the velocity.
    kl = KL(base, score_time=base.time_grid(tails.solver_of(method).steps)[-2])
    step = tails.methods[method].step or 1.0
    return Objective(utility, kl, problem.tail_alpha), problem.tail_alpha / step, step


def sample(experiment: Experiment, method: str, seed: int, model: Path, output: Path) -> None:
    """Sample a run's model by the probability-flow ODE, with modes, rewards and some log-densities."""
    flow = load_weights(build_model(experiment), model)
    generator = generator_of(experiment.name, method, "sample", seed)
    config = experiment.evaluation
    settings = OdeSettings(steps=config.ode_steps)
    with_density = min(config.density_samples, config.samples)
    context = flow.draw_context(config.samples, generator)
    first, last = torch.arange(config.samples).split([with_density, config.samples - with_density])
    part = flow.select_context(context, first)
    x, log_density = sample_with_log_density(flow, with_density, generator, part, settings)
    if len(last):
        rest = sample_ode(flow, len(last), generator, flow.select_context(context, last), settings)
        x = torch.cat([x, rest])
    arrays = {"x": x, "log_density": log_density}
    if context is not None:
        arrays["mode"] = context
    if isinstance(experiment, FunctionalExperiment):
        if (slope := build_slope(experiment)) is not None:
            arrays["reward"] = slope(x)
    else:
        landscape = build_reward(tail_experiment(experiment))
        arrays |= {"reward": landscape(x), "bumps": landscape.bumps(x)}
    write_arrays(output, **{name: array.numpy(force=True) for name, array in arrays.items()})
