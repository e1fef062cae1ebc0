"""Tables of text, in Markdown and LaTeX, and the words that metrics go by in them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Description(NamedTuple):
    """How a metric is headed in tables: its words, its unit, and which way is better if any is."""

    words: str
    unit: str
    better: str = ""

    @property
    def header(self) -> str:
        """The words with the unit behind them."""
        return f"{self.words} ({self.unit})" if self.unit else self.words


_DESCRIPTIONS = {
    "mean_cost": Description("mean", "cost", "lower"),
    "mean_reward": Description("mean", "reward", "higher"),
    "kl": Description("KL from pretrained", "nats"),
    "objective": Description("G", "reward", "higher"),
    "tail_objective": Description("G of the tail", "reward", "higher"),
    "functional": Description("G", "", "higher"),
    "functional_before": Description("G before", ""),
    "slack": Description("what the optimum may lack", ""),
    "gap_closed": Description("gap closed", "%", "higher"),
    "horizontal_shift": Description("horizontal shift", "distance"),
    "vertical_shift": Description("vertical shift", "distance"),
    "horizontal_over_vertical_shift": Description("horizontal over vertical shift", "ratio"),
    "entropy": Description("entropy of the histogram", "nats", "higher"),
    "entropy_likelihood": Description("entropy by likelihood", "nats", "higher"),
    "coverage": Description("mass about the small component", "share", "higher"),
    "outside": Description("off the histogram", "share"),
    "floored_mass": Description("on the floor", "share"),
    "grid_mass": Description("mass on the grid", "share"),
    "gap": Description("gap to exact", "reward", "lower"),
    "relative_gap": Description("gap to exact", "%", "lower"),
    "mass_left": Description("mass left", "share"),
    "mass_right": Description("mass right", "share"),
    "mass_bumps": Description("mass on bumps", "share"),
    "active_share": Description("active samples", "share"),
    "active_share_final": Description("active at the end", "share"),
    "offline_active_share": Description("active offline", "share"),
    "threshold": Description("threshold", "reward"),
    "dominance_violation": Description("violation of dominance", "share", "lower"),
}
_DESCRIPTIONS |= {
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
    "inactive_updates": Description("updates without an active sample", "share", "lower"),
    "path_kl": Description("path-space KL", "nats"),
    "clipped_share": Description("controls shortened", "share"),
    "effective_sample_size": Description("effective samples of the bank", ""),
    "training_energies": Description("energies in training", ""),
    "training_failed_share": Description("failed in training", "share"),
}
_DESCRIPTIONS |= {
    "vendi": Description("Vendi score", "", "higher"),
    "vendi_of_a_prompt": Description("Vendi score within a prompt", "", "higher"),
    "clip": Description("CLIP score", "cosine", "higher"),
    "designs_covered": Description("designs covered", "", "higher"),
    "combinations_covered": Description("combinations covered", "", "higher"),
    "effective_designs": Description("effective number of designs", "", "higher"),
}
_UNITS = {"negative_energy": "hartree"}
"""Of what the names of tail metrics end with, where that is not the unit itself."""

_TRANSPORT = re.compile(r"w1_(\w+?)(_critic)?")
_TAIL = re.compile(r"(valid_)?(worst|top)_([0-9.]+)pct_(\w+)")
_LEFT_CVAR = re.compile(r"left_cvar_([0-9.]+)")
_SHARE_OF = re.compile(r"share_(.+)")


def describe(metric: str) -> Description:
    """Words and unit of a metric; an unknown one keeps its own name."""
    if tail := _TAIL.fullmatch(metric):
        valid, which, percent, unit = tail.groups()
        words = f"{which}-{percent} % mean" + (" of the valid" if valid else "")
        return Description(words, _UNITS.get(unit, unit), "lower" if unit == "cost" else "higher")
    if transport := _TRANSPORT.fullmatch(metric):
        name, critic = transport.groups()
        return Description(f"W1 under {name}{' by critic' if critic else ''}", "distance", "lower")
    if left := _LEFT_CVAR.fullmatch(metric):
        return Description(f"worst-{100 * float(left[1]):g} % mean", "reward", "higher")
    if share := _SHARE_OF.fullmatch(metric):
        return Description(share[1].replace("_", " "), "share")
    return _DESCRIPTIONS.get(metric, Description(metric.replace("_", " "), ""))


def pretty(value: float, sd: float = math.nan) -> str:
    """``mean ± sd`` with the sd to two digits, or the mean to four; ``n/a`` if undefined."""
    if not math.isfinite(value):
        return "n/a"
    known = math.isfinite(sd)
    spread = sd if known and sd > 1e-12 * abs(value) else 0.0  # less is rounding errors of equal values
    largest = max(abs(value), spread)
    if largest == 0:
        return "0 ± 0" if known else "0"
    wanted = 1 - _exponent(spread) if spread else 3 - _exponent(value)
    places = max(0, min(wanted, 5 - _exponent(largest), 6))
    text = f"{value:.{places}f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    if not known:
        return text
    return f"{text} ± {spread:.{places}f}" if spread else f"{text} ± 0"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def over_seeds(count: int) -> str:
    """What the numbers of a table are."""
    return f"mean ± sd over {count} seeds" if count > 1 else "one seed"


class Panel(NamedTuple):
    """One table of text: a caption, headers and lines of as many cells."""

    caption: str
    header: list[str]
    lines: list[list[str]]

    def without_empty_columns(self) -> Panel:
        """The panel less the columns in which no line has anything; the first always stays."""
        keep = [i for i in range(len(self.header)) if i == 0 or any(line[i] for line in self.lines)]
        lines = [[line[i] for i in keep] for line in self.lines]
        return Panel(self.caption, [self.header[i] for i in keep], lines)


def markdown(panels: Sequence[Panel]) -> str:
    """The panels as Markdown tables."""
    return "\n\n".join(_markdown(panel) for panel in panels)


def _markdown(panel: Panel) -> str:
    header, *lines = ([cell.replace("|", r"\|") for cell in line] for line in [panel.header, *panel.lines])
    rule = ["---", *["---:"] * (len(header) - 1)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
    return f"**{panel.caption}**\n\n{table}" if panel.caption else table


def latex(panels: Sequence[Panel]) -> str:
    """The panels as LaTeX tabulars with the rules of the booktabs package."""
    return "% needs \\usepackage{booktabs}\n" + "\n\n\\bigskip\n".join(_latex(panel) for panel in panels)


def _latex(panel: Panel) -> str:
    header = " & ".join(_latex_header(cell) for cell in panel.header) + r" \\"
    lines = [" & ".join(_latex_text(cell) for cell in line) + r" \\" for line in panel.lines]
    columns = "l" + "r" * (len(panel.header) - 1)
    caption = [rf"\textbf{{{_latex_text(panel.caption)}}}\par\smallskip"] if panel.caption else []
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([*caption, *body, r"\end{tabular}"])


def _latex_header(cell: str) -> str:
    """A header with its unit and what follows a comma on lines of their own, for narrow columns."""
    lines = [_latex_text(part) for part in re.split(r" (?=\()|, ", cell)]
    return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r"\\".join(lines) + "}"


_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def _latex_text(cell: str) -> str:
    if re.fullmatch(r"-?[0-9.]+( ± [0-9.]+)?", cell):
        return "$" + cell.replace("±", r"\pm") + "$"  # math, so that a minus is set as one
    return "".join(_LATEX_ESCAPES.get(character, character) for character in cell)
