"""What metrics of images are called in tables."""

from __future__ import annotations

import re

from flowtilt.pipeline.report.panels import Description

_LEFT_CVAR = re.compile(r"left_cvar_([0-9.]+)")
_SHARE_OF = re.compile(r"share_(.+)")

WORDS = {
    "vendi": Description("Vendi score", "", "higher"),
    "vendi_of_a_prompt": Description("Vendi score within a prompt", "", "higher"),
    "clip": Description("CLIP score", "cosine", "higher"),
    "designs_covered": Description("designs covered", "", "higher"),
    "combinations_covered": Description("combinations covered", "", "higher"),
    "effective_designs": Description("effective number of designs", "", "higher"),
}


def describe(metric: str) -> Description | None:
    """Words and unit of a metric; None for one that is not of this domain alone."""
    if left := _LEFT_CVAR.fullmatch(metric):
        return Description(f"worst-{100 * float(left[1]):g} % mean", "reward", "higher")
    if share := _SHARE_OF.fullmatch(metric):
        return Description(share[1].replace("_", " "), "share")
    return WORDS.get(metric)
