"""First variations of functionals of a law with noise: what is left of a law at a time of its path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowtilt.devices import seeded
from flowtilt.model import Context, FlowModel

NO_SMOOTHED_VALUE = "of a law with noise there are gradients alone, by scores; its density is not computed"


def smoothed(
    gradient: Callable[[Tensor, Tensor, Context], Tensor],
    model: FlowModel,
    x: Tensor,
    t: Tensor,
    context: Context,
    pairs: int,
) -> Tensor:
    """Gradient at the data of a functional's first variation on the law ``p_t`` of a path.

    With ``x_t = alpha x + beta n``, a functional of ``p_t`` is one of the data's law, whose first variation
    at ``x`` is ``E_n g(alpha x + beta n)`` with ``g`` the one at ``p_t``: its gradient is ``alpha E_n`` of
    that of ``g``. The noise comes in pairs ``n, -n``, which are exact where ``g`` is quadratic, and follows
    from the samples themselves, so that a sample has the same in any batch.

    Args:
        gradient: of ``g`` at states, a time and a context.
        model: whose path and noise.
        x: data, (batch, ...).
        t: the time, ().
        context: of the data.
        pairs: of noise a sample, at least 1.

    Returns:
        Of the shape of ``x``.
    """
    alpha, beta = model.path.alpha(t), model.path.beta(t)
    noise = [_noise_of(model, x, i, pairs, context) for i in range(len(x))]
    total = torch.zeros_like(x)
    for pair in range(pairs):
        shift = beta * torch.cat([own[pair] for own in noise])
        total += gradient(alpha * x + shift, t, context) + gradient(alpha * x - shift, t, context)
    return alpha * total / (2 * pairs)


def _noise_of(model: FlowModel, x: Tensor, i: int, pairs: int, context: Context) -> list[Tensor]:
    """Noise of sample ``i``, from a seed that its own numbers give, each (1, ...)."""
    seed = int(x[i].double().sum().view(torch.int64)) & (2**63 - 1)
    generator = seeded(seed)
    own = model.select_context(context, torch.tensor([i], device=x.device))
    return [model.noise_like(x[i : i + 1], generator, own) for _ in range(pairs)]
