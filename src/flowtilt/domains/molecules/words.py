"""What metrics of molecules are called in tables."""

from __future__ import annotations

import re

from flowtilt.pipeline.report.panels import Description

_TAIL = re.compile(r"(valid_)?(worst|top)_([0-9.]+)pct_negative_energy")

WORDS = {
    "mean_negative_energy": Description("mean of minus energy", "hartree", "higher"),
    "valid_mean_negative_energy": Description("mean of the valid", "hartree", "higher"),
    "validity_pct": Description("valid", "%", "higher"),
    "uniqueness_pct": Description("unique", "%", "higher"),
    "uniqueness_of_1000_pct": Description("unique of the first 1,000 valid", "%", "higher"),
    "novelty_pct": Description("novel", "%"),
    "converged_pct": Description("with an energy", "%", "higher"),
    "energy_per_atom": Description("energy an atom", "hartree"),
    "relaxation_energy_mean": Description("relaxation energy, mean", "hartree", "lower"),
    "relaxation_energy_median": Description("relaxation energy, median", "hartree", "lower"),
    "heavy_atoms": Description("heavy atoms", ""),
    "atomic_number": Description("mean atomic number", ""),
    "elements_total_variation": Description("elements, total variation", ""),
    "sizes_total_variation": Description("sizes, total variation", ""),
    "training_energies": Description("energies in training", ""),
    "training_failed_share": Description("failed in training", "share"),
}


def describe(metric: str) -> Description | None:
    """Words and unit of a metric; None for one that is not of this domain alone."""
    if tail := _TAIL.fullmatch(metric):
        valid, which, percent = tail.groups()
        words = f"{which}-{percent} % mean" + (" of the valid" if valid else "")
        return Description(words, "hartree", "higher")
    return WORDS.get(metric)
