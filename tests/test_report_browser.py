"""Reports in a real browser: no sideways scrolling on a phone or a desk, nothing asked for."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import fedveil
from fedveil.data_prep.schema import parse_schema
from fedveil.models import histograms
from fedveil.reports import read_sources
from fedveil.server.description import PARTS
from fedveil.server.report import Sources, render

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
MEASURE = """
<!doctype html><title>frame</title>
<iframe id="page" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument, view = event.target.contentWindow;
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  const outside = [...page.querySelectorAll("body *")].filter(
    (e) => e.getBoundingClientRect().right > view.innerWidth + 1 && !e.closest(".scroll, pre"));
  document.getElementById("found").textContent = JSON.stringify({{
    inner: view.innerWidth, scroll: page.documentElement.scrollWidth,
    outside: outside.map((e) => e.outerHTML.slice(0, 80)), scripts: page.scripts.length,
    asked: view.performance.getEntriesByType("resource").filter(
      (e) => !e.name.startsWith("data:")).map((e) => e.name),
    smallest: Math.min(...[...page.querySelectorAll("svg text")].map(
      (e) => e.getBoundingClientRect().height)),
  }});
}};
</script>
"""
Measure = Callable[[str, int], dict[str, Any]]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Shows a page at a width and tells what the browser made of it."""

    def run(page: str, width: int) -> dict[str, Any]:
        file = tmp_path / "frame.html"
        file.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
        command = [
            str(CHROMIUM), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            "--window-size=1400,1000", "--virtual-time-budget=4000", file.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found is not None
        told: dict[str, Any] = json.loads(html.unescape(found[1]))
        return told

    return run


def crowded(run: fedveil.Run) -> str:
    """A report with long words in every place, and a site that was often missing."""
    long, found = "x" * 300, read_sources(run)
    columns = [
        {"name": f"{long}{i}", "kind": "categorical", "categories": [f"{long}a", f"{long}b"]}
        for i in range(3)
    ]
    schema = parse_schema({"column": columns}, "here")
    dropped = [{"site": 1, "reason": f"refused: {long}"}]
    events = [
        {**event, "dropped": dropped} if event["event"] == "round" else event
        for event in (*found.events, {"event": "failed", "cause": long})
    ]
    assert found.config is not None
    config = (f'name = "{long}"', {"federation": {"name": long}})
    synthetic = (
        histograms.joined([found.synthetic[:2]] * 3) if found.synthetic is not None else None
    )
    return render(
        Sources(
            long, events, config, {long: long}, schema, synthetic=synthetic,
            statistics=statistics(long),
        )
    )  # fmt: skip


def statistics(long: str) -> dict[str, Any]:
    """What noisy statistics say of thirty columns, each in every section, with long names."""
    share = {"value": 0.123, "low": 0.012, "high": 0.234, "told": "too few to tell"}
    parts = [{"part": q, "value": 1234567, "low": 1e6, "high": 2e6} for q in PARTS]
    names = [f"{long}{i}" for i in range(30)]
    columns = [
        {"name": name, "kind": "x", "label": name == names[0], "missing": share,
         "declared": [0.0, 1e9], "quantiles": parts,
         "levels": [{"name": f"{long}{i}", **share} for i in range(30)]}
        for name in names
    ]  # fmt: skip
    pairs = [{"columns": [*two], **share, "told": "", "floor": 0.1} for two in pairwise(names)]
    total = share | {"value": 1e6, "low": 9e5, "high": 2e6}
    found = {"modality": "table", "units": 1e6, "interval": {"level": 0.95}, "total": total}
    return {**found, "columns": columns, "pairs": pairs}


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways(
    measure: Measure,
    finished_run: fedveil.Run,
    finished_table_run: fedveil.Run,
    width: int,
) -> None:
    for page in (
        render(read_sources(finished_run)),
        render(read_sources(finished_table_run)),
        crowded(finished_table_run),
    ):
        found = measure(page, width)
        assert found["inner"] == width
        assert found["outside"] == []
        assert found["scroll"] <= width
        assert (found["scripts"], found["asked"]) == (0, [])
        assert found["smallest"] >= 10  # a line of text, in pixels


def test_a_page_that_is_too_wide_is_found(measure: Measure) -> None:
    page = '<!doctype html><p style="width: 700px">wide<img src="http://127.0.0.1:9/x.png">'
    found = measure(page, 390)
    assert found["scroll"] > 390
    assert found["outside"]
    assert found["asked"] == ["http://127.0.0.1:9/x.png"]
