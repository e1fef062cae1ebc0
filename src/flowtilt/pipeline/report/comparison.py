"""Our values beside those that the papers report, with verdicts that the seeds support.

Levels are compared where a source has the data set, the model and the reward of the experiment, which its key
``same_as`` says; elsewhere what is compared is the gain over the pretrained model, or over am. A verdict
rests on the sign of a mean over seeds (:func:`flowtilt.pipeline.report.measurements.sign`), paired where
two methods are compared; what that leaves open is ``not decided``, so that no rerun within the seeds'
spread turns a verdict into its opposite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from flowtilt.pipeline.report.measurements import (
    SUMMARY_COLUMNS,
    TEST,
    Entry,
    ResultsError,
    by_row,
    entries,
    half_width,
    mean_sd,
    read_csv,
    sign,
    summarise,
)
from flowtilt.pipeline.report.panels import describe, pretty

REPORTED_COLUMNS = ("source", "experiment", "method", "metric", "value", "unit")
EFFECT_COLUMNS = ("baseline", "gain", "gain_sd", "reported_gain", "reported_gain_sd")
COMPARISON_COLUMNS = ("source", *SUMMARY_COLUMNS, "reported", "unit", *EFFECT_COLUMNS, "verdict")

BASELINES = ("pretrained", "am")
"""Gains are taken over the first of these that a source reports."""

OURS = "flowtilt"
"""Stands for the source of lines that no source reports."""

_WITHIN = 0.10
_DEVIATIONS = 2.0
_SLACK = 1 + 1e-12  # a difference of exactly 10 % counts as within, whatever its last bit

LEVELS = (
    "Verdicts are by code: match (within 10 % of the reported value or two sd), same ordering (above and "
    f"below the same methods as reported, each {TEST}), differs (in both), or not decided by these seeds."
)
EFFECTS = (
    "Where the source has another data set, model or reward, gains are compared and not levels: same "
    f"direction, opposite direction (ours {TEST}; a reported gain counts beyond two of its reported "
    "deviations), or not decided."
)


def read_reported(path: str | Path) -> pd.DataFrame:
    """The table of reported values; it has the columns :data:`REPORTED_COLUMNS` and maybe others.

    Returns:
        The table; its column ``uncertainty`` holds numbers, NaN where a source has none.

    Raises:
        ResultsError: if it is missing, lacks a column, repeats a line's names, or has a value that
            is not a finite number.
    """
    path = Path(path)
    table = read_csv(path, REPORTED_COLUMNS)
    values = pd.to_numeric(table["value"], errors="coerce")
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        raise ResultsError(f"{path}: line {bad[0] + 2}: column value must be a finite number")
    keys = ["source", "experiment", "method", "metric"]
    if (twice := table.duplicated(keys)).any():
        raise ResultsError(f"{path}: {', '.join(table.loc[twice, keys].iloc[0])} occurs twice; keep one line")
    given = table["uncertainty"] if "uncertainty" in table else pd.Series("", index=table.index)
    spread = pd.to_numeric(given, errors="coerce")
    if (bad := np.flatnonzero((spread.isna() | (spread < 0)) & (given != ""))).size:
        raise ResultsError(f"{path}: line {bad[0] + 2}: column uncertainty must be empty, or at least 0")
    return table.assign(value=values.astype(float), uncertainty=spread.astype(float))


# ------------------------------------------------------------------------------ verdicts


def level_verdict(
    values: np.ndarray, reported: float, others: Iterable[tuple[np.ndarray, float]] = ()
) -> str:
    """One metric of one method against the reported value of the same quantity on the same scale.

    Args:
        values: ours, one a seed, (seeds,).
        reported: what the source reports.
        others: (ours, reported) of the same source and metric, for every other method with both, on the same
            seeds.

    Returns:
        ``match`` if the mean differs by at most 10 % of the reported value or by two sd; ``same ordering`` if
        it does not, and the method stands above and below the same others as reported; ``differs`` if it
        stands otherwise, or if there is no order to share (a reported tie orders nothing); ``not decided`` if
        the interval of the mean reaches what would match, or a pair of methods is not told apart.
    """
    mean, sd = mean_sd(values)
    # Of one seed there is no sd, which fmax leaves out.
    off, allowed = abs(mean - reported), float(np.fmax(_WITHIN * abs(reported), _DEVIATIONS * sd))
    if off <= allowed * _SLACK:
        return "match"
    if not off - half_width(values) > allowed:
        return "not decided"
    apart = [(values - ours, reported - theirs) for ours, theirs in others if theirs != reported]
    orders = [sign(ours) * int(np.sign(theirs)) for ours, theirs in apart]
    if not orders or -1 in orders:
        return "differs"
    return "not decided" if 0 in orders else "same ordering"


def effect_verdict(gains: np.ndarray, reported: float, uncertainty: float) -> str:
    """The gain of one method over another against the reported one.

    Args:
        gains: ours, one a seed, (seeds,).
        reported: the reported gain.
        uncertainty: its deviation; NaN where the source has none.
    """
    theirs = np.sign(reported) if abs(reported) > _DEVIATIONS * np.nan_to_num(uncertainty) else 0
    agreement = sign(gains) * int(theirs)
    return {1: "same direction", -1: "opposite direction", 0: "not decided"}[agreement]


# ---------------------------------------------------------------------------- comparison


class _Theirs(NamedTuple):
    """A reported value."""

    value: float
    uncertainty: float
    unit: str
    same: bool

    def over(self, other: _Theirs) -> tuple[float, float]:
        """The gain over another, and its deviation: NaN if neither value has one."""
        deviations = np.array([self.uncertainty, other.uncertainty])
        known = np.isfinite(deviations).any()
        return self.value - other.value, float(np.hypot(*np.nan_to_num(deviations))) if known else math.nan


def comparison(long: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Every row and metric beside what the sources report: the frame of ``comparison.csv``.

    Args:
        long: of all experiments and cases; see :func:`flowtilt.pipeline.report.measurements.collect_runs`.
        reported: see :func:`read_reported`; its column ``same`` says of which lines the levels are compared,
            see :func:`flowtilt.pipeline.report.base.beside`. Without it, of none.

    Returns:
        Columns :data:`COMPARISON_COLUMNS`; one line per source that reports a value, else one with
        the source ``flowtilt``. Only rows that have a reported value get a verdict; values reported
        for methods that were not run do not appear. Gains and their baseline are given where they are what is
        compared.
    """
    ours = {entry[:3]: entry for entry in entries(summarise(long))}
    lines: list[tuple[object, ...]] = []
    seeds = _seeds(long)
    theirs = _by_source(reported, ours)
    for entry in ours.values():
        found = theirs.get((entry.experiment, entry.metric), {})
        sources = {source: methods for source, methods in found.items() if entry.row in methods}
        for source, methods in sources.items():
            own = methods[entry.row]
            judged = _judged(entry, methods, seeds)
            lines.append((source, *entry, own.value, own.unit, *judged))
        if not sources:
            lines.append((OURS, *entry, math.nan, describe(entry.metric).unit, *_NO_EFFECT, ""))
    return pd.DataFrame(lines, columns=list(COMPARISON_COLUMNS))


