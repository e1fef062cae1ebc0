"""The file of a gridded density."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowtilt.domains.planar.rows import GriddedDensity
from flowtilt.pipeline.files import read_arrays, write_arrays


def write_density(density: GriddedDensity, path: Path) -> None:
    """Write the gridded log-density that divergences are measured from."""
    nowhere = np.zeros(density.log_density.shape, dtype=bool)
    floored = nowhere if density.floored is None else density.floored
    write_arrays(path, axis=density.axis, log_density=density.log_density, floored=floored)


def read_density(path: Path) -> GriddedDensity:
    """The gridded log-density of a pretrained model from a file of :func:`write_density`."""
    return GriddedDensity(*read_arrays(path, "axis", "log_density", "floored"))
