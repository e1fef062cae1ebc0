"""Angles on a circle: what the jobs do. A sample is a point (cos, sin) of the plane, or near the circle."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from circle_domain import CircleExperiment
from flowtilt.checkpoints import load_weights, save_weights
from flowtilt.devices import generator_of
from flowtilt.fdc import MirrorAscent
from flowtilt.functionals.base import Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ
from flowtilt.interpolants import Interpolant, Linear, time_grid
from flowtilt.metrics.tails import upper_tail_mean
from flowtilt.model import Context, FlowModel
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import read_arrays, write_arrays, write_history, write_rows
from flowtilt.pipeline.health import tuned_metrics
from flowtilt.pipeline.stages import Climb, Workbench
from flowtilt.pretraining import PretrainingSettings, fit_flow
from flowtilt.rewards import Reward
from flowtilt.sampling import OdeSettings, sample_ode


class CircleFlow(FlowModel):
    """A multilayer perceptron on (x, t) in the plane."""

    data_variance = 0.5  # of either coordinate, for angles all around

    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = Linear()
        self.network = nn.Sequential(
            *(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        )

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return self.standard_normal(count, 2, generator=generator)

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        return self.network(torch.cat([x, t.expand(len(x))[:, None]], dim=1))


class Alignment(Reward):
    """The cosine of the angle between a sample and a direction, in [-1, 1]."""

    def __init__(self, direction: float) -> None:
        self.direction = torch.tensor([direction])

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        unit = torch.nn.functional.normalize(x, dim=1)
        return unit[:, 0] * self.direction.cos() + unit[:, 1] * self.direction.sin()


def new_flow(experiment: CircleExperiment, seed: int = 0) -> CircleFlow:
    """The network before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CircleFlow(experiment.network.width)


def process(experiment: CircleExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...], float]:
    """The path of the solver, its times and the data variance of its steps."""
    return Linear(), tuple(time_grid(steps)), CircleFlow.data_variance


class CircleBench(Workbench):
    """The pretrained flow, and what methods tilt it by."""

    @cached_property
    def flow(self) -> FlowModel:
        return load_weights(new_flow(self.experiment), self.job.read("pretrained"))

    @cached_property
    def reward(self) -> Reward:
        return Alignment(self.experiment.reward.direction)

    def climb(self) -> Climb:
        """FDC on the mean of the upper tail, less the KL divergence."""
        experiment, job, goal = self.experiment, self.job, self.experiment.objective
        steps = experiment.solver_of(job.method).steps
        kl = KL(self.flow, score_time=0.7)  # with noise: without it there is no density in the plane
        return Climb(
            Objective(SQ(self.reward, goal.mass), kl, goal.alpha),
            MirrorAscent(goal.alpha, experiment.offline.samples, steps),
            self.flow,
            lambda iteration: generator_of(experiment.name, job.method, job.seed, iteration),
        )


# ----------------------------------------------------------------------------------------- jobs


def pretrain(job: Job) -> None:
    """Fit the flow to the data."""
    experiment, config = job.experiment, job.experiment.pretrain
    means = torch.tensor(experiment.data.means)

    def data(count: int, generator: torch.Generator) -> Tensor:
        angles = means[torch.randint(len(means), (count,), generator=generator)]
        angles = angles + experiment.data.deviation * torch.randn(count, generator=generator)
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    model = new_flow(experiment, job.seed)
    settings = PretrainingSettings(config.updates, config.batch, config.learning_rate)
    random = generator_of(experiment.starts_from, "pretrain", job.seed)
    rows = fit_flow(model, data, settings, random, job.bar(config.updates, "pretrain"))
    write_history(rows, job.outputs["history"])
    save_weights(model, job.outputs["model"])


def sample(job: Job) -> None:
    """Draw from a run's model."""
    asked = job.experiment.evaluation
    flow = load_weights(new_flow(job.experiment), job.read("model"))
    random = generator_of(job.experiment.name, "sample", job.seed)  # models start from the same noise
    x = sample_ode(flow, asked.samples, random, settings=OdeSettings(asked.ode_steps))
    write_arrays(job.outputs["samples"], x=x.numpy(force=True))


def evaluate(job: Job) -> None:
    """Metrics of a run's samples, and what was active in its training, or what its samples cost."""
    experiment, mass = job.experiment, job.experiment.objective.mass
    (x,) = read_arrays(job.read("samples"), "x")
    points = torch.as_tensor(x)
    rewards = Alignment(experiment.reward.direction)(points).numpy(force=True)
    mean = torch.nn.functional.normalize(points, dim=1).mean(0)
    metrics = {
        "mean_reward": float(rewards.mean()),
        f"top_{100 * mass:g}pct_reward": upper_tail_mean(rewards, mass),
        "resultant_length": float(mean.norm()),
    }
    write_rows({job.method: metrics | tuned_metrics(job)}, job.outputs["metrics"])
