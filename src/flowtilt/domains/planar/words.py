"""What metrics of experiments in the plane are called in tables."""

from __future__ import annotations

import re

from flowtilt.pipeline.report.panels import Description

_TRANSPORT = re.compile(r"w1_(\w+?)(_critic)?")

WORDS = {
    "functional": Description("G", "", "higher"),
    "functional_before": Description("G before", ""),
    "sliced_w2": Description("sliced W2 to the optimum", "distance", "lower"),
    "sliced_w2_own": Description("sliced W2 to its own optimum", "distance", "lower"),
    "slack": Description("what the optimum may lack", ""),
    "gap_closed": Description("gap closed", "%", "higher"),
    "horizontal_shift": Description("horizontal shift", "distance"),
    "vertical_shift": Description("vertical shift", "distance"),
    "horizontal_over_vertical_shift": Description("horizontal over vertical shift", "ratio"),
    "entropy": Description("entropy of the histogram", "nats", "higher"),
    "entropy_likelihood": Description("entropy by likelihood", "nats", "higher"),
    "coverage": Description("mass about the small component", "share", "higher"),
    "outside": Description("off the histogram", "share"),
    "grid_mass": Description("mass on the grid", "share"),
    "falls": Description("exact steps that lower G", "", "lower"),
    "gap": Description("gap to exact", "reward", "lower"),
    "relative_gap": Description("gap to exact", "%", "lower"),
    "mass_left": Description("mass left", "share"),
    "mass_right": Description("mass right", "share"),
    "mass_bumps": Description("mass on bumps", "share"),
    "dominance_violation": Description("violation of dominance", "share", "lower"),
    "floored_mass": Description("on the floor", "share"),
}


def describe(metric: str) -> Description | None:
    """Words and unit of a metric; None for one that is not of this domain alone."""
    if transport := _TRANSPORT.fullmatch(metric):
        name, critic = transport.groups()
        return Description(f"W1 under {name}{' by critic' if critic else ''}", "distance", "lower")
    return WORDS.get(metric)
