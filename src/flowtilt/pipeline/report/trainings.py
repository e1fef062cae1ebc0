"""The panels that every table has: whether its fine-tunings have tested their methods, and what samples cost
that were kept without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from flowtilt.pipeline.health import HEALTH, KEEPING, flags
from flowtilt.pipeline.report.measurements import entries, summarise
from flowtilt.pipeline.report.panels import Panel, describe, over_seeds, pretty


def training_panel(long: pd.DataFrame) -> Panel | None:
    """The metrics of fine-tunings over seeds, with a flag where a seed passes a bound; None without any.

    Args:
        long: of all experiments and cases of a table; see
            :func:`flowtilt.pipeline.report.measurements.collect_runs`.
    """
    return _panel(long, "Fine-tuning", HEALTH, "active_share")


def keeping_panel(long: pd.DataFrame) -> Panel | None:
    """The same of methods that train nothing and keep samples: what each costs."""
    return _panel(long, "Kept samples", KEEPING, "sample_passes")


def _panel(long: pd.DataFrame, caption: str, metrics: Sequence[str], told_by: str) -> Panel | None:
    """Metrics of the runs that have one of them."""
    own = long[long["metric"].isin(metrics)]
    chosen = own[(own["metric"] == told_by) & own["value"].notna()]
    runs = list(dict.fromkeys(zip(chosen["experiment"], chosen["method"], strict=True)))
    if not runs:
        return None
    cells = {(e.experiment, e.row, e.metric): pretty(e.value, e.sd) for e in entries(summarise(own))}
    seeds: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for experiment, row, metric, seed, value in own.itertuples(index=False):
        seeds.setdefault((experiment, row), {}).setdefault(seed, {})[metric] = value
    several = len({experiment for experiment, _ in runs}) > 1
    lines = [
        [
            f"{experiment.split('/')[-1]}, {row}" if several else row,
            *(cells.get((experiment, row, metric), "") for metric in metrics),
            _flagged(seeds[experiment, row]),
        ]
        for experiment, row in runs
    ]
    header = ["method", *(describe(metric).header for metric in metrics), "flag"]
    count = max(len(seeds[run]) for run in runs)
    return Panel(f"{caption}: {over_seeds(count)}", header, lines).without_empty_columns()


def _flagged(seeds: Mapping[int, Mapping[str, float]]) -> str:
    """Words of the flags that seeds have, and how many of the seeds."""
    found = [word for metrics in seeds.values() for word in flags(metrics)]
    return ", ".join(f"{word} ({found.count(word)} of {len(seeds)})" for word in dict.fromkeys(found))
