"""Draw the workflow's rules as an SVG drawing, from what ``snakemake --rulegraph`` prints.

snakemake --rulegraph | python workflow/scripts/rulegraph.py docs/rulegraph.svg

Rules that are made for several files are one box, arrows that follow from others are left out, and boxes
have the colour of the file that their rule is in. Needs no graphviz, and the same rules give the same bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

RULES = Path(__file__).resolve().parents[1] / "rules"

COLOURS = {
    "report": "#f3ecb3",
    "theory": "#e3d3f2",
}
"""By rule file; rules of the Snakefile itself, and those of stages, are grey."""

OTHER = "#e4e4e4"

CHARACTER, LINE, PADDING = 6.6, 14, 7
"""Pixels: of a letter at 12 pixels of a sans-serif font, of a line, and around a label."""

GAP, STEP, MARGIN = 16, 56, 12
"""Pixels: between boxes of a row, from row to row, and around all."""

Graph = dict[str, set[str]]
"""Rules, and the rules that take what each makes."""


def files_of(rules: Path) -> dict[str, str]:
    """The rule file of each rule, by name; of rules that are made for several files, by what is common."""
    found = {}
    for file in sorted(rules.glob("*.smk")):
        names = re.findall(
            r'^rule (\w+):|^ +f"(\w+)_\{name\}"$', file.read_text(encoding="utf-8"), re.MULTILINE
        )
        found |= {one or several: file.stem for one, several in names}
    return found


def parse(dot: str, known: dict[str, str]) -> Graph:
    """The rules of a graph in graphviz' language.

    Args:
        dot: what Snakemake printed.
        known: of :func:`files_of`.

    Raises:
        ValueError: if there is no graph in it.
    """
    labels = dict(re.findall(r'^\s*(\d+)\[label = "(\w+)"', dot, re.MULTILINE))
    if not labels:
        raise ValueError("no rule graph on standard input; pipe in what `snakemake --rulegraph` prints")
    names = {number: _common(label, known) for number, label in labels.items()}
    graph: Graph = {name: set() for name in names.values()}
    for start, end in re.findall(r"^\s*(\d+) -> (\d+)", dot, re.MULTILINE):
        if names[start] != names[end]:  # an iteration may start from an earlier one of the same rule
            graph[names[start]].add(names[end])
    return graph


def _common(rule: str, known: dict[str, str]) -> str:
    """What is common to the names of rules that are made for several files."""
    return next((name for name in known if rule not in known and rule.startswith(f"{name}_")), rule)


def reachable(graph: Graph, start: str) -> set[str]:
    """All that follows from a rule."""
    found: set[str] = set()
    left = [*graph[start]]
    while left:
        rule = left.pop()
        if rule not in found:
            found.add(rule)
            left += graph[rule]
    return found


def reduced(graph: Graph) -> Graph:
    """The graph without arrows that follow from others."""
    follows = {rule: reachable(graph, rule) for rule in graph}
    return {
        rule: {end for end in ends if not any(end in follows[other] for other in ends - {end})}
        for rule, ends in graph.items()
    }


# ------------------------------------------------------------------------------------- layout


def rows_of(graph: Graph) -> dict[str, int]:
    """Row of each rule, 0 for the last: one above the highest of those that take what it makes.

    Raises:
        ValueError: if rules go in a circle.
    """
    rows: dict[str, int] = {}

    def row(rule: str, above: tuple[str, ...]) -> int:
        if rule in above:
            raise ValueError(f"rules go in a circle: {' -> '.join([*above, rule])}")
        if rule not in rows:
            rows[rule] = max((row(end, (*above, rule)) + 1 for end in graph[rule]), default=0)
        return rows[rule]

    for rule in sorted(graph):
        row(rule, ())
    return rows


def routed(graph: Graph, rows: dict[str, int]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of boxes, the first on top, with a place for each arrow that passes, and the arrows' ways.

    Names of places for arrows have a space in them, which names of rules have not.
    """
    levels: list[list[str]] = [[] for _ in range(max(rows.values()) + 1)]
    for rule in sorted(graph):
        levels[rows[rule]].append(rule)
    ways = []
    for start in sorted(graph):
        for end in sorted(graph[start]):
            between = [f"{start} {end} {row}" for row in range(rows[start] - 1, rows[end], -1)]
            for place, row in zip(between, range(rows[start] - 1, rows[end], -1), strict=True):
                levels[row].append(place)
            ways.append([start, *between, end])
    return levels[::-1], ways


def placed(levels: list[list[str]], ways: list[list[str]]) -> dict[str, float]:
    """Horizontal centre of every box and place, with few arrows that cross.

    Where sweeps end depends on the order that they start from; the best of several is taken.
    """
    tried = []
    for turn in range(12):
        start = [level[turn % len(level) :] + level[: turn % len(level)] for level in levels]
        x = _swept(start, ways)
        tried.append((_crossings(levels, ways, x), sum(abs(x[w[0]] - x[w[-1]]) for w in ways), turn, x))
    return min(tried)[-1]


def _crossings(levels: list[list[str]], ways: list[list[str]], x: dict[str, float]) -> int:
    """Pairs of arrows that cross between one row and the next."""
    row = {name: number for number, level in enumerate(levels) for name in level}
    parts = sorted((row[one], x[one], x[other]) for way in ways for one, other in pairwise(way))
    return sum(
        (a[1] - b[1]) * (a[2] - b[2]) < 0 for k, a in enumerate(parts) for b in parts[k + 1 :] if a[0] == b[0]
    )