_NO_EFFECT = ("", *(math.nan,) * 4)


def _judged(
    entry: Entry, methods: Mapping[str, _Theirs], seeds: Mapping[tuple[str, str, str], np.ndarray]
) -> tuple[object, ...]:
    """Gains and verdict of a row that a source reports, among the methods that it reports."""
    own = methods[entry.row]
    values = seeds[entry.experiment, entry.row, entry.metric]
    if own.same:
        others = [
            (seeds[entry.experiment, name, entry.metric], other.value)
            for name, other in methods.items()
            if name != entry.row
        ]
        return (*_NO_EFFECT, level_verdict(values, own.value, others))
    baseline = next((name for name in BASELINES if name in methods), entry.row)
    if baseline == entry.row:
        return (*_NO_EFFECT, "")
    gains = values - seeds[entry.experiment, baseline, entry.metric]
    gain, uncertainty = own.over(methods[baseline])
    word = effect_verdict(gains, gain, uncertainty)
    return (baseline, *mean_sd(gains), gain, uncertainty, word)


def _seeds(long: pd.DataFrame) -> dict[tuple[str, str, str], np.ndarray]:
    """Values by rising seed, (seeds,), by experiment, row and metric."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for metric in dict.fromkeys(long["metric"]):
        for (experiment, row, seed), value in by_row(long, metric).items():
            found.setdefault((experiment, row, metric), {})[seed] = value
    return {key: np.array([of[seed] for seed in sorted(of)]) for key, of in found.items()}


def _by_source(
    reported: pd.DataFrame, ours: Mapping[tuple[str, str, str], Entry]
) -> dict[tuple[str, str], dict[str, dict[str, _Theirs]]]:
    """What sources report of rows that were run: by experiment and metric, by source, by method."""
    full = reported.assign(
        uncertainty=reported.get("uncertainty", math.nan), same=reported.get("same", False)
    )
    found: dict[tuple[str, str], dict[str, dict[str, _Theirs]]] = {}
    for source, experiment, method, metric, *theirs in lines_of(
        full, ("source", "experiment", "method", "metric", "value", "uncertainty", "unit", "same")
    ):
        if (experiment, method, metric) in ours:
            found.setdefault((experiment, metric), {}).setdefault(source, {})[method] = _Theirs(*theirs)
    return found


def lines_of(frame: pd.DataFrame, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Some columns of a frame, line by line."""
    return list(frame[list(columns)].itertuples(index=False, name=None))


