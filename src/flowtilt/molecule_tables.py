"""What the tables of molecules show: groups of metrics, what holds of what should, and levels of the tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from flowtilt.measurements import Method, Runs, by_row, collect, read_history, run_folder, runs_of
from flowtilt.molecule_experiment import MoleculeExperiment, tail_metric
from flowtilt.panels import Panel, describe, over_seeds, pretty

NOTE = (
    "Energies are GFN1-xTB total energies at the generated geometries, in hartree; a molecule without an "
    "energy is left out of means and tails, and counted. The row data is of draws of the training data. "
    "Models of one seed start from the same noise. Valid: bonds perceived from the geometry, one fragment, "
    "neutral, no radicals, sanitised by RDKit. Relaxation energy: what a geometry loses by optimisation."
)


def groups(experiment: MoleculeExperiment, caption: str) -> dict[str, list[str]]:
    """The metrics of each table of an experiment, by the table's caption."""
    levels = sorted(
        {experiment.level_of(m) for m, c in experiment.methods.items() if c.kind == "tfft"}, reverse=True
    )
    main, mean = experiment.main_metric, experiment.mean_metric
    tails = dict.fromkeys([main, mean, *(tail_metric(level) for level in levels), "validity_pct"])
    return {
        caption: list(tails),
        "Molecules": [
            *(f"valid_{metric}" for metric in (main, mean)),
            *("uniqueness_pct", "uniqueness_of_1000_pct", "novelty_pct", "converged_pct"),
            "relaxation_energy_mean",
            *("relaxation_energy_median", "energy_per_atom", "heavy_atoms", "atomic_number"),
            *("elements_total_variation", "sizes_total_variation"),
        ],
        "Fine-tuning": [
            *("threshold", "offline_active_share", "active_share", "active_share_final"),
            *("inactive_updates", "path_kl", "clipped_share", "effective_sample_size"),
            *("training_energies", "training_failed_share"),
        ],
    }


# ------------------------------------------------------------------------------- what holds


def findings(long: pd.DataFrame, experiment: MoleculeExperiment, reported: pd.DataFrame) -> list[str]:
    """Sentences on what the methods should do, by differences of paired seeds, and on reported means."""
    first = {kind: _first(experiment, kind) for kind in ("data", "pretrained", "am", "fdc")}
    pretrained, am, fdc = (first[kind] for kind in ("pretrained", "am", "fdc"))
    mean, main = experiment.mean_metric, experiment.main_metric
    asked = [(am, pretrained, mean), (fdc, pretrained, main), (fdc, am, main)]
    asked += [
        (method, am, tail_metric(experiment.level_of(method)))
        for method, config in experiment.methods.items()
        if config.kind == "tfft"
    ]
    said = [_ahead(long, a, b, metric) for a, b, metric in asked if a is not None and b is not None]
    if first["data"] is not None:
        said += _cannot_be(long, experiment, first["data"], reported)
    return said


def _first(experiment: MoleculeExperiment, kind: str) -> str | None:
    return next((name for name, config in experiment.methods.items() if config.kind == kind), None)


def _ahead(long: pd.DataFrame, method: str, other: str, metric: str) -> str:
    values = by_row(long, metric)
    seeds = sorted({seed for _, row, seed in values if row == method})
    own = {row: {seed: v for (_, r, seed), v in values.items() if r == row} for row in (method, other)}
    gains = np.array([own[method][seed] - own[other][seed] for seed in seeds])
    sd = float(gains.std(ddof=1)) if len(gains) > 1 else math.nan
    holds = int((gains > 0).sum())
    words = describe(metric).words
    verdict = "holds" if gains.mean() > 0 else "does not hold"
    return (
        f"{method} raises the {words} over {other}: {verdict}, by {pretty(float(gains.mean()), sd)} hartree "
        f"({holds} of {len(seeds)} seeds)."
    )


FAR = 5.0
"""Hartree between a reported mean of a pretrained model and the data's, from which a sentence says so."""


def _cannot_be(
    long: pd.DataFrame, experiment: MoleculeExperiment, data: str, reported: pd.DataFrame
) -> list[str]:
    """Reported means of the pretrained model that are far from the data's."""
    metric = experiment.mean_metric
    own = float(np.mean([v for (_, row, _), v in by_row(long, metric).items() if row == data]))
    theirs = reported[
        (reported["experiment"] == experiment.name)
        & (reported["metric"] == metric)
        & (reported["method"] == "pretrained")
    ]
    return [
        f"{source} reports a {describe(metric).words} of {value:g} hartree for the pretrained model, where "
        f"the data have {own:.1f}: a disagreement of definitions that is not resolved, and not tuned towards."
        for source, value in zip(theirs["source"], theirs["value"], strict=True)
        if abs(value - own) > FAR
    ]


# ------------------------------------------------------------------------- levels of the tail


