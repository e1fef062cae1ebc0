"""What is said under a table of the discretisation of its experiments' solver.

Torch is imported when a note is made, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowtilt.pipeline.domain import domain_of, imported
from flowtilt.pipeline.experiment import Experiment


def discretisation_note(experiments: Sequence[Experiment]) -> str:
    """A sentence on what Adjoint Matching's time steps leave of a tilt in closed form; see
    :func:`flowtilt.control.discretisation.discretisation_bias`.

    Returns:
        Nothing if none of their methods is solved by Adjoint Matching.
    """
    from flowtilt.control.discretisation import Weight, discretisation_bias
    from flowtilt.pipeline.solvers import adjoint_matching_settings

    places: dict[Weight, list[str]] = {}
    counts = set()
    for experiment in experiments:
        for method, config in experiment.methods.items():
            if not config.tuned:
                continue
            solver = experiment.solver_of(method)
            if solver.kind != "adjoint_matching":
                continue
            settings = adjoint_matching_settings(solver, solver.updates)
            path, times, variance = imported(domain_of(experiment).process)(experiment, solver.steps)
            weight = discretisation_bias(path, times, variance, settings)
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
