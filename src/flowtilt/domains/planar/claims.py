"""Sentences on whether networks in the plane raise what they are to raise."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flowtilt.pipeline.report.claims import share, spread
from flowtilt.pipeline.report.measurements import Runs, of_row, row_name


def own_gains(long: pd.DataFrame, runs: Runs) -> dict[str, np.ndarray]:
    """What a network's own objective has more than that of the pretrained distribution, by method and rising
    seed.

    Args:
        long: metrics of one experiment, or of several; see
            :func:`flowtilt.pipeline.report.measurements.collect_runs`.
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
        f"{method} lowers its own G on {share(gain < 0)}: it changes by {spread(gain)} from that of the "
        "pretrained distribution."
        for method, gain in found.items()
        if (gain < 0).any()
    ]
    raised = [method for method, gain in found.items() if (gain > 0).all()]
    if raised:
        said.append(
            f"G rises over that of the pretrained distribution on every seed under {', '.join(raised)}."
        )
    return said


def falling_steps(long: pd.DataFrame, runs: Runs) -> list[str]:
    """One sentence for each fdc method whose exact steps lower their own objective on some seed.

    Such a step is none of an ascent, whatever a network makes of it. The arguments are those of
    :func:`own_gains`.
    """
    long, said = long[long["experiment"] == runs.name], []
    for method in runs.methods:
        count = of_row(long, row_name(method.name, "exact"), "falls")
        if (count > 0).any():
            said.append(
                f"{method.name} is no ascent: {int(count.sum())} of its exact steps lower its own G, on "
                f"{share(count > 0)}; leave the step out, and by: exponents searches one that does not."
            )
    return said
