"""What is checked as a run begins, before any job. Torch is imported as the check is made, and not before."""

from __future__ import annotations

from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.plan import experiment_file


def check_experiment(experiment: Experiment) -> None:
    """Refuse functionals that no job of an experiment could use.

    Raises:
        ConfigError: naming the file, the experiment, the key and the fix.
    """
    if not isinstance(experiment, FunctionalExperiment):
        return
    from flowtilt.domains.planar.problems import check_problems

    try:
        check_problems(experiment)
    except ConfigError as error:
        raise ConfigError(f"{experiment_file(experiment.name.split('/')[0])}: {error}") from None