def _swept(levels: list[list[str]], ways: list[list[str]]) -> dict[str, float]:
    """Horizontal centres near their neighbours', with a gap to the next in the row."""
    near: dict[str, list[str]] = {name: [] for level in levels for name in level}
    for way in ways:
        for one, other in pairwise(way):
            near[one].append(other)
            near[other].append(one)
    x: dict[str, float] = {}
    for level in levels:
        x |= _apart(level, dict.fromkeys(level, 0.0))
    for sweep in range(60):
        for level in levels if sweep % 2 == 0 else levels[::-1]:
            wanted = {name: sum(x[n] for n in near[name]) / len(near[name]) for name in level}
            if sweep < 40:
                level.sort(key=lambda name: (wanted[name], name))
            x |= _apart(level, wanted)
    left = min(x[name] - _width(name) / 2 for name in x)
    return {name: at - left + MARGIN for name, at in x.items()}


def _apart(level: list[str], wanted: dict[str, float]) -> dict[str, float]:
    """Centres in the given order as near to those that are wanted as gaps allow.

    Boxes that would overlap are moved together, by the mean of what they want.
    """
    groups: list[tuple[list[str], float]] = []  # names, and the left end of the first
    for name in level:
        names, start = [name], wanted[name] - _width(name) / 2
        while groups and groups[-1][1] + _span(groups[-1][0]) + GAP > start:
            names = groups.pop()[0] + names
            offsets, at = [], 0.0
            for each in names:
                offsets.append(wanted[each] - at - _width(each) / 2)
                at += _width(each) + GAP
            start = sum(offsets) / len(offsets)
        groups.append((names, start))
    centres = {}
    for names, start in groups:
        for name in names:
            centres[name] = start + _width(name) / 2
            start += _width(name) + GAP
    return centres


def _span(names: list[str]) -> float:
    return sum(map(_width, names)) + GAP * (len(names) - 1)


def label(rule: str) -> list[str]:
    """A rule's name in one or two lines."""
    first, _, rest = rule.partition("_")
    return [f"{first}_", rest] if rest else [first]


def _width(name: str) -> float:
    return 4.0 if " " in name else max(map(len, label(name))) * CHARACTER + 2 * PADDING


def _height(name: str) -> float:
    return len(label(name)) * LINE + PADDING


# ------------------------------------------------------------------------------------ drawing


def draw(graph: Graph, known: dict[str, str]) -> str:
    """The drawing as SVG; each box and each arrow has a title that says what it is."""
    graph = reduced(graph)
    levels, ways = routed(graph, rows_of(graph))
    x = placed(levels, ways)
    y = {name: MARGIN + 18 + STEP * row for row, level in enumerate(levels) for name in level}
    legend = [file for file in COLOURS if file in {known.get(rule) for rule in graph}]
    width = max(at + _width(name) / 2 for name, at in x.items()) + MARGIN
    width = max(width, _legend_width(legend))
    height = max(y.values()) + 18 + MARGIN + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12">',
        "<title>Rules of the workflow</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
    ]
    parts += [_arrow(way, x, y) for way in ways]
    parts += [_box(rule, x[rule], y[rule], COLOURS.get(known.get(rule, ""), OTHER)) for rule in sorted(graph)]
    parts += _legend(legend, height)
    return "\n".join([*parts, "</svg>", ""])


def _arrow(way: list[str], x: dict[str, float], y: dict[str, float]) -> str:
    """A smooth line from box to box, through the places that are kept for it."""
    points = [(x[name], y[name]) for name in way]
    points[0] = (points[0][0], points[0][1] + _height(way[0]) / 2)
    points[-1] = (points[-1][0], points[-1][1] - _height(way[-1]) / 2 - 1)
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        path += f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return (
        f'<g class="arrow"><title>{escape(way[0])} -&gt; {escape(way[-1])}</title>'
        f'<path d="{path}" fill="none" stroke="#777" marker-end="url(#head)"/></g>'
    )


def _box(rule: str, x: float, y: float, colour: str) -> str:
    width, height = _width(rule), _height(rule)
    lines = label(rule)
    first = y - (len(lines) - 1) * LINE / 2 + 4
    text = "".join(
        f'<tspan x="{x:.1f}" y="{first + k * LINE:.1f}">{escape(line)}</tspan>'
        for k, line in enumerate(lines)
    )
    return (
        f'<g class="rule"><title>{escape(rule)}</title>'
        f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="5" fill="{colour}" stroke="#555"/><text text-anchor="middle">{text}</text></g>'
    )


def _legend_width(files: list[str]) -> float:
    return 2 * MARGIN + sum(34 + (len(file) + 4) * CHARACTER for file in files)


def _legend(files: list[str], height: float) -> list[str]:
    """One coloured square for each rule file, at the bottom."""
    parts, x = [], float(MARGIN)
    for file in files:
        parts.append(
            f'<g class="legend"><rect x="{x:.1f}" y="{height - MARGIN - 11:.1f}" width="12" height="12" '
            f'fill="{COLOURS[file]}" stroke="#555"/>'
            f'<text x="{x + 18:.1f}" y="{height - MARGIN - 1:.1f}">{escape(file)}.smk</text></g>'
        )
        x += 34 + (len(file) + 4) * CHARACTER
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw what `snakemake --rulegraph` prints.")
    parser.add_argument("output", type=Path, help="drawing to write (svg)")
    output = parser.parse_args().output
    known = files_of(RULES)
    try:
        drawing = draw(parse(sys.stdin.read(), known), known)
    except ValueError as error:
        print(f"rulegraph: {error}", file=sys.stderr)
        return 1
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(drawing, encoding="utf-8")
    temporary.replace(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