# --------------------------------------------------------------------------------- words


def verdict_note(compared: pd.DataFrame) -> str:
    """What the verdicts of a comparison mean; nothing if there are none."""
    judged = compared[compared["verdict"] != ""]
    effects = judged["baseline"] != ""
    return " ".join([LEVELS] * bool((~effects).any()) + [EFFECTS] * bool(effects.any()))


def reported_columns(compared: pd.DataFrame) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """By metric, the columns that stand beside ours: header and cells by row.

    Args:
        compared: see :func:`comparison`.
    """
    columns: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for _, metric, source in reported_keys(compared):
        of = compared[(compared["metric"] == metric) & (compared["source"] == source)]
        beside = columns.setdefault(metric, [])
        beside += [column for column in source_columns(source, of) if column not in beside]
    return columns


def reported_keys(compared: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Experiments, metrics and sources that report more than the pretrained model."""
    theirs = compared[(compared["source"] != OURS) & (compared["method"] != BASELINES[0])]
    return list(dict.fromkeys(lines_of(theirs, ("experiment", "metric", "source"))))


def source_columns(source: str, theirs: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """What one source reports of one metric: header and cells by row.

    Args:
        source: its name.
        theirs: its lines of a comparison, of one experiment and metric.
    """

    gained, judged = theirs[theirs["baseline"] != ""], theirs[theirs["verdict"] != ""]
    columns = [(f"reported ({source})", _by_row(theirs, _plain, "reported"))]
    for baseline in gained["baseline"].unique()[:1]:
        columns.append((f"gain over {baseline}", _by_row(gained, pretty, "gain", "gain_sd")))
        theirs_gained = _by_row(gained, _plain, "reported_gain", "reported_gain_sd")
        columns.append((f"reported gain ({source})", theirs_gained))
    return [*columns, ("verdict", _by_row(judged, str, "verdict"))]


def _by_row(lines: pd.DataFrame, cell: Callable[..., str], *columns: str) -> dict[str, str]:
    return {row: cell(*values) for row, *values in lines_of(lines, ("method", *columns))}


def _plain(value: float, deviation: float = math.nan) -> str:
    """A reported number with no more digits than it was given."""
    return f"{value:g}" + (f" ± {deviation:.2g}" if math.isfinite(deviation) else "")
