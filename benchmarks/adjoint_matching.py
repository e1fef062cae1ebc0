"""How much of an Adjoint Matching update is spent in network passes that the algorithm needs.

An update of batch B and N time steps needs N forward passes to sample, N forward and N - 1 backward
passes (to the input) for the lean adjoint, and one batched forward and backward pass (to the
parameters) over the time steps of the loss. The same passes are timed alone, in turn with whole
updates, and the ratio is reported: it holds on a noisy machine, seconds do not.

Run:  python benchmarks/adjoint_matching.py [--widths 512 512 256] [--batch 256] [--steps 40]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.domains.planar.landscapes import Stripes
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.interpolants import VariancePreserving


def needed_passes(model: PlanarFlow, batch: int, steps: int, chosen: int) -> None:
    """The network passes of one update, and nothing else."""
    x, t = torch.randn(batch, 2), torch.tensor(0.5)
    with torch.no_grad():
        for _ in range(steps):
            model.predict(x, t)
    model.requires_grad_(False)
    for k in range(steps):
        state = x.detach().requires_grad_(True)
        out = model.predict(state, t)
        if k < steps - 1:
            torch.autograd.grad(out, state, x)
    model.requires_grad_(True)
    states: Tensor = torch.randn(chosen * batch, 2)
    model.predict(states, torch.rand(chosen * batch)).square().sum().backward()
    model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 512, 256])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--updates", type=int, default=4, help="updates in each timed solve")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = AdjointMatchingSettings(
        updates=arguments.updates, batch=arguments.batch, pool=arguments.batch, steps=arguments.steps
    )
    last = round(settings.last_share * settings.steps)
    chosen = last + round(settings.rest_share * (settings.steps - last))
    model = PlanarFlow(VariancePreserving(), arguments.widths, "relu").requires_grad_(True)
    tilt = RewardVariation(Stripes(80, 90, 20, 290, -1.0, 1.42, 0.3, 0.05, 0.65, 0.325, sign=-1))

    def updates() -> None:
        solve(model, tilt, 2.0, settings, torch.Generator().manual_seed(0))

    def passes() -> None:
        for _ in range(arguments.updates):
            needed_passes(model, arguments.batch, arguments.steps, chosen)

    updates(), passes()  # warm up
    ratios, whole, alone = [], [], []
    for _ in range(arguments.rounds):
        whole.append(seconds(updates) / arguments.updates)
        alone.append(seconds(passes) / arguments.updates)
        ratios.append(alone[-1] / whole[-1])
    print(
        f"network {arguments.widths}, batch {arguments.batch}, {arguments.steps} steps, {chosen} in the loss"
    )
    print(f"update        {1e3 * statistics.median(whole):8.1f} ms (median of {arguments.rounds})")
    print(f"needed passes {1e3 * statistics.median(alone):8.1f} ms")
    print(f"share         {statistics.median(ratios):8.2f}    (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
