"""Adam and AdamW with the learning rate given at each step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """Adam (Kingma and Ba 2015) by torch's own function, with its state in plain lists.

    With weight decay it is AdamW (Loshchilov and Hutter 2019): the decay is apart from the moments.

    The class ``torch.optim.Adam`` loads torch's compiler when it is made, which takes as much CPU time
    as fifty updates of a small network, once a job; the function behind it does not.

    Args:
        parameters: to optimise; those that do not require a gradient are left alone.
        moments: decay rates of the means of gradients and of their squares, each in [0, 1).
        weight_decay: share of a parameter, a unit of the learning rate, that an update takes off it.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        moments: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.moments, self.weight_decay = moments, weight_decay
        self.parameters = [p for p in parameters if p.requires_grad]
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.updates = [torch.zeros((), device="cpu") for _ in self.parameters]  # as torch has them

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the parameters' gradients; parameters without one stay as they are."""
        used = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if self.weight_decay:
            for i in used:
                self.parameters[i].mul_(1 - learning_rate * self.weight_decay)
        adam(
            [self.parameters[i] for i in used],
            [g for i in used if (g := self.parameters[i].grad) is not None],
            [self.means[i] for i in used],
            [self.squares[i] for i in used],
            [],
            [self.updates[i] for i in used],
            amsgrad=False,
            beta1=self.moments[0],
            beta2=self.moments[1],
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
