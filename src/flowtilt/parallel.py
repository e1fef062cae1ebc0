"""Processes that share one fine-tuning, one GPU each, by accelerate.

All processes draw the same random numbers, and each simulates its share of the trajectories: so the result is
that of one process, up to the order of sums. Code that shares work asks :func:`processes` for what to do; a
process that is alone does all of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flowtilt.environment import count


class Processes:
    """One process that is alone; :class:`Together` has others.

    Attributes:
        index: number of this process, from 0.
    """

    index = 0
    count = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` things: contiguous, and as large as others' but for one."""
        return slice(self.index * count // self.count, (self.index + 1) * count // self.count)

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes of a tensor that has one shape in all."""
        return value

    def wait(self) -> None:
        """Return when all processes have come here."""

    def gather(self, own: Tensor, positions: Tensor, count: int) -> Tensor:
        """What all processes have at their positions among ``count``, (count, ...).

        Args:
            own: this process's, (own, ...).
            positions: of these, long, (own,).
            count: of all.
        """
        if self.count == 1:
            return own
        whole = torch.zeros(count, *own.shape[1:], dtype=torch.float64, device=own.device)
        whole[positions] = own.to(whole.dtype)
        return self.total(whole).to(own.dtype)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give each parameter the sum of the processes' gradients, zero where a process has none."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.total(parameter.grad)


class Together(Processes):
    """This process among those that one command started, by accelerate.

    Raises:
        ImportError: if accelerate is not installed.
    """

    def __init__(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError:
            raise ImportError(
                "several processes for one fine-tuning need accelerate: pip install 'flowtilt[parallel]'"
            ) from None
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.index, self.count = self._state.process_index, self._state.num_processes

    def total(self, value: Tensor) -> Tensor:
        from accelerate.utils import reduce

        return reduce(value.clone(), "sum")

    def wait(self) -> None:
        self._state.wait_for_everyone()

    def leave(self) -> None:
        """Part from the others, when all have come here: a process that just ends can abort the rest."""
        self.wait()
        self._state.destroy_process_group()


ALONE = Processes()
_current = ALONE


def processes() -> Processes:
    """The processes that share the work of this one."""
    return _current


def join_processes() -> Processes:
    """Join the processes that were started together with this one, as ``torchrun`` does, if there are any."""
    global _current
    if count("WORLD_SIZE") > 1 and _current.count == 1:
        _current = Together()
    return _current


def leave_processes() -> None:
    """Part from the processes that were joined, if there are any, when all have done their work."""
    global _current
    if isinstance(_current, Together):
        _current.leave()
    _current = ALONE
