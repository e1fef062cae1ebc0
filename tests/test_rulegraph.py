"""The picture of the workflow's rules."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "workflow" / "scripts" / "rulegraph.py"
PICTURE = ROOT / "docs" / "rulegraph.svg"
SVG = "{http://www.w3.org/2000/svg}"


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rulegraph", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rulegraph = _loaded()


def titles(picture: str, kind: str) -> list[str]:
    """Titles of the boxes (``rule``) or of the arrows (``arrow``) of a picture."""
    groups = ET.fromstring(picture).iter(f"{SVG}g")
    return [group.findtext(f"{SVG}title") or "" for group in groups if group.get("class") == kind]


def dot(edges: list[tuple[str, str]], shuffle: int = 0) -> str:
    """A rule graph as Snakemake prints it, its lines in some order."""
    names = list(dict.fromkeys(name for edge in edges for name in edge))
    random.Random(shuffle).shuffle(names)
    lines = [
        f'\t{k}[label = "{name}", color = "0.1 0.6 0.85", style="rounded"];' for k, name in enumerate(names)
    ]
    arrows = [f"\t{names.index(a)} -> {names.index(b)}" for a, b in edges]
    random.Random(shuffle).shuffle(arrows)
    return "\n".join(["digraph snakemake_dag {", "    graph[bgcolor=white, margin=0];", *lines, *arrows, "}"])


DIAMOND = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d"), ("d", "all"), ("b", "all")]


# ----------------------------------------------------------------------- the committed picture


def test_the_committed_picture_has_the_rules_of_the_workflow() -> None:
    boxes = titles(PICTURE.read_text(), "rule")
    assert len(boxes) == len(set(boxes))
    # Models are shipped: nothing is fetched, and none is trained.
    rules = rulegraph.files_of(ROOT / "workflow" / "rules").keys() - {"fetch_checkpoint", "images_pretrain"}
    assert set(boxes) == {*rules, "all"}, "run `make docs`"


def test_the_committed_picture_is_readable_on_a_laptop() -> None:
    root = ET.fromstring(PICTURE.read_text())
    assert float(root.get("width", "inf")) <= 900
    assert float(root.get("height", "inf")) <= 700
    assert PICTURE.stat().st_size < 40_000


def test_boxes_of_the_committed_picture_do_not_overlap() -> None:
    boxes = []
    for group in ET.fromstring(PICTURE.read_text()).iter(f"{SVG}g"):
        if group.get("class") == "rule":
            rect = group.find(f"{SVG}rect")
            assert rect is not None
            boxes.append([float(rect.get(key, "nan")) for key in ("x", "y", "width", "height")])
    for k, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[k + 1 :]:
            apart = x + width <= other_x or other_x + other_width <= x
            assert apart or y + height <= other_y or other_y + other_height <= y


# --------------------------------------------------------------------------------- what is drawn


def test_arrows_that_follow_from_others_are_left_out() -> None:
    picture = rulegraph.draw(rulegraph.parse(dot(DIAMOND), {}), {})
    assert sorted(titles(picture, "rule")) == ["a", "all", "b", "c", "d"]
    assert sorted(titles(picture, "arrow")) == ["a -> b", "a -> c", "b -> d", "c -> d", "d -> all"]


def test_rules_made_for_several_files_are_one_box() -> None:
    edges = [("measure_one", "table"), ("measure_two", "table"), ("measure_two", "measure_one")]
    known = {"measure": "evaluate", "table": "report"}
    graph = rulegraph.parse(dot(edges), known)
    assert graph == {"measure": {"table"}, "table": set()}


def test_a_rule_is_not_taken_for_one_of_several_by_its_name_alone() -> None:
    known = {"theory": "theory", "theory_report": "theory"}
    assert rulegraph.parse(dot([("theory", "theory_report")]), known)["theory"] == {"theory_report"}


@pytest.mark.parametrize("shuffle", range(1, 6))
def test_the_order_of_snakemakes_lines_does_not_matter(shuffle: int) -> None:
    first, other = (rulegraph.draw(rulegraph.parse(dot(DIAMOND, k), {}), {}) for k in (0, shuffle))
    assert other == first


@given(
    st.sets(
        st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda pair: pair[0] < pair[1]), min_size=1
    )
)
def test_reduction_keeps_what_follows_from_what(pairs: set[tuple[int, int]]) -> None:
    graph = {str(k): {str(b) for a, b in pairs if a == k} for k in range(8)}
    left = rulegraph.reduced(graph)
    assert all(rulegraph.reachable(left, k) == rulegraph.reachable(graph, k) for k in graph)
    for start, ends in left.items():
        for end in ends:  # none of them can go
            less = {k: v - {end} if k == start else v for k, v in left.items()}
            assert end not in rulegraph.reachable(less, start)
    rows = rulegraph.rows_of(left)
    assert all(rows[start] > rows[end] for start, ends in left.items() for end in ends)


def test_the_picture_needs_no_more_width_than_its_widest_row() -> None:
    edges = [(f"rule{k}", "all") for k in range(6)]
    picture = ET.fromstring(rulegraph.draw(rulegraph.parse(dot(edges), {}), {}))
    boxes = [float(rect.get("width", "nan")) for rect in picture.iter(f"{SVG}rect") if rect.get("rx")]
    row = sum(sorted(boxes)[-6:]) + 5 * rulegraph.GAP + 2 * rulegraph.MARGIN
    assert float(picture.get("width", "nan")) == pytest.approx(row, abs=1)


# ------------------------------------------------------------------------------------ bad input


def test_nothing_on_standard_input(tmp_path: Path) -> None:
    output = tmp_path / "graph.svg"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(output)],
        input="",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 1
    assert re.search(r"no rule graph on standard input.*snakemake --rulegraph", run.stderr)
    assert not list(tmp_path.iterdir())


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        rulegraph.rows_of({"a": {"b"}, "b": {"a"}})
