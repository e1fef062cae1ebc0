"""Kernels of a distance, for the maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Kernel = Callable[[Tensor], Tensor]
"""A kernel as a function of the Euclidean distance in units of the bandwidth."""

BLOCK = 1024


def gaussian(distance: Tensor) -> Tensor:
    """``exp(-r^2 / 2)``."""
    return torch.exp(-0.5 * distance**2)


def inverse_multiquadric(distance: Tensor) -> Tensor:
    """``(1 + r^2)^(-1/2)``: tails heavy enough to see far outliers."""
    return torch.rsqrt(1 + distance**2)


def energy(distance: Tensor) -> Tensor:
    """``-r``: positive definite on differences of distributions; its squared MMD is the energy distance."""
    return -distance


KERNELS: dict[str, Kernel] = {
    "gaussian": gaussian,
    "inverse_multiquadric": inverse_multiquadric,
    "energy": energy,
}


def kernel_by_name(name: str) -> Kernel:
    """A kernel by its name.

    Raises:
        ValueError: listing the known ones.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; known kernels: {', '.join(KERNELS)}")
    return KERNELS[name]


def kernel_matrix(kernel: Kernel, x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """The kernel between all pairs of ``x`` (n, ...) and ``y`` (m, ...), (n, m).

    Distances are computed from differences: their expansion into squares would lose the short ones.
    The derivative of a distance at 0 counts as 0.
    """
    a, b = x.flatten(1) / bandwidth, y.flatten(1) / bandwidth
    return kernel(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"))


def kernel_means(kernel: Kernel, x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Mean over ``y`` (m, ...) of the kernel from each of ``x`` (n, ...), (n,), block by block."""
    return torch.cat(list(_row_means(kernel, x, y, bandwidth)))


def _row_means(kernel: Kernel, x: Tensor, y: Tensor, bandwidth: float) -> Iterator[Tensor]:
    for rows in x.split(BLOCK):
        total = rows.new_zeros(len(rows))
        for columns in y.split(BLOCK):
            total = total + kernel_matrix(kernel, rows, columns, bandwidth).sum(1)
        yield total / len(y)
