"""The denoiser in two memory layouts: time an image, with channels last and in torch's default order.

Both layouts are timed in turns and the fastest round of each counts, since other work only slows.

Run:  python benchmarks/images.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

MODEL = Path(__file__).parents[1] / "resources" / "images" / "bridges" / "unet"
BATCHES = (8, 16, 64)
ROUNDS = 7


def passes(denoiser: nn.Module, batch: int, pullback: bool) -> Callable[[], None]:
    """One pass of a batch at random latents, with the gradient at them if asked for."""
    config = denoiser.config
    size, channels = config.sample_size, config.in_channels
    x = torch.randn(batch, channels, size, size, requires_grad=pullback)
    prompt = torch.randn(batch, 28, config.cross_attention_dim)

    def run() -> None:
        with torch.set_grad_enabled(pullback):
            predicted = denoiser(x, torch.tensor(500), prompt).sample
        if pullback:
            torch.autograd.grad(predicted.sum(), x)

    return run


def fastest(runs: list[Callable[[], None]]) -> list[float]:
    """Seconds of each, the least of some rounds in turns after one that warms up."""
    best = [float("inf")] * len(runs)
    for round_ in range(ROUNDS + 1):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if round_:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def main() -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    layouts = (torch.contiguous_format, torch.channels_last)
    models = [
        UNet2DConditionModel.from_pretrained(MODEL).to(memory_format=m).requires_grad_(False) for m in layouts
    ]
    print(f"{'images':>9}{'pass':>20}{'default (ms)':>14}{'channels last':>15}{'ratio':>7}")
    for batch in BATCHES:
        for pullback in (False, True):
            default, last = fastest([passes(model, batch, pullback) for model in models])
            name = "forward, backward" if pullback else "forward"
            times = f"{default / batch * 1e3:14.2f}{last / batch * 1e3:15.2f}"
            print(f"{batch:9}{name:>20}{times}{last / default:7.2f}")


if __name__ == "__main__":
    main()
