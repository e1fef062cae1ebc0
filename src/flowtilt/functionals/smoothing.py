"""First variations of functionals of a distribution with noise: of what is left of one along its path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowtilt.devices import seeded
from flowtilt.model import Context, FlowModel

NO_SMOOTHED_VALUE = (
    "of a distribution with noise there are gradients alone, by scores; its density is not computed"
)


def smoothed(
    gradient: Callable[[Tensor, Tensor, Context], Tensor],
    model: FlowModel,
    x: Tensor,
    t: Tensor,
    context: Context,
    pairs: int,
) -> Tensor:
    """Gradient at the data of a functional's first variation on the distribution ``p_t`` of a path.

    With ``x_t = alpha x + beta n``, a functional of ``p_t`` is one of the data's distribution, whose first
    variation at ``x`` is ``E_n g(alpha x + beta n)`` with ``g`` the one at ``p_t``: its gradient is ``alpha
    E_n`` of that of ``g``. The noise comes in pairs ``n, -n``, which are exact where ``g`` is quadratic, and
    follows from the samples themselves, so that a sample has the same in any batch.

    Args:
        gradient: of ``g`` at states, a time and a context.
        x: data, (batch, ...).
        t: the time, ().
        pairs: of noise a sample, at least 1.

    Returns:
        Of the shape of ``x``.
    """
    alpha, beta = model.path.alpha(t), model.path.beta(t)
    noise = torch.cat([torch.stack(_noise_of(model, x, i, pairs, context), 1) for i in range(len(x))])
    shift = beta * torch.cat([noise, -noise], 1)  # (batch, 2 pairs, ...)
    repeated = model.select_context(context, torch.arange(len(x)).repeat_interleave(2 * pairs))
    # In one call: a network takes many states together in less time than a few at a time.
    found = gradient((alpha * x.unsqueeze(1) + shift).flatten(0, 1), t, repeated)
    return alpha * found.view_as(shift).mean(1)


def _noise_of(model: FlowModel, x: Tensor, i: int, pairs: int, context: Context) -> list[Tensor]:
    """Noise of sample ``i``, from a seed that its own numbers give, each (1, ...)."""
    seed = int(x[i].double().sum().view(torch.int64)) & (2**63 - 1)
    generator = seeded(seed)
    own = model.select_context(context, torch.tensor([i], device=x.device))
    return [model.noise_like(x[i : i + 1], generator, own) for _ in range(pairs)]
