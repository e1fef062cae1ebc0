"""The report: one HTML file with everything in it, looked at in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import pytest

from workflow_copy import SMOKE, Project

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1366, 768  # of a laptop's screen


@pytest.fixture(scope="module")
def report(whole: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    run = whole.snakemake(*SMOKE, "--report", str(file))
    assert run.returncode == 0, run.stdout
    return file


def browse(page: Path, *options: str) -> str:
    """What a headless browser prints of a page, without a network."""
    assert BROWSER is not None
    alone = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic"]
    alone += ["--disable-background-networking", "--disable-component-update"]
    place = [f"--user-data-dir={page.with_name('browser')}", f"--window-size={WIDTH},{HEIGHT}"]
    timed = ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000"]
    run = subprocess.run(
        [BROWSER, "--headless", *alone, *place, *timed, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    return run.stdout


def test_the_report_holds_every_table_and_figure(whole: Project, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    pages = [path.name for path in (whole.smoke / "pages").iterdir()]
    figures = [path.name for path in (whole.smoke / "figures").iterdir()]
    assert {"comparison.html", "costs.html", "provenance.html", "risk_averse_2d.html"} <= set(pages)
    for name in (*pages, *figures):
        assert f"{name}" in text, name
    for category in ("Beside the papers", "Experiments", "Costs and provenance", "Theory"):
        assert category in text


def test_the_report_loads_nothing_from_elsewhere(report: Path) -> None:
    """Scripts, styles and images are in the file; links that a reader may follow are another matter."""
    text = report.read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']https?:", text)
    assert not re.findall(r"<link[^>]+href=[\"']https?:", text)
    assert report.stat().st_size > 500_000


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_shows_the_report(report: Path) -> None:
    dom = browse(report, "--dump-dom")
    for words in ("Beside the papers", "Experiments", "Costs and provenance", "Flow Density Control"):
        assert words in dom
    image = report.with_name("report.png")
    browse(report, f"--screenshot={image}")
    pixels = matplotlib.image.imread(image)
    assert pixels.shape[:2] == (HEIGHT, WIDTH)
    # Something is drawn, over most of the height and more than a bar at the side.
    drawn = (pixels[..., :3] < 0.9).any(2)
    assert drawn.mean() > 0.01
    rows, columns = drawn.any(1).nonzero()[0], drawn.any(0).nonzero()[0]
    assert rows[-1] - rows[0] > HEIGHT / 3
    assert columns[-1] - columns[0] > WIDTH / 2


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_shows_a_page_of_a_table(whole: Project) -> None:
    page = whole.smoke / "pages" / "comparison.html"
    dom = browse(page, "--dump-dom")
    assert "Values that the papers report" in dom
    assert 'class="' in dom
