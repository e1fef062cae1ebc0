"""What is shown of experiments on molecules: tables and figures of an experiment, or of a study of masses."""

from __future__ import annotations

import pandas as pd

from flowtilt.domains.molecules import tables
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.report.base import Shown, Table


def table(shown: Shown) -> Table:
    """The table of an experiment, or of a study of the mass of the tail."""
    if shown.study is None:
        return tables.experiment_table(shown.results, shown.experiments[0], shown.reported)
    return tables.masses_table(shown.results, shown.title, shown.experiments)


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment, or of a study of the mass of the tail."""
    from flowtilt.domains.molecules import figures

    if shown.study is None:
        figures.draw_experiment(shown.results, shown.experiments[0], shown.reported, prefix)
    else:
        figures.draw_masses(shown.results, shown.title, shown.experiments, prefix)


def reported(values: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The papers name experiments on molecules as they are named here."""
    return values
