"""What processes that torchrun starts together do in the tests; alone it is what one process does.

python shared_work.py FOLDER: writes weights and history of each solve, from the leading process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from closed_forms import PATHS, Mixture, MixtureFlow, generator
from flowtilt.checkpoints import save_weights
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.control.base import Solution
from flowtilt.control.weighted_fitting import WeightedFittingSettings
from flowtilt.control.weighted_fitting import solve as fit
from flowtilt.fdc import Ascent, MirrorAscent, ascend
from flowtilt.functionals.base import Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import SQ, Hinge, RewardVariation
from flowtilt.parallel import join_processes, leave_processes, processes
from flowtilt.resuming import Resumption
from flowtilt.rewards import Reward

DISTRIBUTION = Mixture.of(
    [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.3]]]
)


class Rising(Reward):
    """Rises with the first coordinate, and levels off."""

    def value(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
        return torch.tanh(x[:, 0])


SOLVES = ("reward", "hinge", "scarce", "buffer", "ascent", "fitting")

# A pool of odd size, shared unequally; most of the hinge's batch is often on one side of the pool.
SETTINGS = AdjointMatchingSettings(updates=6, batch=7, pool=15, steps=6, learning_rate=0.01, control_clip=0.5)
# A batch that leaves one of the processes without any trajectory in some updates.
SCARCE = AdjointMatchingSettings(updates=12, batch=2, pool=3, steps=4, learning_rate=0.01)

# Mini-batches of a buffer, with noise at the ends that all processes draw alike.
BUFFER = AdjointMatchingSettings(
    updates=8,
    batch=2,
    pool=15,
    buffer=8,
    active_batch=1,
    passes=2,
    steps=6,
    learning_rate=0.01,
    loss_steps=((0.6, 2), (1.0, 2)),
    endpoint_perturbations=3,
    endpoint_deviation=0.1,
    endpoint_percentile=60.0,
)


def run(name: str, folder: Path) -> Solution | Ascent:
    flow, reward = MixtureFlow(PATHS["linear"], DISTRIBUTION, trainable=True), Rising()
    hinge = Hinge(reward, 0.7, 0.2, "upper")
    slot = Resumption(folder / "state", "work", seconds=0).slot("solve")
    if name == "reward":
        return solve(flow, RewardVariation(reward), 0.3, SETTINGS, generator(1), slot=slot)
    if name == "hinge":
        return solve(flow, hinge, 0.3, SETTINGS, generator(2), slot=slot)
    if name == "scarce":
        return solve(flow, hinge, 0.3, SCARCE, generator(3), slot=slot)
    if name == "buffer":
        return solve(flow, hinge, 0.3, BUFFER, generator(5), slot=slot)
    if name == "fitting":
        fitting = WeightedFittingSettings(bank=300, steps=4, updates=6, batch=8, warning_ess=0)
        return fit(flow, RewardVariation(reward), 0.5, fitting, generator(4))
    objective = Objective(SQ(reward, 0.2), KL(flow, score_time=0.8), 0.3)

    def solver(base, tilt, kl_weight, random, slot=None):  # type: ignore[no-untyped-def]
        return solve(base, tilt, kl_weight, SETTINGS, random, slot=slot)

    resumption = Resumption(folder / "state", "work", seconds=0)
    mirror = MirrorAscent(
        step_weight=1.0, distribution_samples=2049 + 30, distribution_steps=4
    )  # more than one chunk
    return ascend(flow, objective, range(2), mirror, solver, generator, resumption)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_processes()
    for name in SOLVES:
        folder = Path(sys.argv[1], name)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(name, folder)
        if processes().leads:
            save_weights(found.model, folder / "weights.safetensors")
            text = json.dumps({"processes": processes().count, "history": found.history})
            (folder / "history.json").write_text(text)
    leave_processes()
