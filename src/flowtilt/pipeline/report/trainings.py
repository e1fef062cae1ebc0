"""The panel that every table has: whether its fine-tunings have tested their methods."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from flowtilt.pipeline.health import HEALTH, flags
from flowtilt.pipeline.report.measurements import entries, summarise
from flowtilt.pipeline.report.panels import Panel, describe, over_seeds, pretty


def training_panel(long: pd.DataFrame) -> Panel | None:
    """The metrics of fine-tunings over seeds, with a flag where a seed passes a bound; None without any.

    Args:
        long: of all experiments and cases of a table; see
            :func:`flowtilt.pipeline.report.measurements.collect_runs`.
    """
    own = long[long["metric"].isin(HEALTH)]
    tuned = own[(own["metric"] == "active_share") & own["value"].notna()]
    runs = list(dict.fromkeys(zip(tuned["experiment"], tuned["method"], strict=True)))
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
            *(cells.get((experiment, row, metric), "") for metric in HEALTH),
            _flagged(seeds[experiment, row]),
        ]
        for experiment, row in runs
    ]
    header = ["method", *(describe(metric).header for metric in HEALTH), "flag"]
    count = max(map(len, seeds.values()))
    return Panel(f"Fine-tuning: {over_seeds(count)}", header, lines).without_empty_columns()


def _flagged(seeds: Mapping[int, Mapping[str, float]]) -> str:
    """Words of the flags that seeds have, and how many of the seeds."""
    found = [word for metrics in seeds.values() for word in flags(metrics)]
    return ", ".join(f"{word} ({found.count(word)} of {len(seeds)})" for word in dict.fromkeys(found))
