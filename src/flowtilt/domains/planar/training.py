"""Stages that run networks: pretraining, the offline batch, fine-tuning, sampling.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flowtilt.checkpoints import load_weights, save_weights
from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.domains.planar.build import build_data, build_model, build_reward, build_slope
from flowtilt.domains.planar.experiment import FunctionalExperiment, PlanarExperiment, tail_experiment
from flowtilt.pipeline.files import write_arrays, write_history
from flowtilt.pipeline.states import resumption_of
from flowtilt.pretraining import PretrainingSettings, fit_flow
from flowtilt.sampling import OdeSettings, sample_ode, sample_with_log_density


def pretrain(
    experiment: PlanarExperiment, seed: int, output: Path, history: Path, progress: Progress | None = None
) -> None:
    """Pretrain the experiment's network on its data."""
    model = build_model(experiment, seed)
    config = experiment.pretrain
    settings = PretrainingSettings(config.updates, config.batch, config.learning_rate)
    generator = generator_of(experiment.starts_from, "pretrain", seed)
    resumption = resumption_of(experiment, "pretrain", seed, output, [])
    slot = resumption.slot("pretraining")
    rows = fit_flow(model, build_data(experiment).sample, settings, generator, progress, slot)
    write_history(rows, history)
    save_weights(model, output)
    resumption.remove()


def sample(experiment: PlanarExperiment, method: str, seed: int, model: Path, output: Path) -> None:
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
