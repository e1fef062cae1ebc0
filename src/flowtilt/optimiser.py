"""Adam with the learning rate given at each step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """Adam (Kingma and Ba 2015) by torch's own function, with its state in plain lists.

    The class ``torch.optim.Adam`` loads torch's compiler when it is made, which takes as much CPU time
    as fifty updates of a small network, once a job; the function behind it does not.

    Args:
        parameters: to optimise; those that do not require a gradient are left alone.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
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
        adam(
            [self.parameters[i] for i in used],
            [g for i in used if (g := self.parameters[i].grad) is not None],
            [self.means[i] for i in used],
            [self.squares[i] for i in used],
            [],
            [self.updates[i] for i in used],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
