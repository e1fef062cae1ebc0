"""What is shown of experiments on molecules: metrics, what holds of what should, and masses of the tail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from flowtilt.domains.molecules.experiment import MoleculeExperiment, tail_metric
from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.base import as_named as reported
from flowtilt.pipeline.report.claims import more_than
from flowtilt.pipeline.report.measurements import (
    Method,
    Runs,
    by_row,
    collect,
    mean_sd,
    read_history,
    run_folder,
    runs_of,
    totals_of,
)
from flowtilt.pipeline.report.panels import Panel, describe, over_seeds, pretty
from flowtilt.pipeline.report.tables import experiment_table
from flowtilt.pipeline.sections import TUNED

__all__ = ["draw", "reported", "table"]

NOTE = (
    "Energies are GFN1-xTB total energies at the generated geometries, in hartree; a molecule without an "
    "energy is left out of means and tails, and counted. The row data is of draws of the training data. "
    "Models of one seed start from the same noise. Valid: bonds perceived from the geometry, one fragment, "
    "neutral, no radicals, sanitised by RDKit. Relaxation energy: what a geometry loses by optimisation."
)


def table(shown: Shown) -> Table:
    """The table of an experiment, with what holds of what should, or of a study of the mass of the tail."""
    if shown.study is not None:
        lines = masses(shown.results, shown.experiments)
        frame = pd.DataFrame(lines, columns=list(MassLine._fields))
        return Table(frame, [masses_panel(lines, shown.title)], MASSES_NOTE)
    experiment = shown.experiments[0]
    said = partial(findings, experiment=experiment, values=shown.reported)
    return experiment_table(shown, partial(groups, experiment), said, NOTE)


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment, or of a study of the mass of the tail."""
    from flowtilt.domains.molecules import figures

    figures.draw(shown, prefix)


def groups(experiment: MoleculeExperiment, caption: str) -> dict[str, list[str]]:
    """The metrics of each table of an experiment, by the table's caption."""
    masses = sorted({experiment.mass_of(m) for m, c in experiment.methods.items() if c.kind == "tfft"})
    main, mean = experiment.main_metric, experiment.mean_metric
    tails = dict.fromkeys([main, mean, *(tail_metric(mass) for mass in masses), "validity_pct"])
    return {
        caption: list(tails),
        "Molecules": [
            *(f"valid_{metric}" for metric in (main, mean)),
            *("uniqueness_pct", "uniqueness_of_1000_pct", "novelty_pct", "converged_pct"),
            "relaxation_energy_mean",
            *("relaxation_energy_median", "energy_per_atom", "heavy_atoms", "atomic_number"),
            *("elements_total_variation", "sizes_total_variation"),
        ],
        "Energies in fine-tuning": ["training_energies", "training_failed_share"],
    }


def findings(long: pd.DataFrame, experiment: MoleculeExperiment, values: pd.DataFrame) -> list[str]:
    """Sentences on what the methods should do, by differences of paired seeds, and on reported means. FDC and
    TFFT are compared with am by the same solver."""
    kinds = {name: config.kind for name, config in experiment.methods.items()}
    pretrained, data = (
        next((n for n, k in kinds.items() if k == kind), None) for kind in ("pretrained", "data")
    )
    mean, main = experiment.mean_metric, experiment.main_metric
    asked: list[tuple[str, str, str]] = []
    for method, kind in kinds.items():
        if kind not in TUNED:
            continue
        own = main if kind == "fdc" else mean if kind == "am" else tail_metric(experiment.mass_of(method))
        am = _am_beside(experiment, method)
        others = [pretrained, None if kind == "am" else am]
        asked += [(method, other, own) for other in others if other is not None]
    said = [more_than(long, *comparison) for comparison in asked]
    if data is not None:
        said += _cannot_be(long, experiment, data, values)
    return said


def _am_beside(experiment: MoleculeExperiment, method: str) -> str | None:
    """The am that is solved as another method is."""

    def way(name: str) -> tuple[str, str]:
        solver = experiment.solver_of(name)
        return solver.kind, solver.adjoint

    kinds = ((name, config.kind) for name, config in experiment.methods.items())
    return next((name for name, kind in kinds if kind == "am" and way(name) == way(method)), None)


FAR = 5.0
"""Hartree between a reported mean of a pretrained model and the data's, from which a sentence says so."""


def _cannot_be(
    long: pd.DataFrame, experiment: MoleculeExperiment, data: str, values: pd.DataFrame
) -> list[str]:
    """Reported means of the pretrained model that are far from the data's."""
    metric = experiment.mean_metric
    own = float(np.mean([v for (_, row, _), v in by_row(long, metric).items() if row == data]))
    theirs = values[(values["experiment"] == experiment.name) & (values["method"] == "pretrained")]
    theirs = theirs[theirs["metric"] == metric]
    return [
        f"{source} reports a {describe(metric).words} of {value:g} hartree for the pretrained model, where "
        f"the data have {own:.1f}: a disagreement of definitions that is not resolved, and not tuned towards."
        for source, value in zip(theirs["source"], theirs["value"], strict=True)
        if abs(value - own) > FAR
    ]


