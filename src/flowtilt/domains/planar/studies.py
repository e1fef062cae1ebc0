"""Studies: what varies along an axis, where networks resolve it, and who is ahead.

A study's rows either stand somewhere on its axis (by their case or by their method) or are lines
of reference, such as a method with a single stage beside one with K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from flowtilt.pipeline.report.measurements import (
    SOLUTIONS,
    Runs,
    entries,
    row_name,
    row_words,
    runs_of,
    summarise,
    with_gaps,
)
from flowtilt.pipeline.report.panels import Panel, describe, over_seeds, pretty
from flowtilt.pipeline.sections import TUNED

if TYPE_CHECKING:
    from flowtilt.pipeline.experiment import Experiment, Study

RESOLVED_WITHIN = 0.05


@dataclass(frozen=True)
class StudyRuns:
    """A study: its cases, what varies among them, and when a network counts as resolving.

    Attributes:
        axis: name of what varies, with its unit if it has one.
        tolerance: share of the exact objective that a network row may miss and still resolve the
            landscape, or None if the axis of the study is no length to be resolved.
    """

    name: str
    title: str
    axis: str
    cases: tuple[Runs, ...]
    tolerance: float | None = None


def study_runs_of(study: Study, cases: Iterable[Experiment]) -> StudyRuns:
    """A configured study and its cases; see :class:`StudyRuns`. Only cases can differ in a length of the
    landscape; where methods are what varies, there is nothing to resolve."""
    runs = tuple(map(runs_of, cases))
    varied = any(case.value is not None for case in runs)
    return StudyRuns(study.name, study.title, study.study.axis, runs, RESOLVED_WITHIN if varied else None)


class Point(NamedTuple):
    """One metric of one row of a study over its seeds.

    ``axis`` is None for a line of reference; points of one ``series`` make a curve.
    """

    of: str
    case: str
    axis: float | None
    method: str
    kind: str
    series: str
    solution: str
    row: str
    metric: str
    unit: str
    value: float
    sd: float
    seeds: int


def study_points(long: pd.DataFrame, study: StudyRuns) -> list[Point]:
    """The rows of a study's cases in their places. In the order of parent experiment, series and rising axis
    value, lines of reference last."""
    places = {
        (case.name, row_name(method.name, solution)): (case, method, solution)
        for case in study.cases
        for method in case.methods
        for solution in SOLUTIONS
    }
    points = []
    for e in entries(summarise(with_gaps(long))):
        case, method, solution = places[e.experiment, e.row]
        series = method.name if method.value is None else method.kind
        place = (case.of, case.name, case.position(method), method.name, method.kind, series, solution)
        points.append(Point(*place, e.row, e.metric, describe(e.metric).unit, e.value, e.sd, e.seeds))
    groups = parents(points)
    names = list(dict.fromkeys(p.series for p in points))
    return sorted(
        points,
        key=lambda p: (
            groups.index(p.of),
            p.axis is None,
            names.index(p.series),
            p.axis if p.axis is not None else 0.0,
        ),
    )


def curve(points: Iterable[Point], of: str, series: str, solution: str, metric: str) -> list[Point]:
    """The points of one curve, by rising axis value."""
    wanted = (of, series, solution, metric)
    found = [p for p in points if p.axis is not None and (p.of, p.series, p.solution, p.metric) == wanted]
    return sorted(found, key=lambda p: p.axis or 0.0)


def references(points: Iterable[Point], of: str, metric: str) -> list[Point]:
    """The lines of reference of one parent experiment."""
    return [p for p in points if p.axis is None and (p.of, p.metric) == (of, metric)]


def series_names(points: Iterable[Point], of: str) -> list[str]:
    """The series that stand on the axis, in the order of the points."""
    return list(dict.fromkeys(p.series for p in points if p.of == of and p.axis is not None))


def parents(points: Iterable[Point]) -> list[str]:
    """The experiments that the cases derive from, in the order of the points."""
    return list(dict.fromkeys(p.of for p in points))


def tail_metric(study: StudyRuns, of: str) -> str:
    """The tail metric of the cases that derive from ``of``."""
    return next(case.tail_metric for case in study.cases if case.of == of)


def resolves_from(misses: Iterable[tuple[float, float]], tolerance: float) -> float | None:
    """The smallest axis value such that the miss there and at every larger one is within tolerance.

    Args:
        misses: pairs of axis value and difference from the exact value, as a share of its size.
        tolerance: the largest share that counts as resolved.

    Returns:
        None if not even the largest axis value resolves.
    """
    smallest = None
    for value, miss in sorted(misses, reverse=True):
        if not abs(miss) <= tolerance:  # so that an undefined miss is none that resolves
            break
        smallest = value
    return smallest


def misses(points: list[Point], of: str, series: str, metric: str) -> list[tuple[float, float]]:
    """How far a series' network rows are from its exact rows, by their means over seeds. Returns pairs of
    axis value and difference as a share of the exact value's size, by rising axis value."""
    exact = {p.axis: p.value for p in curve(points, of, series, "exact", metric)}
    return [
        (p.axis, (p.value - exact[p.axis]) / abs(exact[p.axis]) if exact[p.axis] else math.nan)
        for p in curve(points, of, series, "network", metric)
        if p.axis is not None and p.axis in exact
    ]


