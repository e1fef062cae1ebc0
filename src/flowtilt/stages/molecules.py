"""Stages of molecules that run networks: pretraining, the offline batch, fine-tuning, sampling.

Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtilt.checkpoints import CheckpointError, load_weights, save_weights
from flowtilt.configuration import ConfigError
from flowtilt.control import adjoint_matching
from flowtilt.control.base import Progress
from flowtilt.domains.molecules import build
from flowtilt.domains.molecules.data import Molecules
from flowtilt.domains.molecules.energies import Decoder, XTBReward
from flowtilt.experiment import method_of
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.files import atomic_path
from flowtilt.functionals.base import FirstVariation, Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, Hinge, RewardVariation
from flowtilt.model import FlowModel
from flowtilt.molecule_experiment import MoleculeExperiment
from flowtilt.sampling import OdeSettings, sample_ode, sample_sde
from flowtilt.seeding import seed_of
from flowtilt.stages.files import (
    StageError,
    read_schedule,
    read_threshold,
    write_arrays,
    write_history,
)
from flowtilt.stages.solvers import adjoint_matching_settings, build_solver

log = logging.getLogger(__name__)

CHUNK = 256
"""Molecules that are sampled together, of nearly one size."""

PRETRAINING_SEED = 0
"""Of the pretrained model, from which all seeds of fine-tuning start."""


def _generator(*parts: str | float) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


# ------------------------------------------------------------------------------- pretraining


def pretrain(
    experiment: MoleculeExperiment, molecules: Path, output: Path, progress: Progress | None = None
) -> None:
    """Give the pretrained model: the checkpoint that is there, checked, or one that is trained anew.

    A training keeps its state beside the output and goes on from it if it was stopped. Its history is
    ``history.csv`` there.

    Raises:
        CheckpointError: if the checkpoint is missing, another file, or of another network.
    """
    if experiment.model.kind == "flowmol":
        raise ConfigError(
            f"experiment {experiment.name}: key model.kind: weights of flowmol come with its package and are "
            "not trained here"
        )
    if not experiment.checkpoint.retrain:
        _check_shipped(experiment)
        with atomic_path(output) as temporary:
            shutil.copyfile(experiment.checkpoint.path, temporary)
        return
    state = output.with_name("pretraining_state.safetensors")
    history = build.pretrain(experiment.flow, molecules, PRETRAINING_SEED, output, state, progress)
    write_history(history, output.with_name("history.csv"))


def _check_shipped(experiment: MoleculeExperiment) -> None:
    """See that the shipped checkpoint is the one that the configuration means."""
    path = Path(experiment.checkpoint.path)
    where = f"experiment {experiment.name}: key checkpoint"
    retrain = "or set checkpoint.retrain to true, which trains it anew"
    if not path.is_file():
        raise CheckpointError(f"{where}.path: {path}: no such file; restore it, {retrain}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != experiment.checkpoint.sha256:
        raise CheckpointError(
            f"{where}.sha256: {path} has the SHA-256 {found}, not {experiment.checkpoint.sha256}; restore "
            f"the file or correct the key, {retrain}"
        )
    load_weights(build.build_model(experiment.flow), path)


# ------------------------------------------------------------------------- base model, reward


@dataclass(frozen=True)
class _Base:
    """A base model and how its states become molecules."""

    flow: FlowModel
    decode: Decoder

    def reward(self, experiment: MoleculeExperiment, workers: int | None) -> XTBReward:
        return XTBReward(self.decode, build.build_xtb(experiment.reward), workers)


def _load(experiment: MoleculeExperiment, weights: Path) -> _Base:
    """The configured model with some weights."""
    if experiment.model.kind == "flowmol":
        from flowtilt.domains.molecules.flowmol import load_flowmol

        flow, decode = load_flowmol(experiment.model.name)
        return _Base(flow, decode)
    flow = load_weights(build.build_model(experiment.flow), weights)
    return _Base(flow, build.decoder(build.build_units(experiment.flow)))


def offline(
    experiment: MoleculeExperiment, seed: int, model: Path, output: Path, workers: int | None = None
) -> None:
    """Draw the offline batch of the pretrained model by the memoryless process, with rewards.

    Written are all rewards, NaN where there is no energy.
    """
    base = _load(experiment, model)
    generator = _generator(experiment.base, "offline", seed)
    count, steps = experiment.offline.samples, experiment.solver.steps
    reward = base.reward(experiment, workers)
    rewards = []
    context = base.flow.draw_context(count, generator)
    for index in torch.arange(count).split(CHUNK):
        part = base.flow.select_context(context, index)
        rewards.append(reward(sample_sde(base.flow, len(index), steps, generator, part)[-1], part))
    _say_failures(reward)
    write_arrays(output, reward=torch.cat(rewards).numpy())


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
    base = _load(experiment, pretrained)
    reward = base.reward(experiment, workers)
    counted = _Counted(reward, progress)
    if method_of(experiment, method).kind == "fdc":
        model, rows = _flow_density_control(experiment, method, seed, base.flow, reward, counted)
    else:
        tilt, kl_weight = _tilt(experiment, method, reward, threshold_file)
        settings = adjoint_matching_settings(experiment.solver_of(method), experiment.updates_of(method))
        random = _generator(experiment.name, method, seed)
        solution = adjoint_matching.solve(base.flow, tilt, kl_weight, settings, random, counted)
        model, rows = solution.model, solution.history
    _say_failures(reward)
    write_history(rows, history)
    save_weights(model, output)


class _Counted:
    """Adds to the row of each update how many energies were computed in it, and how many failed."""

    def __init__(self, reward: XTBReward, progress: Progress | None) -> None:
        self.reward, self.progress = reward, progress
        self.evaluated = self.failed = 0

    def __call__(self, row: dict[str, float]) -> None:
        evaluated, failed = self.reward.evaluated, self.reward.failures.total()
        row |= {"evaluated": evaluated - self.evaluated, "failed": failed - self.failed}
        self.evaluated, self.failed = evaluated, failed
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
        # The KL weight of the problem at a rung is alpha over its own mass; a hinge over the last one's
        # mass under the last one's KL weight is the same tilt.
        return Hinge(reward, rung["threshold"], tail.mass, "upper")

    return rising, tail.alpha


def _flow_density_control(
    experiment: MoleculeExperiment,
    method: str,
    seed: int,
    base: FlowModel,
    reward: XTBReward,
    progress: Progress,
) -> tuple[FlowModel, list[dict[str, float]]]:
    """FDC on the mean of the best share, less the KL divergence by scores."""
    config, solver = method_of(experiment, method), experiment.solver_of(method)
    tail, step = experiment.tail_of(method), config.step or 1.0
    # Scores are compared at the last time where the solver trains the velocity.
    kl = KL(base, score_time=1 - 1 / solver.steps)
    objective = Objective(SQ(reward, experiment.level_of(method)), kl, tail.alpha)
    result = ascend(
        base,
        objective,
        range(config.iterations or 1),
        MirrorAscent(tail.alpha / step, experiment.offline.samples, solver.steps),
        build_solver(solver, experiment.updates_of(method), progress),
        lambda k: _generator(experiment.name, method, seed, k),
    )
    return result.model, result.history


# --------------------------------------------------------------------------------- sampling


def sample(
    experiment: MoleculeExperiment,
    method: str,
    seed: int,
    output: Path,
    model: Path | None = None,
    molecules: Path | None = None,
) -> None:
    """Draw the molecules of a run by the probability-flow ODE, or from the training data.

    Models of one seed start from the same noise, so that differences between methods are not those of
    their draws. Written are coordinates in ångström (molecules, atoms, 3) and atomic numbers (molecules,
    atoms), zero where there is no atom.

    Args:
        experiment: of the run.
        method: of the run.
        seed: of the run.
        output: npz file to write.
        model: weights of the run, for all methods but those of kind ``data``.
        molecules: file of QM9, for methods of kind ``data``.
    """
    count = experiment.evaluation.samples
    generator = _generator(experiment.base, "sample", seed)
    if method_of(experiment, method).kind == "data":
        if molecules is None:
            raise StageError(f"method {method!r} needs --molecules, the file of the training data")
        coordinates, numbers = _drawn(build.subset_of(experiment.flow, molecules), count, generator)
    else:
        if model is None:
            raise StageError(f"method {method!r} needs --model, the weights to sample")
        base = _load(experiment, model)
        settings = OdeSettings(steps=experiment.evaluation.ode_steps)
        coordinates, numbers = _generated(base, count, settings, generator)
    write_arrays(
        output, coordinates=coordinates.numpy().astype(np.float32), numbers=numbers.numpy().astype(np.uint8)
    )


def _generated(
    base: _Base, count: int, settings: OdeSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Molecules of a flow, in batches of nearly one size, which saves padding."""
    context = base.flow.draw_context(count, generator)
    order = torch.argsort(context.sum(1), stable=True)
    coordinates, numbers = torch.zeros(*context.shape, 3), torch.zeros(context.shape, dtype=torch.long)
    for index in order.split(CHUNK):
        mask = base.flow.select_context(context, index)
        atoms = int(mask.sum(1).max())
        mask = mask[:, :atoms]
        x = sample_ode(base.flow, len(index), generator, mask, settings)
        coordinates[index, :atoms], numbers[index, :atoms] = base.decode(x, mask)
    return coordinates, numbers


def _drawn(molecules: Molecules, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Molecules of the training split, with replacement."""
    train = molecules.of_split("train").as_molecules()
    chosen = torch.randint(len(train), (count,), generator=generator)
    return build.padded([train[i] for i in chosen.tolist()])
