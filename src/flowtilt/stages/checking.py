"""What a workflow checks before any job starts. Torch is imported as the check is made, and not before."""

from __future__ import annotations

from flowtilt.experiment import FunctionalExperiment


def check_functional(experiment: FunctionalExperiment) -> None:
    """Refuse functionals that no job of an experiment could use.

    Raises:
        ConfigError: naming the experiment, the key and the fix.
    """
    from flowtilt.domains.planar.problems import check_problems

    check_problems(experiment)
