"""Adjoints of molecules: what controls they ask for, and what they cost.

On trajectories of the shipped flow, at the experiment's KL weight: the squares of the controls that lean
adjoints and those by the posterior mean ask for, as path-space divergences, with the gradient of the energy
on coordinates alone and with that of the separated atoms on types. The mean over trajectories says how noisy
a regression on them is, and the median what most of them say. The exact tilt's divergence, from the energies
of the same molecules, is what the mean of a control without noise would spend.

Run:  python benchmarks/molecule_adjoints.py [--trajectories 192]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from flowtilt.control.adjoint_matching import lean_adjoint, loss_scale, posterior_mean_adjoint
from flowtilt.control.endpoints import Terminal
from flowtilt.devices import seeded
from flowtilt.domains.molecules import build
from flowtilt.domains.molecules.energies import XTBReward
from flowtilt.domains.molecules.sampling import load_base
from flowtilt.domains.molecules.xtb import XTBSettings
from flowtilt.pipeline.experiment import load_file
from flowtilt.sampling import memoryless_steps, sample_sde

FILE = Path(__file__).parents[1] / "config" / "experiments" / "molecules_qm9.yaml"


def divergences(adjoints: Tensor, noise: Tensor) -> Tensor:
    """Half the mean square over the steps of the controls ``noise a``, in nats, (batch,)."""
    controls = noise.to(adjoints).view(-1, 1) * adjoints.flatten(2).norm(dim=2)
    return 0.5 * controls.square().mean(0)


def exact_divergence(rewards: Tensor, alpha: float) -> float:
    """KL divergence of the distribution tilted by ``exp(reward / alpha)`` on equal samples, in nats."""
    weights = torch.softmax(rewards[~rewards.isnan()].double() / alpha, 0)
    return float((weights * (weights * len(weights)).log()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=192)
    count = parser.parse_known_args()[0].trajectories
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    (experiment,) = load_file(FILE).values()
    base = load_base(experiment, FILE.parents[2] / experiment.checkpoint.path)
    flow, alpha, steps = base.flow.requires_grad_(False), experiment.objective.alpha, experiment.solver.steps
    separated = build.separated_atoms(base.types)
    generator = seeded(1)
    context = flow.draw_context(count, generator)
    trajectories = sample_sde(flow, count, steps, generator, context)
    coefficients, noise = memoryless_steps(flow, steps), loss_scale(flow, memoryless_steps(flow, steps)).noise
    print(f"adjoints of {count} molecules at {alpha:g} hartree a nat; nats, mean and median")
    every = torch.arange(steps)
    reward = XTBReward(base.decode, XTBSettings(**experiment.reward.calculation))
    print(f"  exact tilt{exact_divergence(reward(trajectories[-1], context), alpha):30.3f}")
    for name, given in (("coordinates", None), ("and types", separated)):
        reward.separated = given
        end = -reward.gradient(trajectories[-1], context) / alpha
        ways = {
            "lean": lambda e=end: lean_adjoint(flow, trajectories, Terminal(e), coefficients, context)[0],
            "posterior mean": lambda e=end: posterior_mean_adjoint(
                flow, trajectories, e, steps, every, context
            ),
        }
        for way, solve in ways.items():
            started = time.perf_counter()
            found = divergences(solve(), noise)
            took = time.perf_counter() - started
            values = f"{float(found.mean()):12.3f}{statistics.median(found.tolist()):12.4f}"
            print(f"  {name:12s}{way:16s}{values}   {1e3 * took / count:6.1f} ms a molecule, at all steps")


if __name__ == "__main__":
    main()
