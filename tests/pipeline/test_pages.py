"""Tables as HTML pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.report.measurements import ResultsError
from flowtilt.pipeline.report.pages import comparison_page, page, write_page
from flowtilt.pipeline.report.panels import Panel, markdown

RESULTS = Path(__file__).parents[2] / "results"


class Cells(HTMLParser):
    """Texts and classes of a page's table cells, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[tuple[str, str]] = []
        self.loads: list[str] = []
        self._class: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.loads += [str(found[key]) for key in ("src", "href") if found.get(key)]
        if tag in ("td", "th"):
            self._class = found.get("class") or ""

    def handle_data(self, data: str) -> None:
        if self._class is not None:
            self.cells.append((data, self._class))
            self._class = None


def test_a_table_keeps_its_cells_and_verdicts_have_colours() -> None:
    panel = Panel(
        "Three", ["method", "G | x", "verdict"], [["am", "1 ± 2", "match"], ["fdc", "3", "differs"]]
    )
    text = page("a < b", markdown([panel]))
    cells = Cells(text)
    assert [word for word, _ in cells.cells] == [
        *("method", "G | x", "verdict"),
        *("am", "1 ± 2", "match"),
        *("fdc", "3", "differs"),
    ]
    assert {word: colour for word, colour in cells.cells if colour} == {"match": "good", "differs": "bad"}
    assert "<h1>a &lt; b</h1>" in text
    assert "<strong>Three</strong>" in text
    assert cells.loads == []


def test_what_looks_like_html_is_shown_and_not_obeyed() -> None:
    text = page("t", "<script>alert(1)</script>\n\n| a |\n| --- |\n| <img src=x> |\n")
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;img src=x&gt;" in text


def test_the_comparison_counts_its_verdicts() -> None:
    """Of the committed results, by the file itself."""
    csv = (RESULTS / "tables" / "comparison.csv").read_text().splitlines()
    verdicts = [line.rpartition(",")[2] for line in csv[1:]]
    text = comparison_page(RESULTS / "tables" / "comparison.csv")
    for verdict in set(filter(None, verdicts)):
        count = verdicts.count(verdict)
        assert count > 0
        assert f"{count} × {verdict}" in text
        assert sum(word == verdict for word, _ in Cells(text).cells) == count


@pytest.mark.parametrize("name", ["tables/risk_averse_2d.md", "tables/costs.md", "provenance.json"])
def test_committed_results_have_pages(name: str, tmp_path: Path) -> None:
    output = tmp_path / "pages" / "page.html"
    assert main(["page", str(RESULTS / name), "--title", "A title", "--output", str(output)]) == 0
    cells = Cells(output.read_text())
    assert len(cells.cells) > 20
    assert cells.loads == []
    if name.endswith("json"):
        commit = json.loads((RESULTS / name).read_text())["commit"]["hash"]
        assert (commit, "") in cells.cells


def test_files_that_have_no_page(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    with pytest.raises(ResultsError, match=r"gone\.md: no such file"):
        write_page(tmp_path / "gone.md", "", output)
    with pytest.raises(ResultsError, match=r"x\.txt: no page .* ends in \.md, \.csv, \.json"):
        write_page(tmp_path / "x.txt", "", output)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ResultsError, match=r"other\.json: not a provenance"):
        write_page(tmp_path / "other.json", "", output)
    assert not output.exists()
