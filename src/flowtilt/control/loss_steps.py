"""Which time steps of a trajectory are in the loss of Adjoint Matching: parts of the grid, and draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-9
"""Times that differ by less are the same."""


class Part(NamedTuple):
    """Neighbouring steps of the grid, of which as many are drawn for each update.

    Attributes:
        start: number of the first.
        stop: number after the last.
        drawn: how many, without repetition; None for all of them, in order.
    """

    start: int
    stop: int
    drawn: int | None

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def taken(self) -> int:
        """How many of an update are of this part."""
        return self.size if self.drawn is None else self.drawn


Parts = tuple[Part, ...]


def first_step(times: Sequence[float], adjoint_from: float) -> int:
    """Number of the first step that starts at a time or later; ``times`` has an end more than steps."""
    return sum(t < adjoint_from - ROUNDING for t in times[:-1])


def parts_by_shares(first: int, steps: int, last_share: float, rest_share: float) -> Parts:
    """A random share of the steps from ``first`` on, and then all of the last share, one at least."""
    last = max(1, round(last_share * (steps - first)))
    rest = steps - first - last
    return Part(first, steps - last, round(rest_share * rest)), Part(steps - last, steps, None)


def parts_by_counts(first: int, steps: int, counts: Sequence[tuple[float, int]]) -> Parts:
    """Parts of the steps from ``first`` on, each with how many are drawn.

    Args:
        counts: where each part ends, as a share of these steps, and its number.

    Raises:
        ValueError: if the ends do not grow up to 1, a part has fewer steps than its number, or none is drawn.
    """
    ends = [end for end, _ in counts]
    if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
        raise ValueError(f"the ends in loss_steps must grow from above 0 to 1, got {ends}")
    if not any(count for _, count in counts):
        raise ValueError("loss_steps draws no step at all; raise one of its numbers")
    parts, start = [], first
    for end, count in counts:
        part = Part(start, first + round(end * (steps - first)), count)
        if not 0 <= count <= part.size:
            raise ValueError(
                f"loss_steps draws {count} of the {part.size} steps up to the share {end:g}; lower the "
                "number, or raise steps"
            )
        parts.append(part)
        start = part.stop
    return tuple(parts)


def draw_steps(parts: Parts, generator: torch.Generator) -> Tensor:
    """Numbers of an update's steps, part by part, long (chosen,)."""
    drawn = [
        torch.arange(part.start, part.stop)
        if part.drawn is None
        else part.start + torch.randperm(part.size, generator=generator)[: part.drawn]
        for part in parts
    ]
    return torch.cat(drawn)


def path_kl(per_step: Tensor, parts: Parts, steps: int) -> float:
    """Path-space KL divergence ``E 1/2 int |u|^2 dt`` from mean squared controls at an update's steps.

    Those drawn of a part stand for all of it; steps that no part draws from are left out.

    Args:
        per_step: in the order of :func:`draw_steps`, (chosen,).
        steps: of the whole grid.
    """
    total, end = torch.zeros((), dtype=per_step.dtype), len(per_step)
    for part in reversed(parts):
        own = per_step[end - part.taken : end]
        end -= part.taken
        if part.taken:
            total = total + (own.sum() if part.drawn is None else own.mean() * part.size)
    return float(0.5 * total / steps)


def shares_in_loss(parts: Parts, steps: int) -> list[float]:
    """How often each step of the grid is in the loss, a share of the updates, (steps,)."""
    shares = [0.0] * steps
    for part in parts:
        for k in range(part.start, part.stop):
            shares[k] = part.taken / part.size
    return shares
