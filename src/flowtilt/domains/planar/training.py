"""Pretraining, and samples of a run.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowtilt.checkpoints import load_weights, save_weights
from flowtilt.devices import generator_of
from flowtilt.domains.planar.build import build_data, build_model, build_reward, build_slope
from flowtilt.domains.planar.experiment import FunctionalExperiment, PlanarExperiment, tail_experiment
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import read_arrays, write_arrays, write_history
from flowtilt.pipeline.states import resumption_of
from flowtilt.pretraining import PretrainingSettings, fit_flow
from flowtilt.sampling import OdeSettings, sample_ode, sample_with_log_density


def pretrain(job: Job) -> None:
    """Pretrain the experiment's network on its data."""
    experiment, output = job.experiment, job.outputs["model"]
    model = build_model(experiment, job.seed)
    config = experiment.pretrain
    settings = PretrainingSettings(config.updates, config.batch, config.learning_rate)
    generator = generator_of(experiment.starts_from, "pretrain", job.seed)
    resumption = resumption_of(experiment, "pretrain", job.seed, output, [])
    slot = resumption.slot("pretraining")
    progress = job.bar(config.updates, "pretrain")
    rows = fit_flow(model, build_data(experiment).sample, settings, generator, progress, slot)
    write_history(rows, job.outputs["history"])
    save_weights(model, output)
    resumption.remove()


def sample(job: Job) -> None:
    """Sample a run's model by the probability-flow ODE, with modes, rewards and some log-densities.

    Samples that a method has kept are taken as they are, without log-densities.
    """
    experiment = job.experiment
    if (kept := job.read_if_any("samples")) is not None:
        x = torch.as_tensor(read_arrays(kept, "x")[0])
        _write(job, {"x": x} | _on_landscape(experiment, x))
        return
    flow = load_weights(build_model(experiment), job.read_if_any("model") or job.read("base"))
    generator = generator_of(experiment.name, job.method, "sample", job.seed)
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
        arrays |= _on_landscape(experiment, x)
    _write(job, arrays)


def _on_landscape(experiment: PlanarExperiment, x: Tensor) -> dict[str, Tensor]:
    """Rewards of samples, and the profile of the bumps there."""
    landscape = build_reward(tail_experiment(experiment))
    return {"reward": landscape(x), "bumps": landscape.bumps(x)}


def _write(job: Job, arrays: dict[str, Tensor]) -> None:
    write_arrays(job.outputs["samples"], **{name: array.numpy(force=True) for name, array in arrays.items()})
