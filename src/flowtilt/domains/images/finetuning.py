"""Stages of pictures: the offline batch of the pretrained model, and fine-tuning.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flowtilt.checkpoints import save_weights
from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.sampling import CHUNK, load_base, load_reward
from flowtilt.domains.images.sections import EntropyObjective
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import FirstVariation, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import Entropy, Hinge, RewardVariation
from flowtilt.model import FlowModel
from flowtilt.parallel import processes
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import method_of
from flowtilt.pipeline.files import StageError, read_threshold, write_arrays, write_history
from flowtilt.pipeline.solvers import build_solver
from flowtilt.pipeline.states import resumption_of
from flowtilt.resuming import Resumption
from flowtilt.sampling import sample_sde


def offline(experiment: ImageExperiment, seed: int, model: Path, output: Path) -> None:
    """Draw the offline batch of the pretrained model by the memoryless process; written are its rewards.

    Every prompt comes as often, up to one.

    Raises:
        ConfigError: if the experiment has none.
    """
    if experiment.offline is None:
        raise ConfigError(f"experiment {experiment.name}: has no key offline, the size of the batch")
    count = experiment.offline.samples
    base = load_base(experiment, model)
    reward = load_reward(experiment, model, base.decode)
    generator = generator_of(experiment.name, "offline", seed)
    context = base.flow.draw_context(count, generator)
    rewards = []
    for index in torch.arange(count).split(CHUNK):
        part = base.flow.select_context(context, index)
        rewards.append(
            reward(sample_sde(base.flow, len(index), experiment.solver.steps, generator, part)[-1], part)
        )
    write_arrays(output, reward=torch.cat(rewards).numpy(force=True))


def finetune(
    experiment: ImageExperiment,
    method: str,
    seed: int,
    model: Path,
    output: Path,
    history: Path,
    threshold_file: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Fine-tune the pretrained model by one method.

    A long fine-tuning keeps its state beside the output while it runs, and goes on from it if it was stopped.

    Args:
        experiment: what to do.
        method: name of one of its methods, of kind am, fdc or tfft.
        seed: of the run.
        model: file of the stage images-model.
        output: where what was fine-tuned goes: the denoiser's weights, or its adapters.
        history: where the history goes, a row an update.
        threshold_file: of the threshold stage, for tfft.
        progress: called with each update's row.
    """
    config = method_of(experiment, method)
    if not config.tuned:
        raise ConfigError(f"experiment {experiment.name}: method {method!r} is not fine-tuned")
    base = load_base(experiment, model)
    resumption = resumption_of(experiment, "finetune", seed, output, [model, threshold_file], method)
    if config.kind == "fdc":
        tuned, rows = _explore(experiment, method, seed, base.flow, progress, resumption)
    else:
        reward = load_reward(experiment, model, base.decode)
        tilt: FirstVariation = RewardVariation(reward)
        if config.kind == "tfft":
            if threshold_file is None:
                raise StageError(f"method {method!r} needs --threshold, the file of the threshold stage")
            mass = experiment.mass_of(method)
            tilt = Hinge(reward, read_threshold(threshold_file)["threshold"], mass, "lower")
        solver = build_solver(experiment.solver_of(method), experiment.updates_of(method), progress)
        random = generator_of(experiment.name, method, seed)
        solution = solver(base.flow, tilt, experiment.reward_weight, random, resumption.slot("solve"))
        tuned, rows = solution.model, solution.history
    if processes().leads:
        write_history(rows, history)
        save_weights(tuned, output)
        resumption.remove()


def noisy_time(base: FlowModel, steps: int, variance: float) -> float:
    """The time of the solver's grid whose noise has about a variance, where it trains the velocity."""
    times = torch.tensor(base.time_grid(steps)[:-1], dtype=torch.float64)
    return float(times[(base.path.beta(times).square() - variance).abs().argmin()])


def _explore(
    experiment: ImageExperiment,
    method: str,
    seed: int,
    base: FlowModel,
    progress: Progress | None,
    resumption: Resumption,
) -> tuple[FlowModel, list[dict[str, float]]]:
    """FDC on the entropy of the latents, less the KL divergence, both by scores.

    The entropy is 1-smooth relative to itself, and the divergence alpha times: steps of the KL weight
    1 + alpha never descend, and without noise the first one is the optimum, ``p_0^(alpha / (1 + alpha))``.
    With noise both only get smoother, since no divergence grows by it. A step of the weight alpha takes a
    law ``p_0^c`` to ``p_0^(1 - c / alpha)``, which at alpha = 1 is the flat law and then p_0 again.
    """
    config, solver = method_of(experiment, method), experiment.solver_of(method)
    alpha, step = experiment.entropy_weight(method), config.step or 1.0
    goal = experiment.objective
    assert isinstance(goal, EntropyObjective)
    time = noisy_time(base, solver.steps, goal.noise)
    entropy = Entropy(score_time=time, pairs=goal.pairs)
    objective = Objective(entropy, KL(base, score_time=time, pairs=goal.pairs), alpha)
    result = ascend(
        base,
        objective,
        range(config.iterations or 1),
        # Scores need no samples of the law: as few as there can be.
        MirrorAscent((1 + alpha) / step, 1, solver.steps),
        build_solver(solver, experiment.updates_of(method), progress),
        lambda k: generator_of(experiment.name, method, seed, k),
        resumption,
    )
    return result.model, result.history
