"""Experiments small enough to run whole in a unit test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowtilt.pipeline.configuration import merge
from flowtilt.pipeline.experiment import Experiment, load_file

CONFIG = Path(__file__).parents[1] / "config"
TINY: dict[str, Any] = {
    "seeds": 1,
    "network": {"widths": [16, 16]},
    "pretrain": {"updates": 20, "batch": 64},
    "offline": {"samples": 500},
    "solver": {"updates": 4, "batch": 16, "pool": 32, "steps": 8},
    "evaluation": {"samples": 300, "density_samples": 50, "ode_steps": 5},
    "grid": {"cells": 96, "density_cells": 16},
}


def in_plane(**changes: Any) -> dict[str, Any]:
    """Overrides that change keys of every experiment in the plane."""
    return {"planar": changes}


def tiny(name: str = "risk_averse_2d", **changes: Any) -> Experiment:
    """A shipped experiment at a size of seconds, with some keys changed."""
    (experiment,) = load_file(
        CONFIG / "experiments" / f"{name}.yaml", in_plane(**merge(TINY, changes))
    ).values()
    return experiment
