"""What is said under a table of the discretisation of its experiments' solver.

Torch is imported when a note is made, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowtilt.experiment import AnyExperiment
from flowtilt.image_experiment import ImageExperiment
from flowtilt.molecule_experiment import MoleculeExperiment

if TYPE_CHECKING:
    from flowtilt.interpolants import Interpolant


def discretisation_note(experiments: Sequence[AnyExperiment]) -> str:
    """A sentence on what Adjoint Matching's time steps leave of a tilt in closed form; see
    :func:`flowtilt.control.discretisation.discretisation_bias`.

    Args:
        experiments: of one table; each at its own path, time grid and solver settings.

    Returns:
        Nothing if none of their methods is solved by Adjoint Matching.
    """
    from flowtilt.control.discretisation import Weight, discretisation_bias
    from flowtilt.stages.solvers import adjoint_matching_settings

    places: dict[Weight, list[str]] = {}
    counts = set()
    for experiment in experiments:
        for method, config in experiment.methods.items():
            if config.kind == "pretrained" or config.kind == "data":
                continue
            solver = experiment.solver_of(method)
            if solver.kind != "adjoint_matching":
                continue
            settings = adjoint_matching_settings(solver, solver.updates)
            path, times, data_variance = _process(experiment, solver.steps)
            weight = discretisation_bias(path, times, data_variance, settings)
            place = f"{experiment.name} {method}" if len(experiments) > 1 else method
            places.setdefault(weight, []).append(place)
            counts.add(solver.steps)
    if not places:
        return ""
    found = [
        f"{weight.reached:.3f}" + (f" ({', '.join(names)})" if len(places) > 1 else "")
        for weight, names in places.items()
    ]
    return (
        "Discretisation: a linear tilt that takes one of two Gaussian modes from half of the mass to "
        f"{next(iter(places)).exact:.3f} is solved by Adjoint Matching to {'; '.join(found)}, at the path, "
        f"the {' or '.join(map(str, sorted(counts)))} time steps and the target of these runs: computed for "
        "a model that holds the optimum, without sampling or training."
    )


def _process(experiment: AnyExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...], float]:
    """The path of an experiment's solver, its times, and the data variance of its steps."""
    from flowtilt.domains.molecules.model import MoleculeFlow
    from flowtilt.domains.planar.build import build_path
    from flowtilt.domains.planar.model import PlanarFlow
    from flowtilt.interpolants import Linear, time_grid

    if isinstance(experiment, ImageExperiment):
        return *_image_process(experiment, steps), 0.0
    if isinstance(experiment, MoleculeExperiment):  # that of the coordinates
        return Linear(), tuple(time_grid(steps, experiment.time_power)), MoleculeFlow.data_variance
    return build_path(experiment.path), tuple(time_grid(steps)), PlanarFlow.data_variance


def _image_process(experiment: ImageExperiment, steps: int) -> tuple[Interpolant, tuple[float, ...]]:
    """On Stable Diffusion's noise schedule, which the embedded models have as well, with the changes made."""
    from flowtilt.domains.images.schedule import stable_diffusion

    asked = experiment.schedule
    path = stable_diffusion(asked.betas, asked.zero_terminal_snr)
    return path, tuple(path.grid(steps, asked.spacing, offset=1))
