"""Tables of text, in Markdown and LaTeX, and the words that metrics go by in them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
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
    "active_share": Description("active samples", "share"),
    "active_share_final": Description("active at the end", "share"),
    "offline_active_share": Description("active offline", "share"),
    "threshold": Description("threshold", "reward"),
    "inactive_updates": Description("updates without an active sample", "share", "lower"),
    "kl_paid": Description("KL paid", "nats"),
    "clipped_share": Description("controls shortened", "share"),
    "sample_passes": Description("network passes a sample", "", "lower"),
    "plain_passes": Description("of a plain sample", ""),
    "sample_rewards": Description("reward calls a sample", "", "lower"),
    "distinct_share": Description("distinct samples", "share", "higher"),
    "effective_sample_size": Description("fewest effective samples", ""),
    "tilt_predicted": Description("tilt's mean up by, predicted", ""),
    "tilt_realised": Description("tilt's mean up by, realised", "", "higher"),
}
_TAIL = re.compile(r"(worst|top)_([0-9.]+)pct_(\w+)")


@cache
def describe(metric: str) -> Description:
    """Words and unit of a metric, as its domain has them; an unknown one keeps its own name."""
    from flowtilt.pipeline.domain import known_domains

    for domain in known_domains():
        if (own := domain.describe(metric)) is not None:
            return own
    if tail := _TAIL.fullmatch(metric):
        which, percent, unit = tail.groups()
        return Description(f"{which}-{percent} % mean", unit, "lower" if unit == "cost" else "higher")
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