class MassLine(NamedTuple):
    """One mass of the tail in one case, means over seeds; the case ``reference`` is beside every mass.

    ``tail_mean`` is of the best share ``mass``, ``gain`` what it has over the pretrained model on the same
    seeds, ``best`` of the best share of the objective's own mass, and ``mean`` of all molecules with an
    energy: all in hartree. ``validity`` is in percent, ``active`` the mean share of active samples in the
    pool, ``inactive`` that of updates without any. Seconds, network passes (counted and not timed, see
    ``flowtilt.control.base``) and energies are those of the training.
    """

    case: str
    method: str
    mass: float
    tail_mean: float
    tail_mean_sd: float
    gain: float
    best: float
    mean: float
    validity: float
    active: float
    inactive: float
    seconds: float
    passes: float
    energies: float
    seeds: int


REFERENCES = ("pretrained", "am")
"""Methods of the experiment that cases derive from which every mass is compared with."""


def parent_runs(case: MoleculeExperiment, methods: Mapping[str, str]) -> Runs:
    """Runs of the experiment that a case derives from: its methods by name, and their kinds."""
    chosen = tuple(Method(name, kind) for name, kind in methods.items())
    return replace(runs_of(case), name=case.starts_from, methods=chosen)


def masses(results: str | Path, cases: Sequence[MoleculeExperiment]) -> list[MassLine]:
    """A line for each mass and case, and for the pretrained model and am at every mass. Raises ResultsError
    if a run is missing or malformed."""
    parent = parent_runs(cases[0], {name: name for name in REFERENCES})
    frame = collect(results, parent)
    known = sorted({case.mass_of(m) for case in cases for m in (*case.also, *case.methods)})
    lines = []
    for mass in known:
        for method in REFERENCES:
            lines.append(_line(results, frame, frame, cases[0], parent, "reference", method, mass))
    for case in cases:
        label = case.name.partition("/")[2]
        shared = parent_runs(case, {name: method.kind for name, method in case.also.items()})
        for runs in (runs_of(case), shared) if case.also else (runs_of(case),):
            own = collect(results, runs)
            lines += [
                _line(results, own, frame, case, runs, label, method.name, case.mass_of(method.name))
                for method in runs.methods
            ]
    return sorted(lines, key=lambda line: -line.mass)


def _line(
    results: str | Path,
    frame: pd.DataFrame,
    reference: pd.DataFrame,
    case: MoleculeExperiment,
    runs: Runs,
    label: str,
    method: str,
    mass: float,
) -> MassLine:
    def values(metric: str, of: pd.DataFrame = frame, row: str = method) -> np.ndarray:
        found = by_row(of, metric)
        return np.array([v for (_, r, s), v in sorted(found.items()) if r == row and s in runs.seeds])

    def mean(metric: str) -> float:
        found = values(metric)
        return float(found.mean()) if found.size else math.nan

    counted = {"seconds": math.nan, "network_passes": math.nan}  # as of the pretrained model
    if any(one.name == method and one.kind in TUNED for one in runs.methods):
        files = (run_folder(results, runs, method, "network", seed) / "history.csv" for seed in runs.seeds)
        totals = [totals_of(read_history(file, [*counted]), *counted) for file in files]
        counted = {column: float(np.mean([float(total[column]) for total in totals])) for column in counted}
    tail = values(tail_metric(mass))
    gain = tail - values(tail_metric(mass), reference, "pretrained")
    return MassLine(
        case=label,
        method=method,
        mass=mass,
        tail_mean=float(tail.mean()),
        tail_mean_sd=mean_sd(tail)[1],
        gain=float(gain.mean()),
        best=mean(case.main_metric),
        mean=mean(case.mean_metric),
        validity=mean("validity_pct"),
        active=mean("active_share"),
        inactive=mean("inactive_updates"),
        seconds=counted["seconds"],
        passes=counted["network_passes"],
        energies=mean("training_energies"),
        seeds=len(runs.seeds),
    )


def masses_panel(lines: Sequence[MassLine], title: str) -> Panel:
    """The masses as text: one line a mass and case."""
    header = ["mass", "case", "mean of its tail (hartree)", "over pretrained", "top-0.2 % mean", "mean"]
    header += ["valid (%)", "active samples", "updates without", "training (s)"]
    header += ["thousand network passes", "energies"]
    cells = [
        [
            f"{line.mass:g}",
            line.case if line.case != "reference" else line.method,
            pretty(line.tail_mean, line.tail_mean_sd),
            _cell(line.gain) if line.method != "pretrained" else "",
            *map(_cell, (line.best, line.mean, line.validity, line.active, line.inactive, line.seconds)),
            *(f"{v:.0f}" if math.isfinite(v) else "" for v in (line.passes / 1000, line.energies)),
        ]
        for line in lines
    ]
    return Panel(f"{title}: {over_seeds(max(line.seeds for line in lines))}", header, cells)


def _cell(value: float) -> str:
    return pretty(value) if math.isfinite(value) else ""


MASSES_NOTE = (
    "Cases: plain trains on all that it samples, and so does rising, with a tail that narrows from 0.5; pool "
    "and large_pool sample more trajectories than they train on, draw from tail and body apart, and "
    "reweight, which leaves the estimator unbiased; fitted is weighted fitting. Pretrained and am, by "
    "Adjoint Matching, are the same runs at every mass. Active samples: the share of sampled molecules "
    "above the threshold, over all updates, and for weighted fitting that under the tilted distribution; a "
    "line without any has not tested the method. Training is without threshold and offline batch: seconds on "
    "a machine that may have had other work; states that went through the network, a backward pass to the "
    "input counted as one and to the parameters as two, which are counted and not timed; and energies beside "
    "them."
)
