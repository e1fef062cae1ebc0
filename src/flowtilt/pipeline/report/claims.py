"""Sentences on what methods should do and on what they did, judged by differences on the same seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flowtilt.pipeline.report.measurements import mean_sd, of_row, sign
from flowtilt.pipeline.report.panels import describe, pretty


def more_than(long: pd.DataFrame, method: str, other: str, metric: str) -> str:
    """Whether a method has more of a metric than another.

    Args:
        long: metrics of one experiment; see :func:`flowtilt.pipeline.report.measurements.collect`.
    """
    found = gains(long, method, other, metric)
    words = describe(metric)
    return (
        f"{method} raises the {words.words} over {other}: {decided(found)}, by "
        f"{' '.join(filter(None, [spread(found), words.unit]))} ({share(found > 0)})."
    )


def no_less_than(long: pd.DataFrame, method: str, other: str, metric: str) -> str:
    """Whether a method has no less of a metric than another; the arguments are those of :func:`more_than`.

    It holds if it has no less on any seed, or what is decided is more.
    """
    found = gains(long, method, other, metric)
    word = "holds" if (found >= 0).all() else decided(found)
    return (
        f"{method} does not lower the {describe(metric).words} of {other}: {word}, the difference is "
        f"{spread(found)} (not lower on {share(found >= 0)})."
    )


def gains(long: pd.DataFrame, method: str, other: str, metric: str) -> np.ndarray:
    """What a method has more of a metric than another on the same seed, by rising seed, (seeds,)."""
    return of_row(long, method, metric) - of_row(long, other, metric)


def decided(gains: np.ndarray) -> str:
    """Whether gains of paired seeds are positive, by :func:`flowtilt.pipeline.report.measurements.sign`."""
    return {1: "holds", -1: "does not hold", 0: "not decided by these seeds"}[sign(gains)]


def spread(values: np.ndarray) -> str:
    """``mean ± sd`` of values, one a seed."""
    return pretty(*mean_sd(values))


def share(true: np.ndarray) -> str:
    return f"{int(true.sum())} of {len(true)} seeds"
