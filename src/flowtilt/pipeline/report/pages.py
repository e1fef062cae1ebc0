"""Tables as HTML pages with nothing to load from elsewhere: what the workflow's report shows."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from flowtilt.files import read_text, write_text
from flowtilt.pipeline.report.comparison import EFFECTS, LEVELS
from flowtilt.pipeline.report.measurements import ResultsError
from flowtilt.pipeline.report.panels import Panel, markdown
from flowtilt.pipeline.report.tables import headline

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 1.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.35rem; }
p { max-width: 60rem; }
table { border-collapse: collapse; margin: .75rem 0 1.75rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: bottom; }
th { max-width: 9rem; background: #f6f8fa; font-weight: 600; position: sticky; top: 0; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; position: sticky; left: 0; }
td:first-child { background: #fff; }
td { white-space: nowrap; }
tr:hover td { background: #f6f8fa; }
.good { color: #116329; font-weight: 600; }
.fair { color: #7d4e00; font-weight: 600; }
.bad { color: #a40e26; font-weight: 600; }
"""

VERDICTS = {
    **dict.fromkeys(("match", "reached", "holds", "same direction"), "good"),
    **dict.fromkeys(("same ordering", "not decided"), "fair"),
    **dict.fromkeys(("differs", "opposite direction"), "bad"),
}
"""Cells that say how a number compares, and the class that colours them."""


def page(title: str, text: str) -> str:
    """A page from Markdown, in which raw HTML is shown and not obeyed."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for verdict, colour in VERDICTS.items():
        body = re.sub(rf"(<td[^>]*)>{verdict}</td>", rf'\1 class="{colour}">{verdict}</td>', body)
    heading = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n{body}</body>\n</html>\n"
    )


def comparison_page(source: Path) -> str:
    """The page of the comparison (``.csv``): what was reported beside ours, and how many agree."""
    text = headline(source)
    found = Counter(cell for cell in re.findall(r"\| ([a-z ]+) (?=\|)", text) if cell in VERDICTS)
    said = ", ".join(f"{count} × {verdict}" for verdict, count in found.items())
    return page(
        "Beside the papers",
        f"Values that the papers report: {said or 'none for what was run'}. {LEVELS} Where gains are given: "
        f"{EFFECTS} All other metrics are in the experiments' tables.\n\n{text}",
    )


def provenance_page(source: Path) -> str:
    """The page of the provenance (``.json``): commit, versions, machine, and time per stage."""
    try:
        record: dict[str, Any] = json.loads(_read(source))
        panels = [
            _mapping("Configuration and code", record["commit"] | {"configuration": record["config_hash"]}),
            _mapping("Versions", record["versions"]),
            *(_mapping(f"Versions of {name}", of) for name, of in record.get("environments", {}).items()),
            _mapping("Machine", record["machine"]),
            _stages(record["stages"]),
        ]
        if earlier := record.get("earlier"):
            panels.append(_mapping("Kept from an earlier run", earlier))
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{source}: not a provenance ({error!r}); delete it and run again") from None
    return page("Where the results come from", markdown(panels))


def _mapping(caption: str, mapping: dict[str, Any]) -> Panel:
    return Panel(caption, ["", "is"], [[key, str(value)] for key, value in mapping.items()])


def _stages(stages: dict[str, dict[str, Any]]) -> Panel:
    keys = list(dict.fromkeys(key for stage in stages.values() for key in stage))
    header = ["stage", *(key.replace("_", " ") for key in keys)]
    return Panel("Stages", header, [[name, *(str(s.get(k, "")) for k in keys)] for name, s in stages.items()])


def _read(source: Path) -> str:
    try:
        return read_text(source, ResultsError)
    except FileNotFoundError:
        raise ResultsError(f"{source}: no such file; run the stage that writes it first") from None


def write_page(source: Path, title: str, output: Path) -> None:
    """Write the page of a file: of a table's text, of the comparison, or of the provenance, by its ending.
    Raises ResultsError if the file is missing or not what its ending says."""
    made = {
        ".md": lambda: page(title or source.stem, _read(source)),
        ".csv": lambda: comparison_page(source),
        ".json": lambda: provenance_page(source),
    }
    if source.suffix not in made:
        raise ResultsError(f"{source}: no page is made of this; give a file that ends in {', '.join(made)}")
    text = made[source.suffix]()
    write_text(output, text)


def write_overview(sources: Sequence[Path], folder: Path) -> None:
    """Write the pages of some files, under the files' names; see :func:`write_page`."""
    for source in sources:
        write_page(source, source.stem.capitalize(), folder / f"{source.stem}.html")