class LevelLine(NamedTuple):
    """One level of the tail in one case, means over seeds.

    Attributes:
        case: label of the case; ``reference`` for methods of the experiment that the cases derive from.
        method: as in the paths of its runs.
        level: of the tail.
        tail: mean of the best share ``1 - level``, in hartree.
        tail_sd: over seeds.
        gain: of it over the pretrained model, on the same seeds.
        best: mean of the best share of the objective's own level.
        mean: of all molecules with an energy.
        validity: in percent.
        active: mean share of active samples in the pool.
        inactive: share of updates without any.
        seconds: of the training, by its history.
        energies: computed in training.
        seeds: how many.
    """

    case: str
    method: str
    level: float
    tail: float
    tail_sd: float
    gain: float
    best: float
    mean: float
    validity: float
    active: float
    inactive: float
    seconds: float
    energies: float
    seeds: int


def parent_runs(case: MoleculeExperiment) -> Runs:
    """The runs of the experiment that a case derives from which the case is compared with."""
    own = runs_of(case)
    methods = (Method("pretrained", "pretrained"), Method("am", "am"))
    return replace(own, name=case.base, methods=methods)


def levels(results: str | Path, cases: Sequence[MoleculeExperiment]) -> list[LevelLine]:
    """A line for each level and case, and for the pretrained model and am at every level.

    Raises:
        ResultsError: if a run is missing or malformed.
    """
    parent = parent_runs(cases[0])
    frame = collect(results, parent)
    known = sorted({case.level_of(m) for case in cases for m in case.methods})
    lines = []
    for level in known:
        for method in ("pretrained", "am"):
            lines.append(_line(results, frame, frame, cases[0], parent, "reference", method, level))
    for case in cases:
        runs = runs_of(case)
        own = collect(results, runs)
        label = case.name.partition("/")[2]
        lines += [
            _line(results, own, frame, case, runs, label, method, case.level_of(method))
            for method in case.methods
        ]
    return sorted(lines, key=lambda line: line.level)


def _line(
    results: str | Path,
    frame: pd.DataFrame,
    reference: pd.DataFrame,
    case: MoleculeExperiment,
    runs: Runs,
    label: str,
    method: str,
    level: float,
) -> LevelLine:
    def values(metric: str, of: pd.DataFrame = frame, row: str = method) -> np.ndarray:
        found = by_row(of, metric)
        return np.array([v for (_, r, s), v in sorted(found.items()) if r == row and s in runs.seeds])

    def mean(metric: str) -> float:
        found = values(metric)
        return float(found.mean()) if found.size else math.nan

    tail = values(tail_metric(level))
    gain = tail - values(tail_metric(level), reference, "pretrained")
    return LevelLine(
        case=label,
        method=method,
        level=level,
        tail=float(tail.mean()),
        tail_sd=float(tail.std(ddof=1)) if len(tail) > 1 else math.nan,
        gain=float(gain.mean()),
        best=mean(case.main_metric),
        mean=mean(case.mean_metric),
        validity=mean("validity_pct"),
        active=mean("active_share"),
        inactive=mean("inactive_updates"),
        seconds=_seconds(results, runs, method),
        energies=mean("training_energies"),
        seeds=len(runs.seeds),
    )


def _seconds(results: str | Path, runs: Runs, method: str) -> float:
    """Mean seconds of the trainings of a method; NaN for the pretrained model."""
    if method == "pretrained":
        return math.nan
    seconds = []
    for seed in runs.seeds:
        history = read_history(
            run_folder(results, runs, method, "network", seed) / "history.csv", ["seconds"]
        )
        seconds.append(float(history["seconds"].iloc[-1]))
    return float(np.mean(seconds))


def levels_panel(lines: Sequence[LevelLine], title: str) -> Panel:
    """The levels as text: one line a level and case."""
    header = ["level", "case", "mean of its tail (hartree)", "over pretrained", "top-0.2 % mean", "mean"]
    header += ["valid (%)", "active samples", "updates without", "training (s)", "energies"]
    cells = [
        [
            f"{line.level:g}",
            line.case if line.case != "reference" else line.method,
            pretty(line.tail, line.tail_sd),
            _cell(line.gain) if line.method != "pretrained" else "",
            *map(_cell, (line.best, line.mean, line.validity, line.active, line.inactive, line.seconds)),
            f"{line.energies:.0f}" if math.isfinite(line.energies) else "",
        ]
        for line in lines
    ]
    return Panel(f"{title}: {over_seeds(max(line.seeds for line in lines))}", header, cells)


def _cell(value: float) -> str:
    return pretty(value) if math.isfinite(value) else ""


LEVELS_NOTE = (
    "Cases: plain trains on all that it samples; pool samples more trajectories than it trains on, draws "
    "from its tail and its body apart, and reweights, which leaves the estimator unbiased; rising adds to "
    "that a level that rises from 0.5. Pretrained and am are the same runs at every level. Active samples: "
    "the share of sampled molecules above the threshold, over all updates; a line without any has not "
    "tested the method. Training: seconds by the history, without threshold and offline batch."
)
