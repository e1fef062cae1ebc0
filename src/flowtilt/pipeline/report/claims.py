"""Sentences on what methods should do and on what they did, judged by differences on the same seeds."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from flowtilt.pipeline.report.measurements import Runs, of_row, row_name
from flowtilt.pipeline.report.panels import describe, pretty


def raises(long: pd.DataFrame, method: str, other: str, metric: str) -> str:
    """Whether a method has more of a metric than another.

    Args:
        long: metrics of one experiment; see :func:`flowtilt.pipeline.report.measurements.collect`.
        method, other: names of their rows.
        metric: name of the metric.
    """
    found = gains(long, method, other, metric)
    words = describe(metric)
    return (
        f"{method} raises the {words.words} over {other}: {decided(found)}, by "
        f"{' '.join(filter(None, [spread(found), words.unit]))} ({_share(found > 0)})."
    )


def keeps(long: pd.DataFrame, method: str, other: str, metric: str) -> str:
    """Whether a method has no less of a metric than another; the arguments are those of :func:`raises`.

    It holds if it has no less on any seed, or more by two standard errors.
    """
    found = gains(long, method, other, metric)
    word = "holds" if (found >= 0).all() else decided(found)
    return (
        f"{method} does not lower the {describe(metric).words} of {other}: {word}, the difference is "
        f"{spread(found)} (not lower on {_share(found >= 0)})."
    )


def own_gains(long: pd.DataFrame, runs: Runs) -> dict[str, np.ndarray]:
    """What a network's own objective has more than that of the pretrained law, by method and rising seed.

    Args:
        long: metrics of one experiment, or of several; see :func:`flowtilt.pipeline.report.measurements.collect_runs`.
        runs: of an experiment in the plane. One on a tail without a pretrained row has no gains.
    """
    long = long[long["experiment"] == runs.name]
    pretrained = next((m.name for m in runs.methods if m.kind == "pretrained"), None)

    def gain(name: str, kind: str) -> np.ndarray:
        if not runs.has_tail:
            before = of_row(long, row_name(name, "exact"), "functional_before")
            return of_row(long, name, "functional") - before
        whole = kind == "am"  # its objective is of the mean, and the others' of the tail
        metric = runs.mean_metric if whole else "tail_objective"
        before = of_row(long, str(pretrained), metric)
        return of_row(long, name, "objective") - (runs.sign * before if whole else before)

    if runs.has_tail and pretrained is None:
        return {}
    return {m.name: gain(m.name, m.kind) for m in runs.methods if m.kind != "pretrained"}


def own_objective(long: pd.DataFrame, runs: Runs) -> list[str]:
    """Which networks lower what they are to raise, and which raise it on every seed.

    The arguments are those of :func:`own_gains`.
    """
    found = own_gains(long, runs)
    said = [
        f"{method} lowers its own G on {_share(gain < 0)}: it changes by {spread(gain)} from that of the "
        "pretrained law."
        for method, gain in found.items()
        if (gain < 0).any()
    ]
    raised = [method for method, gain in found.items() if (gain > 0).all()]
    if raised:
        said.append(f"G rises over that of the pretrained law on every seed under {', '.join(raised)}.")
    return said


def gains(long: pd.DataFrame, method: str, other: str, metric: str) -> np.ndarray:
    """What a method has more of a metric than another on the same seed, by rising seed, (seeds,)."""
    return of_row(long, method, metric) - of_row(long, other, metric)


def decided(gains: np.ndarray) -> str:
    """Whether gains of paired seeds are positive, by two standard errors of their mean."""
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    if abs(gains.mean()) <= 2 * error:
        return "not decided by these seeds"
    return "holds" if gains.mean() > 0 else "does not hold"


def spread(values: np.ndarray) -> str:
    """``mean ± sd`` of values, one a seed."""
    return pretty(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan)


def _share(true: np.ndarray) -> str:
    return f"{int(true.sum())} of {len(true)} seeds"