def study_panels(points: list[Point], study: StudyRuns) -> list[Panel]:
    """One table per parent experiment: a line per case and method, the three rows side by side."""
    panels = []
    for of in parents(points):
        tail = tail_metric(study, of)
        columns = [(metric, solution) for metric in (tail, "objective") for solution in SOLUTIONS]
        columns += [("relative_gap", "network"), ("relative_gap", "resolved")]
        own = [p for p in points if p.of == of]
        cells = {(p.case, p.method, p.metric, p.solution): pretty(p.value, p.sd) for p in own}
        lines = [
            ["reference" if axis is None else f"{axis:g}", method]
            + [cells.get((case, method, metric, solution), "") for metric, solution in columns]
            for axis, case, method in dict.fromkeys((p.axis, p.case, p.method) for p in own)
        ]
        header = [study.axis, "method", *(_header(metric, solution) for metric, solution in columns)]
        caption = f"{study.title or study.name}, {of}: {over_seeds(max(p.seeds for p in own))}"
        panels.append(Panel(caption, header, lines).without_empty_columns())
    return panels


def _header(metric: str, solution: str) -> str:
    words = {"network": "network", "exact": "exact", "resolved": "finite resolution"}
    return f"{describe(metric).header}, {words[solution]}"


def findings(points: list[Point], study: StudyRuns) -> list[str]:
    """What a study found, in sentences: where networks resolve, and who is ahead of the references."""
    said = []
    for of in parents(points):
        for series in series_names(points, of):
            if next(p.kind for p in points if p.series == series) not in TUNED:
                continue
            if study.tolerance is not None:
                for metric in (tail_metric(study, of), "objective"):
                    missed = misses(points, of, series, metric)
                    said.append(_where_it_resolves(study, of, series, metric, missed, study.tolerance))
            for reference in references(points, of, "tail_objective"):
                found = curve(points, of, series, reference.solution, "tail_objective")
                if found and reference.kind != "pretrained":
                    said.append(_who_is_ahead(study, found, reference))
    return said


def _where_it_resolves(
    study: StudyRuns, of: str, series: str, metric: str, found: list[tuple[float, float]], tolerance: float
) -> str:
    start = resolves_from(found, tolerance)
    within = f"within {100 * tolerance:g} % of the exact row's"
    if start is None:
        where = f"is at no {study.axis} {within} there and at every larger one that was run"
    else:
        where = f"is {within} at {study.axis} ≥ {start:g}"
    left = [(value, miss) for value, miss in found if start is None or value < start]
    last = f"; at {left[-1][0]:g} it is off by {100 * left[-1][1]:+.3g} %" if left else ""
    return f"{of}, {series}: the network's {describe(metric).words} {where}{last}."


def _who_is_ahead(study: StudyRuns, found: list[Point], reference: Point) -> str:
    best = max(found, key=lambda p: -math.inf if math.isnan(p.value) else p.value)
    ahead = best.value - reference.value
    row, words = row_words(row_name(best.series, best.solution)), describe(best.metric).words
    return (
        f"{best.of}: {row} has its best {words} at {study.axis} = {best.axis:g}: "
        f"{pretty(best.value, best.sd)}, {pretty(abs(ahead))} {'above' if ahead > 0 else 'below'} "
        f"{row_words(reference.row)}."
    )
